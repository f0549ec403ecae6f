"""Reads interactions files (CSV, compressed CSV, Parquet) in chunks, and checks each chunk on its own.

One large file therefore keeps all cores busy, and `prepare` finds bad rows before it writes anything.
"""

import codecs
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.config import LARGEST_TIME
from bert4rec.data.dataset import InputFile
from bert4rec.data.files import READ_BYTES, hash_file, is_compressed, read_header, readable, require_columns
from bert4rec.data.ids import are_ints
from bert4rec.errors import InputError

SAMPLE_EVERY = 4096
"""Rows for each user that helps `prepare` to choose ranges of users."""
_QUOTE = ord('"')
_MAY_STAND_BESIDE = np.isin(np.arange(256), list(b'",\r\n'))  # [256] bool, by byte
_TEXT = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class Chunk:
    """A part of an interactions file that a task reads on its own."""

    path: str
    kind: Literal["csv", "stream", "parquet"]
    """csv: plain CSV. stream: compressed CSV, a single chunk because it can only be read from its start. parquet."""
    columns: tuple[str, ...]
    """All columns of the file."""
    start: int
    """First byte (Parquet: first row group)."""
    stop: int
    """Byte (Parquet: row group) after the last one."""
    line: int
    """Number of the line (Parquet: row) at `start`, counted from 1."""
    block_bytes: int
    """Decompressed bytes to parse at once."""
    strings: tuple[str, ...] = ()
    """Columns that a Parquet file declares as strings. They stay strings even if they hold only numbers."""


@dataclass(frozen=True)
class ChunkSummary:
    """Content and errors of a chunk."""

    num_rows: int
    int_users: bool
    """Whether each user id is the usual spelling of an int64."""
    int_items: bool
    items: pa.Array
    """Distinct item ids, as strings."""
    user_sample: pa.Array
    """Some user ids, as strings."""
    bad: Counter[str] = field(default_factory=Counter)
    """Number of rows with an unusable value, by column."""
    error: str | None = None
    """Why the chunk cannot be parsed, if it cannot."""


def scan_interactions(data_dir: str, name: str, chunk_bytes: int) -> tuple[InputFile, list[Chunk]]:
    """Return the identity of an interactions file, and its chunks of about `chunk_bytes`.

    Raises
    ------
    InputError
        If it cannot be read, is empty, or has no columns `user` and `item`.
    """
    path = storage.join(data_dir, name)
    with readable(path):
        if name.endswith((".parquet", ".pq")):
            return hash_file(data_dir, name), _parquet_chunks(path, chunk_bytes)
        columns, header_bytes, has_rows = read_header(path, ",", ("user", "item"))
        if is_compressed(name):
            identity = hash_file(data_dir, name)
            chunks = [Chunk(path, "stream", columns, 0, identity.size, 1, chunk_bytes)]
            quotes = _Quotes(path)
            filesystem, inner = storage.open_store(path)
            with filesystem.open_input_stream(inner, compression="detect") as stream:
                stream.read(header_bytes)
                while block := stream.read(READ_BYTES):
                    quotes.feed(block)
            quotes.end()
        else:
            identity, chunks = _csv_chunks(path, name, columns, header_bytes, chunk_bytes)
    return identity, chunks if has_rows else []


def read_chunk(chunk: Chunk, int_users: bool = False, int_items: bool = False) -> Iterator[pa.Table]:
    """Yield the columns user, item and, if the file has it, time, in pieces of about `block_bytes`, in file order.

    Ids are int64 if `int_users` (`int_items`), otherwise dictionary-encoded strings, with "" for a missing id. Times
    are float64, with NaN for a missing time."""
    types = {"user": pa.int64() if int_users else _TEXT, "item": pa.int64() if int_items else _TEXT}
    if "time" in chunk.columns:
        types["time"] = pa.float64()
    if chunk.kind == "parquet":
        yield _read_parquet(chunk, types)
        return
    # Only the wanted columns keep their names, because the names of other columns may repeat.
    names = [name if name in types else f"column {i}" for i, name in enumerate(chunk.columns)]
    with _open_bytes(chunk) as stream:
        reader = pacsv.open_csv(
            stream,
            pacsv.ReadOptions(
                use_threads=False,
                block_size=chunk.block_bytes,
                skip_rows=int(chunk.kind == "stream"),
                column_names=names,
            ),
            pacsv.ParseOptions(newlines_in_values=True),
            pacsv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[]),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])


