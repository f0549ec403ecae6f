"""Reads metadata files (TSV or CSV) and makes the rows of items.parquet and the vocabularies from them."""

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from bert4rec import storage
from bert4rec.data.features import FEATURES
from bert4rec.data.files import METADATA, Quotes, form_of, open_text, read_header, readable, unquote
from bert4rec.data.ids import ascending, some_of
from bert4rec.errors import InputError, shown

TAB = "\t"


class MetadataFile(NamedTuple):
    """Content of a metadata file."""

    table: pa.Table
    """Columns `item` and another one as strings (years: int16), without empty values."""
    changed: dict[str, int]
    """Number of rows that were changed, by kind."""


def read_all_metadata(
    data_dir: str, names: dict[str, str], list_separator: str
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Read the files `names` by key of METADATA. Return their tables, and what `read_metadata` changed."""
    tables: dict[str, pa.Table] = {}
    changed: dict[str, int] = {}
    for key, name in names.items():
        tables[key], more = read_metadata(data_dir, name, METADATA[key], list_separator)
        changed |= more
    return tables, changed


def read_metadata(data_dir: str, name: str, column: str, list_separator: str) -> MetadataFile:
    """Read the columns `item` and `column` of a metadata file. A feature with several values has one row for each.

    A TSV file does not quote fields, and titles may hold quotes. But if a CSV writer quoted a whole field, this removes
    the quotes. A CSV file quotes as usual.

    Raises
    ------
    InputError
        If the file cannot be read or lacks a column, or a line has a wrong number of fields, no item, or a bad year.
    """
    path = storage.join(data_dir, name)
    is_csv = name.split(".")[1] == "csv"
    delimiter = "," if is_csv else TAB
    with readable(path):
        columns, _, has_rows = read_header(path, delimiter, ("item", column))
        with open_text(path, form_of(path)) as stream:
            content = stream.read()
    if is_csv:
        quotes = Quotes(path)
        quotes.feed(content[content.find(b"\n") + 1 :])
        quotes.end()
    names = [name if name in ("item", column) else f"column {i}" for i, name in enumerate(columns)]
    values = {"item": pa.array([], pa.string()), column: pa.array([], pa.string())}
    if has_rows:
        try:
            table = pacsv.read_csv(
                pa.BufferReader(content),
                pacsv.ReadOptions(use_threads=False, skip_rows=1, column_names=names),
                pacsv.ParseOptions(delimiter=delimiter, quote_char='"' if is_csv else False, newlines_in_values=is_csv),
                pacsv.ConvertOptions(
                    column_types=dict.fromkeys(values, pa.string()), include_columns=list(values), null_values=[]
                ),
            )
        except pa.ArrowInvalid as error:
            raise _explain_metadata(path, content, columns, delimiter, str(error)) from None
        values = {name: table[name].combine_chunks() for name in values}
        if not is_csv:
            values = {name: unquote(each) for name, each in values.items()}
    items = pc.utf8_trim_whitespace(values["item"])
    trimmed = int(pc.sum(pc.not_equal(items, values["item"])).as_py() or 0)
    changed = {f"{name}: items with blanks around them, trimmed": trimmed} if trimmed else {}
    item_missing = pc.equal(items, "").to_numpy(zero_copy_only=False)
    if item_missing.any():
        line = _line_of(content, int(item_missing.argmax()), delimiter)
        raise InputError(f"{path}, line {line}: item is missing")
    present = pc.not_equal(values[column], "")
    if column == "year":
        values[column] = _parse_years(path, content, values[column], delimiter)
    result = pa.table({"item": items, column: values[column]}).filter(present)
    feature = FEATURES.get(column)
    if feature is not None and feature.is_list and list_separator:
        result, num_split = _split_values(result, column, list_separator)
        changed |= {f"{name}: fields split at {list_separator}": num_split} if num_split else {}
    return MetadataFile(result, changed)


def _split_values(table: pa.Table, column: str, separator: str) -> tuple[pa.Table, int]:
    """A row for each value of a field, and the number of fields that had several."""
    texts = table[column].combine_chunks()
    several = pc.match_substring(texts, separator).to_numpy(zero_copy_only=False)
    if not several.any():
        return table, 0
    values = pc.split_pattern(texts, separator)
    row = pc.list_parent_indices(values).to_numpy()
    value = values.flatten()
    value = pc.if_else(pa.array(several[row]), pc.utf8_trim_whitespace(value), value)
    split = pa.table({"item": table["item"].take(pa.array(row)), column: value})
    return split.filter(pc.not_equal(value, "")), int(several.sum())


_SHARE = 0.5  # of the rows of a file and of the items of the ratings that should have found one another


def check_items(data_dir: str, names: dict[str, str], metadata: dict[str, pa.Table], ids: pa.Array) -> list[str]:
    """Notes on metadata files in which few items are among `ids`, those of the ratings.

    Raises
    ------
    InputError
        If no item of a file is.
    """
    notes = []
    spelled = ids.cast(pa.string())
    for key, table in metadata.items():
        items = table["item"].combine_chunks().unique()
        known = pc.index_in(items, spelled).is_valid()
        num_known = int(pc.sum(known).as_py() or 0)
        if not len(items) or num_known >= _SHARE * min(len(items), len(ids)):
            continue
        others = spelled.filter(pc.is_null(pc.index_in(spelled, items)))
        sides = (
            f"items of the file are {some_of(items.filter(pc.invert(known)))}, of the ratings {some_of(others)}; "
            "expected the same spelling in both"
        )
        if not num_known:
            raise InputError(
                f"{storage.join(data_dir, names[key])}: none of its {len(items):,} items has ratings; {sides}"
            )
        notes.append(
            f"WARNING {names[key]}: only {num_known:,} of its {len(items):,} items are among the {len(ids):,} of the "
            f"ratings; other {sides}"
        )
    return notes


def item_table(
    ids: pa.Array,
    counts: np.ndarray,
    metadata: dict[str, pa.Table],
    names: dict[str, str],
    dropped: dict[str, int],
) -> tuple[pa.Table, dict[str, list[str]], list[str]]:
    """Make items.parquet, the vocabulary of each feature, and notes on ignored rows.

    `ids` are in token order. `names` are those of the files, by key of METADATA. `dropped` gets the number of ignored
    rows of each kind; what was changed before is in it, and gets a note too.
    """
    columns = {"index": pa.array(np.arange(1, len(ids) + 1), pa.int32()), "item": ids, "count": pa.array(counts)}
    vocabularies: dict[str, list[str]] = {}
    notes: list[str] = []

    def drop(kind: str, count: int) -> None:
        if count:
            dropped[kind] = count
            notes.append(f"{kind}: {count:,}")

    for file, name in METADATA.items():
        if file not in metadata:
            notes.append(f"no {file}.tsv: items have no {file}")
        for kind in [kind for kind in dropped if kind.startswith(f"{names.get(file)}:")]:
            drop(kind, dropped[kind])
        row, values = _known_rows(ids, file, name, metadata)
        num_unknown = len(metadata[file]) - len(row) if file in metadata else 0
        drop(f"{names.get(file)}: rows of items without interactions ignored", num_unknown)
        feature = FEATURES.get(name)
        if feature is not None and feature.is_list:
            vocabulary = ascending(values.unique())
            columns[feature.column] = _lists(row, pc.index_in(values, vocabulary).to_numpy(), len(ids))
            vocabularies[name] = vocabulary.to_pylist()
            continue
        rows, first = np.unique(row, return_index=True)
        drop(f"{names.get(file)}: further rows of an item ignored, the first counts", len(row) - len(rows))
        position = np.full(len(ids), -1)
        position[rows] = first
        value = values.take(pa.array(position, mask=position < 0))
        if feature is None:
            columns[name] = value
            continue
        vocabulary = ascending(value.unique().drop_null())
        columns[feature.column] = pc.index_in(value, vocabulary)
        vocabularies[name] = vocabulary.to_pylist()
    return pa.table(columns), vocabularies, notes


def _known_rows(ids: pa.Array, file: str, name: str, metadata: dict[str, pa.Table]) -> tuple[np.ndarray, pa.Array]:
    """[S] place in `ids` and [S] value, for each row of a metadata file whose item is in `ids`."""
    if file not in metadata:
        return np.zeros(0, np.int64), pa.array([], pa.int16() if name == "year" else pa.string())
    found = pc.index_in(metadata[file]["item"], ids.cast(pa.string()))
    values = metadata[file][name].filter(found.is_valid()).combine_chunks()
    return found.drop_null().to_numpy().astype(np.int64), values


_ALWAYS = {"item", "year", "title", "genres", "director", "writers"}


def catalogue_fingerprint(items: pa.Table, vocabularies: dict[str, list[str]]) -> str:
    """Fingerprint of the item ids in token order and of all metadata. A model only scores data with its own catalogue.

    The fingerprint ignores a column without any value, so that models trained before a new feature stay usable. Columns
    in `_ALWAYS` count even if empty, because the first version counted them.
    """
    columns = [name for name in items.column_names if name in _ALWAYS or not _is_empty(items[name])]
    counted = items.select([name for name in columns if name not in ("index", "count")])
    named = {
        FEATURES[name].file: values
        for name, values in vocabularies.items()
        if values or FEATURES[name].column in _ALWAYS
    }
    return storage.fingerprint([counted.to_pydict(), named])


def _is_empty(column: pa.ChunkedArray) -> bool:
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return bool(len(values) == values.null_count)


def new_items(ids: pa.Array, metadata: dict[str, pa.Table]) -> pa.Array:
    """Ascending ids that have metadata but are not in `ids`. Ids of another type than `ids` are left out."""
    named = pa.concat_arrays([pa.array([], pa.string()), *(t["item"].combine_chunks() for t in metadata.values())])
    unknown = named.unique()
    unknown = unknown.filter(pc.is_null(pc.index_in(unknown, ids.cast(pa.string()))))
    if pa.types.is_integer(ids.type):
        unknown = unknown.filter(pc.match_substring_regex(unknown, r"^(0|-?[1-9]\d{0,17})$")).cast(pa.int64())
    return ascending(unknown)


def _lists(row: np.ndarray, value: np.ndarray, num_rows: int) -> pa.Array:
    """[num_rows] lists: the values of each row, in order and without repetitions."""
    _, first = np.unique(np.stack([row, value]), axis=1, return_index=True)
    first.sort()
    row, value = row[first], value[first]
    ends = np.cumsum(np.bincount(row, minlength=num_rows))
    ordered = value[np.argsort(row, kind="stable")].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(ordered))


def _parse_years(path: str, content: bytes, years: pa.Array, delimiter: str) -> pa.Array:
    usable = pc.match_substring_regex(years, r"^-?\d{1,5}(\.0*)?$|^$")
    numbers = pc.if_else(pc.and_(usable, pc.not_equal(years, "")), years, "0").cast(pa.float64(), safe=False).to_numpy()
    bad = ~usable.to_numpy(zero_copy_only=False) | (np.abs(numbers) > np.iinfo(np.int16).max)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{path}, line {_line_of(content, row, delimiter)}: year is {shown(repr(years[row].as_py()))}; expected a "
            "number such as 1999"
        )
    return pa.array(numbers.astype(np.int16))


def _rows_of(content: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line, from 1, and the fields of each row of a metadata file, its header among them. Blank lines are no
    rows. Bytes that are not UTF-8 become surrogates."""
    text = content.decode("utf-8", "surrogateescape")
    if delimiter == ",":
        reader = csv.reader(io.StringIO(text, newline=""))
        line = 1
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    else:
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip("\r"):
                yield line, row.rstrip("\r").split("\t")


def _line_of(content: bytes, row: int, delimiter: str) -> int:
    """Line number, from 1, of data row `row`, from 0, of a metadata file."""
    return [line for line, _ in _rows_of(content, delimiter)][row + 1]


def _explain_metadata(path: str, content: bytes, columns: tuple[str, ...], delimiter: str, error: str) -> InputError:
    for line, fields in _rows_of(content, delimiter):
        if any("\udc80" <= character <= "\udcff" for field in fields for character in field):
            return InputError(f"{path}, line {line}: not UTF-8 text")
        if len(fields) != len(columns):
            expected = f"expected {len(columns)}, separated by {'tabs' if delimiter == TAB else 'commas'}"
            return InputError(f"{path}, line {line}: {len(fields)} fields, {expected}")
    return InputError(f"{path}: not readable as text separated by {delimiter!r} ({shown(error, 300)})")
