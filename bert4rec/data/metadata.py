"""Reads metadata files (TSV) and makes the rows of items.parquet and the vocabularies from them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from bert4rec import storage
from bert4rec.data.features import FEATURES
from bert4rec.data.files import METADATA, read_header, readable, unquote
from bert4rec.data.ids import ascending
from bert4rec.errors import InputError


def read_metadata(data_dir: str, name: str, column: str) -> pa.Table:
    """Read the columns `item` and `column` of a metadata file as strings (years: int16), without empty values.

    The format does not quote fields, and titles may hold quotes. But if a CSV writer quoted a whole field, this removes
    the quotes.

    Raises
    ------
    InputError
        If the file cannot be read or lacks a column, or a line has a wrong number of fields, no item, or a bad year.
    """
    path = storage.join(data_dir, name)
    with readable(path):
        columns, _, has_rows = read_header(path, "\t", ("item", column))
        filesystem, inner = storage.open_store(path)
        with filesystem.open_input_stream(inner, compression="detect") as stream:
            content = stream.read()
    names = [name if name in ("item", column) else f"column {i}" for i, name in enumerate(columns)]
    values = {"item": pa.array([], pa.string()), column: pa.array([], pa.string())}
    if has_rows:
        try:
            table = pacsv.read_csv(
                pa.BufferReader(content),
                pacsv.ReadOptions(use_threads=False, skip_rows=1, column_names=names),
                pacsv.ParseOptions(delimiter="\t", quote_char=False),
                pacsv.ConvertOptions(
                    column_types=dict.fromkeys(values, pa.string()), include_columns=list(values), null_values=[]
                ),
            )
        except pa.ArrowInvalid as error:
            raise _explain_metadata(path, content, len(columns), str(error)) from None
        values = {name: unquote(table[name].combine_chunks()) for name in values}
    item_missing = pc.equal(values["item"], "").to_numpy(zero_copy_only=False)
    if item_missing.any():
        raise InputError(f"{path}, line {_line_of(content, int(item_missing.argmax()))}: item is missing")
    present = pc.not_equal(values[column], "")
    if column == "year":
        values[column] = _parse_years(path, content, values[column])
    return pa.table(values).filter(present)


def item_table(
    ids: pa.Array, counts: np.ndarray, metadata: dict[str, pa.Table]
) -> tuple[pa.Table, dict[str, list[str]], list[str]]:
    """Make items.parquet, the vocabulary of each feature, and notes on ignored rows. `ids` are in token order."""
    columns = {"index": pa.array(np.arange(1, len(ids) + 1), pa.int32()), "item": ids, "count": pa.array(counts)}
    vocabularies: dict[str, list[str]] = {}
    notes: list[str] = []
    for file, name in METADATA.items():
        row, values = _known_rows(ids, file, name, metadata, notes)
        feature = FEATURES.get(name)
        if feature is not None and feature.is_list:
            vocabulary = ascending(values.unique())
            columns[feature.column] = _lists(row, pc.index_in(values, vocabulary).to_numpy(), len(ids))
            vocabularies[name] = vocabulary.to_pylist()
            continue
        rows, first = np.unique(row, return_index=True)
        if len(rows) < len(row):
            notes.append(f"{file}.tsv: further rows of an item ignored, the first counts: {len(row) - len(rows):,}")
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


def _known_rows(
    ids: pa.Array, file: str, name: str, metadata: dict[str, pa.Table], notes: list[str]
) -> tuple[np.ndarray, pa.Array]:
    """[S] place in `ids` and [S] value, for each row of a metadata file whose item is in `ids`."""
    if file not in metadata:
        notes.append(f"no {file}.tsv: items have no {file}")
        return np.zeros(0, np.int64), pa.array([], pa.int16() if name == "year" else pa.string())
    found = pc.index_in(metadata[file]["item"], ids.cast(pa.string()))
    if found.null_count:
        notes.append(f"{file}.tsv: rows of items without interactions ignored: {found.null_count:,}")
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


def _parse_years(path: str, content: bytes, years: pa.Array) -> pa.Array:
    usable = pc.match_substring_regex(years, r"^-?\d{1,5}(\.0*)?$|^$")
    numbers = pc.if_else(pc.and_(usable, pc.not_equal(years, "")), years, "0").cast(pa.float64(), safe=False).to_numpy()
    bad = ~usable.to_numpy(zero_copy_only=False) | (np.abs(numbers) > np.iinfo(np.int16).max)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{path}, line {_line_of(content, row)}: year is {years[row].as_py()!r}; expected a number such as 1999"
        )
    return pa.array(numbers.astype(np.int16))


def _line_of(content: bytes, row: int) -> int:
    """Line number, from 1, of data row `row`, from 0, of a metadata file. Blank lines are not rows."""
    filled = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip(b"\r")]
    return filled[row + 1]


def _explain_metadata(path: str, content: bytes, num_columns: int, error: str) -> InputError:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            fields = line.rstrip(b"\r").decode().split("\t")
        except UnicodeDecodeError:
            return InputError(f"{path}, line {number}: not UTF-8 text")
        if line.strip(b"\r") and len(fields) != num_columns:
            return InputError(f"{path}, line {number}: {len(fields)} fields, expected {num_columns}, separated by tabs")
    return InputError(f"{path}: not readable as tab-separated text ({error})")