def year_of(seconds: np.ndarray) -> np.ndarray:
    """[N] int16, UTC calendar year of Unix seconds."""
    year: np.ndarray = np.floor(seconds).astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970
    return year.astype(np.int16)


def check_chunk(chunk: Chunk, sample_every: int = SAMPLE_EVERY) -> ChunkSummary:
    """Parse and check a chunk, and summarise it.

    The sample has the user of a file's first row, and of every `sample_every`-th row after it. It does not depend on
    the chunks, unless a CSV file has blank lines or line breaks within fields.

    Raises
    ------
    InputError
        If its bytes cannot be read. Errors in its rows do not raise; the summary holds them.
    """
    num_rows, int_users, int_items, error = 0, "user" not in chunk.strings, "item" not in chunk.strings, None
    items, sample, bad = [pa.array([], pa.string())], [pa.array([], pa.string())], Counter[str]()
    place = chunk.line - (2 if chunk.kind == "csv" else 1)  # of the first row in the file
    try:
        with readable(chunk.path):
            for table in read_chunk(chunk):
                users, item_ids = (table[name].combine_chunks() for name in ("user", "item"))
                int_users = int_users and are_ints(users.dictionary)
                int_items = int_items and are_ints(item_ids.dictionary)
                items.append(item_ids.dictionary)
                first = -(place + num_rows) % sample_every
                sample.append(users[first::sample_every].dictionary_decode())
                bad.update({name: int(mask.sum()) for name, mask in _bad_rows(table).items() if mask.any()})
                num_rows += len(table)
    except pa.ArrowInvalid as invalid:
        error = str(invalid)
    return ChunkSummary(
        num_rows, int_users, int_items, pa.concat_arrays(items).unique(), pa.concat_arrays(sample), bad, error
    )


def explain(chunk: Chunk, summary: ChunkSummary, bad: Counter[str]) -> InputError:
    """Make the error for the first unusable row of a chunk. `bad` counts such rows in all chunks.

    This reads row by row in Python, which is slow but happens only for a broken file.
    """
    for where, problem, column in _problems(chunk):
        count = f" ({bad[column]:,} rows with an unusable {column} in all)" if bad[column] > 1 else ""
        return InputError(f"{chunk.path}, {where}: {problem}{count}")
    return InputError(f"{chunk.path}: not readable as CSV ({' '.join(str(summary.error).split())})")


