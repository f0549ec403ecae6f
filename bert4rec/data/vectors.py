"""Reads and writes files of item vectors.

Parquet: columns `item` (int64 or string) and `embedding` (list<float32>); other columns are allowed.
TSV, a format that other programs use: a header `item<TAB>title`, then a line per item: its id, a tab, and its numbers
separated by blanks.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.data.files import read_header, readable, unquote
from bert4rec.data.ids import as_ids
from bert4rec.errors import InputError

_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


def read_vectors(path: str) -> tuple[pa.Array, np.ndarray]:
    """Read ids [n] (int64 or strings) and float32 vectors [n, width] from a Parquet file, or from TSV otherwise.

    Raises
    ------
    InputError
        If the file has no vectors, an id is missing or occurs twice, a vector has another width than the first, or a
        value is not a finite number. The message names the line (Parquet: the row, from 1).
    """
    with readable(path):
        is_parquet = path.endswith((".parquet", ".pq"))
        ids, lists, places = _read_parquet(path) if is_parquet else _read_tsv(path)
    if not len(ids):
        raise InputError(f"{path}: no vectors in it")
    widths = pc.list_value_length(lists).fill_null(0).to_numpy()
    values = lists.flatten()
    numbers = _to_numbers(values)
    where = f"{path}, {'row' if is_parquet else 'line'}"
    if (other := (widths != widths[0]) | (widths == 0)).any():
        row = int(other.argmax())
        expected = f"the first has {widths[0]}" if row else "expected one or more"
        raise InputError(f"{where} {places[row]}: a vector of {widths[row]} numbers; {expected}")
    if not (finite := np.isfinite(numbers)).all():
        position = int(finite.argmin())
        raise InputError(
            f"{where} {places[position // widths[0]]}: {str(values[position])!r} is not a finite float32 number"
        )
    if (missing := pc.equal(ids.cast(pa.string()).fill_null(""), "").to_numpy(zero_copy_only=False)).any():
        raise InputError(f"{where} {places[int(missing.argmax())]}: item is missing")
    _, first = np.unique(ids.dictionary_encode().indices.to_numpy(), return_index=True)
    if len(first) < len(ids):
        row = int(np.delete(np.arange(len(ids)), first)[0])
        raise InputError(f"{where} {places[row]}: item {ids[row]} occurs a second time")
    return ids, numbers.reshape(len(ids), -1)


def write_table(path: str, table: pa.Table) -> None:
    """Write a Parquet file, all or nothing, with checksums that its readers verify."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def write_tsv(path: str, ids: pa.Array, embeddings: pa.ListArray) -> None:
    """Write TSV, all or nothing, with the shortest decimals that give the same float32 again."""
    spelled = ids.cast(pa.string())
    quoted = pc.binary_join_element_wise('"', pc.replace_substring(spelled, '"', '""'), '"', "")
    numbers = pa.ListArray.from_arrays(embeddings.offsets, embeddings.values.cast(pa.string()))
    lines = pc.binary_join_element_wise(
        pc.if_else(pc.starts_with(spelled, '"'), quoted, spelled), pc.binary_join(numbers, " "), "\t"
    )
    storage.write_bytes(path, "\n".join(["item\ttitle", *lines.to_pylist(), ""]).encode())


def to_lists(vectors: np.ndarray) -> pa.ListArray:
    """Turn vectors [n, width] into a column `embedding`."""
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(vectors.astype(np.float32).ravel()))


def _to_numbers(values: pa.Array) -> np.ndarray:
    """Convert to float32, with NaN for a value that is not a number."""
    try:
        numbers = values.cast(pa.float32(), safe=False)
    except pa.ArrowInvalid:
        is_number = pc.match_substring_regex(values, _NUMBER)
        numbers = pc.if_else(is_number, values, "nan").cast(pa.float32())
    array: np.ndarray = numbers.fill_null(np.nan).to_numpy(zero_copy_only=False)
    return array


@storage.patient
def _read_parquet(path: str) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Ids, lists of numbers, and rows counted from 1."""
    filesystem, inner = storage.open_store(path)
    try:
        with filesystem.open_input_file(inner) as file:
            schema = pq.read_schema(file)
            if missing := {"item", "embedding"} - set(schema.names):
                raise InputError(f"{path}: no column {' and '.join(sorted(missing))}; found {', '.join(schema.names)}")
            table = pq.read_table(file, columns=["item", "embedding"], page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({error})") from None
    ids, lists = (table[name].combine_chunks() for name in ("item", "embedding"))
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    is_integer, is_text = (
        pa.types.is_integer(ids.type),
        pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type),
    )
    if not (is_integer or is_text):
        raise InputError(f"{path}: column item is {ids.type}; expected integers or strings")
    is_list = (
        pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type) or pa.types.is_fixed_size_list(lists.type)
    )
    if not (is_list and (pa.types.is_floating(lists.type.value_type) or pa.types.is_integer(lists.type.value_type))):
        raise InputError(f"{path}: column embedding is {lists.type}; expected lists of numbers")
    return ids.cast(pa.int64() if is_integer else pa.string()), lists, np.arange(1, len(ids) + 1)


@storage.patient
def _read_tsv(path: str) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Ids, lists of numbers not yet parsed, and line numbers."""
    columns, _, _ = read_header(path, "\t", ("item", "title"))
    filesystem, inner = storage.open_store(path)
    with filesystem.open_input_stream(inner, compression="detect") as stream:
        lines = pa.array(stream.read().split(b"\n")[1:], pa.binary())
    try:
        lines = pc.utf8_rtrim(lines.cast(pa.string()), "\r")
    except pa.ArrowInvalid:
        raise InputError(f"{path}: not UTF-8 text") from None
    filled = pc.not_equal(lines, "").to_numpy(zero_copy_only=False)
    fields, places = pc.split_pattern(lines.filter(pa.array(filled)), "\t"), np.flatnonzero(filled) + 2
    if len(ragged := np.flatnonzero(pc.list_value_length(fields).to_numpy() != len(columns))):
        count = len(fields[int(ragged[0])])
        raise InputError(
            f"{path}, line {places[ragged[0]]}: {count} fields, expected {len(columns)}, separated by tabs"
        )
    spelled, texts = (unquote(pc.list_element(fields, columns.index(name))) for name in ("item", "title"))
    # An empty text has no numbers, but splitting it would give one empty string.
    texts = pc.ascii_trim_whitespace(texts)
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    return as_ids(spelled), pc.ascii_split_whitespace(texts), places
