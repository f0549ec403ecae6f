"""Reads and writes files of item vectors.

Parquet: columns `item` (int64 or string) and `embedding` (list<float32>); other columns are allowed.
TSV, a format that other programs use: a header `item<TAB>title`, then a line per item: its id, a tab, and its numbers
separated by blanks.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.data.files import read_header, readable, unquote
from bert4rec.data.ids import as_ids, find_ids, some_of
from bert4rec.errors import InputError

_ROWS_AT_ONCE = 16_384
_BUFFER_BYTES = 1 << 20  # read at a time, instead of a whole group of rows
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


def read_vectors(path: str) -> tuple[pa.Array, Iterator[np.ndarray]]:
    """Read ids [n] (int64 or strings), and float32 vectors [n, width] in blocks, from a Parquet file, or else from TSV.

    Raises
    ------
    InputError
        If the file has no vectors, an id is missing or occurs twice, or, of a block as it is taken, a vector has
        another width than the first, or a value is not a finite number. The message names the line (Parquet: the row,
        from 1).
    """
    is_parquet = path.endswith((".parquet", ".pq"))
    where = f"{path}, {'row' if is_parquet else 'line'}"
    with readable(path):
        ids, blocks, places = _read_parquet(path) if is_parquet else _read_tsv(path)
    if not len(ids):
        raise InputError(f"{path}: no vectors in it")
    if (missing := pc.equal(ids.cast(pa.string()).fill_null(""), "").to_numpy(zero_copy_only=False)).any():
        raise InputError(f"{where} {places[int(missing.argmax())]}: item is missing")
    _, first = np.unique(ids.dictionary_encode().indices.to_numpy(), return_index=True)
    if len(first) < len(ids):
        row = int(np.delete(np.arange(len(ids)), first)[0])
        raise InputError(f"{where} {places[row]}: item {ids[row]} occurs a second time")
    return ids, _numbers(path, where, blocks, places)


@storage.patient
def read_vectors_of(path: str, items: pa.Array, memory_mb: int) -> np.ndarray:
    """[V, width] float32 vectors of the items with the ids `items` [V] in such a file; zeros of those that it lacks.

    If they take more than `memory_mb` MiB, they go into a temporary file on the local disk, which is mapped into
    memory. Of Parquet, a block of rows at a time is in memory.

    Raises
    ------
    InputError
        As `read_vectors`, or if the file has none of the items.
    """
    ids, blocks = read_vectors(path)
    item = find_ids(ids.cast(pa.string()), items)
    if (item < 0).all():
        raise InputError(
            f"{path}: was made for other data: none of its {len(ids):,} items, such as {some_of(ids)}, is in the "
            f"catalogue, which has {len(items):,} items, such as {some_of(items)}"
        )
    found, low = np.empty((0, 0), np.float32), 0
    for block in blocks:
        if low == 0:
            size = 4 * len(items) * block.shape[1]
            found = storage.empty((len(items), block.shape[1]), np.float32, size <= memory_mb * 2**20)
            if size <= memory_mb * 2**20:
                found[:] = 0
        own = item[low : low + len(block)]
        found[own[own >= 0]] = block[own >= 0]
        low += len(block)
    return found


def _numbers(path: str, where: str, blocks: Iterable[pa.Array], places: np.ndarray) -> Iterator[np.ndarray]:
    low = width = 0
    with readable(path):
        for lists in blocks:
            widths = pc.list_value_length(lists).fill_null(0).to_numpy()
            expected = f"the first has {width or widths[0]}" if low or widths[0] else "expected one or more"
            width = width or widths[0]
            if (other := (widths != width) | (widths == 0)).any():
                row = int(other.argmax())
                raise InputError(f"{where} {places[low + row]}: a vector of {widths[row]} numbers; {expected}")
            values = lists.flatten()
            numbers = _to_numbers(values)
            if not (finite := np.isfinite(numbers)).all():
                position = int(finite.argmin())
                raise InputError(
                    f"{where} {places[low + position // width]}: {str(values[position])!r} is not a finite float32 "
                    "number"
                )
            yield numbers.reshape(len(lists), width)
            low += len(lists)


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
def _read_parquet(path: str) -> tuple[pa.Array, Iterator[pa.Array], np.ndarray]:
    """Ids, lists of numbers in blocks, and rows counted from 1."""
    filesystem, inner = storage.open_store(path)
    try:
        with filesystem.open_input_file(inner) as file:
            schema = pq.read_schema(file)
            if missing := {"item", "embedding"} - set(schema.names):
                raise InputError(f"{path}: no column {' and '.join(sorted(missing))}; found {', '.join(schema.names)}")
            ids = pq.read_table(file, columns=["item"], page_checksum_verification=True)["item"].combine_chunks()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({error})") from None
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    is_integer, is_text = (
        pa.types.is_integer(ids.type),
        pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type),
    )
    if not (is_integer or is_text):
        raise InputError(f"{path}: column item is {ids.type}; expected integers or strings")
    kind = schema.field("embedding").type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
        raise InputError(f"{path}: column embedding is {kind}; expected lists of numbers")
    return ids.cast(pa.int64() if is_integer else pa.string()), _lists(path), np.arange(1, len(ids) + 1)


def _lists(path: str) -> Iterator[pa.Array]:
    """The column `embedding` of a Parquet file, some rows at a time."""
    filesystem, inner = storage.open_store(path)
    try:
        with (
            filesystem.open_input_file(inner) as file,
            pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as parquet,
        ):
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=["embedding"]):
                yield batch.column(0)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({error})") from None


@storage.patient
def _read_tsv(path: str) -> tuple[pa.Array, list[pa.Array], np.ndarray]:
    """Ids, one block of lists of numbers not yet parsed, and line numbers."""
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
    return as_ids(spelled), [pc.ascii_split_whitespace(texts)], places
