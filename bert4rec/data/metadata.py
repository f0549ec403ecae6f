"""Metadata files (TSV) and what becomes of them: the rows of items.parquet and the vocabularies."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from bert4rec import storage
from bert4rec.data.files import METADATA, read_header, readable, unquote
from bert4rec.data.ids import ascending
from bert4rec.errors import InputError


def read_metadata(data_dir: str, name: str, column: str) -> pa.Table:
    """Columns `item` and `column` of a metadata file, as strings (years: int16), rows without a value left out.

    Fields are not quoted, titles may hold quotes; yet a field that a CSV writer quoted as a whole is unquoted.

    Raises
    ------
    InputError
        If it cannot be read, lacks a column, or a line has another number of fields, no item, or a year out of range.
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
    """items.parquet, the vocabularies, and notes of what was ignored; `ids` in token order."""
    columns = {"index": pa.array(np.arange(1, len(ids) + 1), pa.int32()), "item": ids, "count": pa.array(counts)}
    vocabularies: dict[str, list[str]] = {}
    notes: list[str] = []
    spelled = ids.cast(pa.string())
    for key, column in METADATA.items():
        values = pa.array([], pa.int16() if key == "years" else pa.string())
        row = np.zeros(0, np.int64)
        if key in metadata:
            found = pc.index_in(metadata[key]["item"], spelled)
            values = metadata[key][column].filter(found.is_valid()).combine_chunks()
            row = found.drop_null().to_numpy().astype(np.int64)
            if found.null_count:
                notes.append(f"{key}.tsv: rows of items without interactions ignored: {found.null_count:,}")
        else:
            notes.append(f"no {key}.tsv: items have no {key}")
        if key in ("genres", "writers"):
            vocabulary = ascending(values.unique())
            columns[key] = _lists(row, pc.index_in(values, vocabulary).to_numpy(), len(ids))
            vocabularies[key] = vocabulary.to_pylist()
            continue
        rows, first = np.unique(row, return_index=True)
        if len(rows) < len(row):
            notes.append(f"{key}.tsv: further rows of an item ignored, the first counts: {len(row) - len(rows):,}")
        position = np.full(len(ids), -1)
        position[rows] = first
        columns[column] = values.take(pa.array(position, mask=position < 0))
        if key == "directors":
            vocabulary = ascending(columns[column].unique().drop_null())
            columns[column] = pc.index_in(columns[column], vocabulary)
            vocabularies[key] = vocabulary.to_pylist()
    return pa.table(columns), vocabularies, notes


def new_items(ids: pa.Array, metadata: dict[str, pa.Table]) -> pa.Array:
    """Ascending ids that have metadata but are not among `ids`, as far as they are of the same type."""
    named = pa.concat_arrays([pa.array([], pa.string()), *(t["item"].combine_chunks() for t in metadata.values())])
    unknown = named.unique()
    unknown = unknown.filter(pc.is_null(pc.index_in(unknown, ids.cast(pa.string()))))
    if pa.types.is_integer(ids.type):
        unknown = unknown.filter(pc.match_substring_regex(unknown, r"^(0|-?[1-9]\d{0,17})$")).cast(pa.int64())
    return ascending(unknown)


def _lists(row: np.ndarray, value: np.ndarray, num_rows: int) -> pa.Array:
    """[num_rows] lists of each row's values, in order and without repetitions."""
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
    """Line number, from 1, of a data row of a metadata file, counted from 0; blank lines are no rows."""
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