def _csv_chunks(
    path: str, name: str, columns: tuple[str, ...], header_bytes: int, chunk_bytes: int
) -> tuple[InputFile, list[Chunk]]:
    """Hash the file and cut it at line ends outside quotes, that is, after an even number of quotes (RFC 4180)."""
    filesystem, inner = storage.open_store(path)
    digest, chunks = hashlib.sha256(), []
    position, line = 0, 1  # of the block's start
    start, start_line = header_bytes, 2
    quotes = _Quotes(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while block := stream.read(min(READ_BYTES, chunk_bytes)):
            digest.update(block)
            was_inside = quotes.inside
            quotes.feed(block[max(header_bytes - position, 0) :])
            if position + len(block) - start >= chunk_bytes:
                cut = _last_line_end(block, was_inside)
                if cut and position + cut > start:
                    chunks.append(_csv_chunk(path, columns, start, position + cut, start_line))
                    start, start_line = position + cut, line + block.count(b"\n", 0, cut)
            position, line = position + len(block), line + block.count(b"\n")
    quotes.end()
    if start < position:
        chunks.append(_csv_chunk(path, columns, start, position, start_line))
    return InputFile(name=name, size=position, sha256=digest.hexdigest()), chunks


def _csv_chunk(path: str, columns: tuple[str, ...], start: int, stop: int, line: int) -> Chunk:
    return Chunk(
        path, "csv", columns, start, stop, line, block_bytes=stop - start
    )  # so that a line fits, however long it is


class _Quotes:
    """Checks the quotes after a CSV's header. RFC 4180 allows them only around a whole field, and doubled within it.

    CSV readers disagree about any other quote. An unclosed one, for example, swallows all following rows into one
    field."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.inside = False
        self._line, self._opened_in = 2, 2
        self._before = b"\n"  # the byte before the next block

    def feed(self, block: bytes) -> None:
        """Take the file's next bytes.

        Raises
        ------
        InputError
            If a quote is in a place where RFC 4180 allows none.
        """
        if b'"' in block or self._before == b'"':
            self._check(block)
        self._line += block.count(b"\n")
        self._before = block[-1:] or self._before

    def _check(self, block: bytes) -> None:
        """Check that a comma, a line end or another quote (doubling) stands outside each opening and closing quote."""
        text = np.frombuffer(self._before + block, np.uint8)
        quotes = np.flatnonzero(text == _QUOTE)
        if self._before == b'"':  # the last call has checked this quote, but not the byte after it
            closed_before, quotes = quotes[: not self.inside], quotes[1:]
        else:
            closed_before = quotes[:0]
        opening, closing = quotes[int(self.inside) :: 2], quotes[1 - self.inside :: 2]
        closing = np.append(closed_before, closing)
        closing = closing[closing + 1 < len(text)]  # what follows the last byte comes with the next block
        wrong = np.append(
            opening[~_MAY_STAND_BESIDE[text[opening - 1]]], closing[~_MAY_STAND_BESIDE[text[closing + 1]]]
        )
        if len(wrong):
            line = self._line + block.count(b"\n", 0, max(int(wrong.min()) - 1, 0))
            raise InputError(
                f"{self.path}, line {line}: a quote inside a field; expected quotes around whole fields only, and "
                'doubled within them ("a ""b"" c")'
            )
        if len(opening):
            self._opened_in = self._line + block.count(b"\n", 0, int(opening[-1]) - 1)
        self.inside = bool((len(quotes) + self.inside) % 2)

    def end(self) -> None:
        """Take the end of the file.

        Raises
        ------
        InputError
            If a quote is left open.
        """
        if self.inside:
            raise InputError(f"{self.path}, line {self._opened_in}: a quote is opened that is never closed")


def _last_line_end(block: bytes, inside_quotes: bool) -> int:
    """Bytes of `block` up to and with its last line end outside quotes; 0 if there is none."""
    quotes, end = inside_quotes + block.count(b'"'), len(block)
    while (line_end := block.rfind(b"\n", 0, end)) >= 0:
        quotes -= block.count(b'"', line_end, end)
        if quotes % 2 == 0:
            return line_end + 1
        end = line_end
    return 0


def _parquet_chunks(path: str, chunk_bytes: int) -> list[Chunk]:
    """Make chunks of consecutive row groups, of about `chunk_bytes` each."""
    filesystem, inner = storage.open_store(path)
    try:
        with filesystem.open_input_file(inner) as file:
            metadata = pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({error})") from None
    schema = metadata.schema.to_arrow_schema()
    columns = tuple(schema.names)
    require_columns(path, columns, ("user", "item"))
    kinds = {
        name: _parquet_kind(path, name, schema.field(name).type) for name in ("user", "item", "time") if name in columns
    }
    strings = tuple(name for name, kind in kinds.items() if kind == "string")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks, start, row, rows, size = [], 0, 1, 0, 0
    for stop, group in enumerate(groups, 1):
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if size >= chunk_bytes or stop == len(groups):
            chunks.append(Chunk(path, "parquet", columns, start, stop, row, chunk_bytes, strings))
            start, row, rows, size = stop, row + rows, 0, 0
    return chunks


def _parquet_kind(path: str, column: str, kind: pa.DataType) -> Literal["integer", "string", "number", "timestamp"]:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if column == "time":
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return "number"
        if pa.types.is_timestamp(kind):
            return "timestamp"
        raise InputError(f"{path}: column time is {kind}; expected Unix seconds, as numbers, or timestamps")
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    raise InputError(f"{path}: column {column} is {kind}; expected integers or strings")


@storage.patient
def _read_parquet(chunk: Chunk, types: dict[str, pa.DataType]) -> pa.Table:
    filesystem, inner = storage.open_store(chunk.path)
    with filesystem.open_input_file(inner) as file:
        groups = list(range(chunk.start, chunk.stop))
        table = pq.ParquetFile(file).read_row_groups(groups, columns=list(types), use_threads=False)
    columns = {}
    for name, kind in types.items():
        column = table[name]
        if name == "time":
            if pa.types.is_timestamp(column.type):
                column = pc.divide(
                    column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).cast(pa.float64(), safe=False), 1e6
                )
            columns[name] = column.cast(kind, safe=False).fill_null(np.nan)
        elif kind == _TEXT:
            columns[name] = column.cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
        else:
            columns[name] = column.cast(kind)
    return pa.table(columns)


@contextmanager
def _open_bytes(chunk: Chunk) -> Iterator[pa.NativeFile]:
    """Open the chunk's CSV, decompressed."""
    filesystem, inner = storage.open_store(chunk.path)
    if chunk.kind == "stream":
        with filesystem.open_input_stream(inner, compression="detect") as stream:
            yield stream
    else:
        with filesystem.open_input_file(inner) as file:
            content = file.read_at(chunk.stop - chunk.start, chunk.start)
        # Arrow drops a byte order mark at the start of its input, but within a file the mark is part of an id.
        yield pa.BufferReader(b"\n" + content if content.startswith(codecs.BOM_UTF8) else content)


def _bad_rows(table: pa.Table) -> dict[str, np.ndarray]:
    """[N] bool by column: id missing; time missing, not finite, or too large for seconds."""
    ids = {name: table[name].combine_chunks() for name in ("user", "item")}
    bad = {name: pc.equal(each.dictionary, "").take(each.indices).to_numpy(False) for name, each in ids.items()}
    if "time" in table.column_names:
        bad["time"] = ~(np.abs(table["time"].to_numpy()) <= LARGEST_TIME)
    return bad


def _problems(chunk: Chunk) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the problem and the column of each unusable row."""
    if chunk.kind == "parquet":
        row = chunk.line
        for table in read_chunk(chunk):
            for column, mask in _bad_rows(table).items():
                for i in np.flatnonzero(mask):
                    yield f"row {row + int(i)}", _describe(column, str(table[column][int(i)])), column
            row += len(table)
        return
    with _open_bytes(chunk) as stream, io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as text:
        yield from _csv_problems(chunk, text)


def _csv_problems(chunk: Chunk, text: TextIO) -> Iterator[tuple[str, str, str]]:
    reader = csv.reader(text)
    if chunk.kind == "stream":
        next(reader)
    for fields in reader:
        where = f"line {chunk.line + reader.line_num - 1}"
        if not fields:
            continue
        if len(fields) != len(chunk.columns):
            yield where, f"{len(fields)} fields, expected {len(chunk.columns)} ({','.join(chunk.columns)})", ""
            continue
        for column, value in zip(chunk.columns, fields, strict=True):
            if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
                yield where, f"column {column} is not UTF-8 text", ""
            elif (column in ("user", "item") and not value) or (
                column == "time" and not abs(_seconds(value)) <= LARGEST_TIME
            ):
                yield where, _describe(column, value), column


def _seconds(value: str) -> float:
    """Parse a time as the reader does; NaN if the reader refuses it."""
    try:
        return float(pa.scalar(value.strip(" \t")).cast(pa.float64()).as_py())
    except pa.ArrowInvalid:
        return np.nan


def _describe(column: str, value: str) -> str:
    if column != "time":
        return f"{column} is missing"
    size = abs(_seconds(value))
    if not np.isfinite(size):
        return f"time is {value!r}; expected a finite number, in Unix seconds"
    unit = next(name for limit, name in ((1e14, "milli"), (1e17, "micro"), (np.inf, "nano")) if size <= limit)
    return f"time is {value}, which looks like {unit}seconds; expected Unix seconds"
