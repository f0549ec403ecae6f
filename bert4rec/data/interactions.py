"""Reads interactions files (CSV, compressed CSV, Parquet) in chunks, and checks each chunk on its own.

One large file therefore keeps all cores busy, and `prepare` finds bad rows before it writes anything. The steps:
`scan_interactions` cuts a file into chunks, `check_chunk` summarises each, `settle` decides over all of them what the
times are, and `read_chunk` reads the chunks that `settle` returns.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.config import LARGEST_TIME, DataConfig, TimeUnit
from bert4rec.data.columns import find_columns
from bert4rec.data.dataset import InputFile
from bert4rec.data.files import (
    READ_BYTES,
    Form,
    Quotes,
    first_line,
    folder_values,
    form_of,
    hash_file,
    one_byte,
    open_text,
    read_head,
    readable,
)
from bert4rec.data.ids import are_ints, like_missing, trim
from bert4rec.data.times import (
    LARGEST_NUMBER,
    UNIT_NAMES,
    date_of,
    fits,
    looks_like_a_date,
    majority,
    parse_dates,
    parse_number,
    size_of_number,
    sizes_of,
    to_seconds,
    unit_note,
    unit_of,
)
from bert4rec.errors import InputError, shown

SAMPLE_EVERY = 4096
"""Rows for each user that helps `prepare` to choose ranges of users."""
_TEXT = pa.dictionary(pa.int32(), pa.string())
_IDS = ("user", "item")


@dataclass(frozen=True)
class Chunk:
    """A part of an interactions file that a task reads on its own."""

    path: str
    kind: Literal["csv", "stream", "parquet"]
    """csv: plain CSV. stream: compressed CSV, a single chunk because it can only be read from its start. parquet."""
    columns: tuple[str, ...]
    """All columns: those of the file by their place, then those that its folders name. The ones that are read have the
    names user, item and time, whatever the file calls them; no other has these names."""
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
    names: tuple[str, ...] = ()
    """The file's own names of its columns."""
    folder: tuple[tuple[str, str], ...] = ()
    """Value of each of user, item and time that comes from the file's folders."""
    form: Form = "text"
    delimiter: str = ","
    header: bool = True
    time: Literal["number", "text", "clock"] = "number"
    """How the file has times: numbers, ISO 8601 text, or Parquet's dates and timestamps."""
    unit: TimeUnit | None = None
    """What numbers are; None until `settle` knows."""
    blanks: bool = False
    """Whether any id has blanks around it, so that ids cannot be parsed as numbers at once."""


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
    trimmed: Counter[str] = field(default_factory=Counter)
    """Number of rows whose id had blanks around it, by column."""
    like_missing: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of rows by column and an id that other programs write for a missing value, such as NULL."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Number of times that are numbers, by `times.sizes_of`."""
    span: tuple[float, float] | None = None
    """First and last time, in the file's unit."""


class Settled(NamedTuple):
    """What all chunks agree on."""

    chunks: list[Chunk]
    """The chunks to read."""
    notes: list[str]
    """Lines for the user."""
    dropped: dict[str, int]
    """Number of rows, or of files, that were changed or have nothing, by kind."""
    time_unit: str
    """What the times are, empty if there are none: a `TimeUnit`, or clock."""
    times: str
    """First and last time, for people; empty if there are none."""


def scan_interactions(
    data_dir: str, name: str, chunk_bytes: int, data: DataConfig | None = None
) -> tuple[InputFile, list[Chunk]]:
    """Return the identity of an interactions file, and its chunks of about `chunk_bytes`; none if it has no rows.

    `data` says how the file is written: columns, delimiter, header, time_unit.

    Raises
    ------
    InputError
        If it cannot be read, or its columns cannot be told.
    """
    path, data = storage.join(data_dir, name), data or DataConfig()
    with readable(path):
        form = form_of(path)
        if form == "parquet":
            return hash_file(data_dir, name), _parquet_chunks(path, name, chunk_bytes, data)
        head = read_head(path, form)
        if not head.removeprefix(codecs.BOM_UTF8).strip():
            return hash_file(data_dir, name), []
        whole, begin, has_rows = _csv_layout(path, name, head, chunk_bytes, data)
        if form == "text":
            identity, chunks = _csv_chunks(replace(whole, kind="csv"), name, begin, chunk_bytes)
            return identity, chunks if has_rows else []
        identity = hash_file(data_dir, name)
        quotes = Quotes(path, whole.delimiter, whole.line + whole.header)
        with open_text(path, form) as stream:
            stream.read(begin)
            while block := stream.read(READ_BYTES):
                quotes.feed(block)
        quotes.end()
        return identity, [replace(whole, stop=identity.size, form=form)] if has_rows else []


def _csv_layout(path: str, name: str, head: bytes, block_bytes: int, data: DataConfig) -> tuple[Chunk, int, bool]:
    """The file as one stream, the bytes before its first row, and whether there is a row."""
    if data.header:
        fields, begin = first_line(path, head, data.delimiter)
        names = fields
    else:
        begin = len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8)
        fields = next((tuple(row) for row in _sample(head[begin:], data.delimiter) if row), ())
        names = tuple(str(number) for number in range(1, len(fields) + 1))
    columns, folder = find_columns(path, names, data, folder_values(name), fields)
    chunk = Chunk(
        *(path, "stream", columns, 0, 0, 1, block_bytes),
        names=names,
        folder=folder,
        delimiter=data.delimiter,
        header=data.header,
        unit=None if data.time_unit == "auto" else data.time_unit,
    )
    if "time" in columns:
        place = columns.index("time")
        cells = (row[place] for row in _sample(head[begin:], data.delimiter) if place < len(row))
        sample = dict(folder).get("time") or next((cell for cell in cells if cell.strip()), "")
        chunk = replace(chunk, time="text" if looks_like_a_date(sample) else "number")
    return chunk, begin, bool(head[begin:].strip())


def _sample(head: bytes, delimiter: str) -> Iterator[list[str]]:
    """Rows at the beginning of a file, up to one that is broken; an error is told later, with its line."""
    text = head.decode(errors="replace").replace(delimiter, one_byte(delimiter))
    with contextlib.suppress(csv.Error):
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=one_byte(delimiter))


def read_chunk(chunk: Chunk, int_users: bool = False, int_items: bool = False) -> Iterator[pa.Table]:
    """Yield the columns user, item and, if the file has it, time, in pieces of about `block_bytes`, in file order.

    Ids are int64 if `int_users` (`int_items`), otherwise dictionary-encoded strings, with "" for a missing id. Times
    are float64: Unix seconds, with NaN for a missing time; before `settle`, numbers are in the file's unit."""
    wanted = {"user": int_users, "item": int_items}
    for table in _read(chunk, [] if chunk.blanks else [name for name in _IDS if wanted[name]]):
        columns = {}
        for name in _IDS:
            column = table[name]
            if pa.types.is_dictionary(column.type):
                cleaned, _ = _clean(chunk, column)
                column = cleaned.dictionary.cast(pa.int64()).take(cleaned.indices) if wanted[name] else cleaned
            columns[name] = column
        if "time" in chunk.columns:
            is_ready = chunk.time == "clock" or (chunk.time == "number" and chunk.unit in (None, "s", "order"))
            columns["time"] = table["time"] if is_ready else pa.array(_times(chunk, table["time"]))
        yield pa.table(columns)


def check_chunk(chunk: Chunk, sample_every: int = SAMPLE_EVERY) -> ChunkSummary:
    """Parse and check a chunk, and summarise it.

    The sample has the user of a file's first row, and of every `sample_every`-th row after it. It does not depend on
    the chunks, unless a CSV file has blank lines or line breaks within fields.

    Raises
    ------
    InputError
        If its bytes cannot be read. Errors in its rows do not raise; the summary holds them.
    """
    num_rows, error = 0, None
    place = chunk.line - 1 - (chunk.kind == "csv" and chunk.header)  # of the first row in the file
    are_int = {name: name not in chunk.strings for name in _IDS}
    items, sample = [pa.array([], pa.string())], [pa.array([], pa.string())]
    bad, trimmed, sizes = Counter[str](), Counter[str](), Counter[str]()
    missing = Counter[tuple[str, str]]()
    span = None
    try:
        with readable(chunk.path):
            for table in _read(chunk, []):
                for name in _IDS:
                    ids, count = _clean(chunk, table[name])
                    are_int[name] = are_int[name] and are_ints(ids.dictionary)
                    trimmed[name] += count
                    rows_of = np.bincount(ids.indices.to_numpy(), minlength=len(ids.dictionary))
                    for text, rows in like_missing(ids.dictionary, rows_of):
                        missing[name, text] += rows
                    bad[name] += int(rows_of[pc.equal(ids.dictionary, "").to_numpy(zero_copy_only=False)].sum())
                    if name == "item":
                        items.append(ids.dictionary)
                    else:
                        sample.append(ids[-(place + num_rows) % sample_every :: sample_every].dictionary_decode())
                if "time" in chunk.columns:
                    times = _times(chunk, table["time"])
                    usable = np.abs(times) <= (LARGEST_NUMBER if _is_open(chunk) else LARGEST_TIME)
                    bad["time"] += len(times) - int(usable.sum())
                    if _is_open(chunk):
                        sizes += sizes_of(times if usable.all() else times[usable])
                    if usable.any():
                        ends = [float(end(times[usable])) for end in (np.min, np.max)]
                        span = (min(ends[0], span[0]), max(ends[1], span[1])) if span else (ends[0], ends[1])
                num_rows += len(table)
    except pa.ArrowException as invalid:
        error = str(invalid)
    ids = pa.concat_arrays(items).unique(), pa.concat_arrays(sample)
    return ChunkSummary(num_rows, are_int["user"], are_int["item"], *ids, +bad, error, +trimmed, missing, sizes, span)


def settle(path: str, chunks_of_files: Sequence[list[Chunk]], summaries: Iterable[ChunkSummary]) -> Settled:
    """Decide over the summaries of all chunks, in their order, how to read the chunks.

    Raises
    ------
    InputError
        If a row is unusable (the error of the first such row), times are of several units, or there is no row. `path`
        names the input as a whole.
    """
    chunks, summaries = [chunk for chunks in chunks_of_files for chunk in chunks], list(summaries)
    bad, sizes, trimmed = Counter[str](), Counter[str](), Counter[str]()
    missing = Counter[tuple[str, str]]()
    for summary in summaries:
        bad, sizes, trimmed = bad + summary.bad, sizes + summary.sizes, trimmed + summary.trimmed
        missing += summary.like_missing
    for chunk, summary in zip(chunks, summaries, strict=True):
        if summary.error or summary.bad:
            raise explain(chunk, summary, bad)
    if not sum(summary.num_rows for summary in summaries):
        raise InputError(f"{path}: no data rows; empty, or nothing below the header; expected user,item[,time] rows")
    unit = unit_of(sizes)
    if unit is None:
        most = majority(sizes)
        others = {size for size in sizes if not fits(size, most)}
        for chunk, summary in zip(chunks, summaries, strict=True):
            if others & set(summary.sizes):
                raise explain(chunk, summary, Counter(time=sum(sizes[size] for size in others)), most)
    settled = [replace(chunk, unit=chunk.unit or unit or "s", blanks=chunk.blanks or bool(trimmed)) for chunk in chunks]
    notes, dropped = [], {}
    if num_empty := sum(not chunks for chunks in chunks_of_files):
        dropped["empty files"] = num_empty
        notes.append(f"files without rows: {num_empty:,}")
    for name, count in sorted(trimmed.items()):
        dropped[f"{name} ids with blanks around them, trimmed"] = count
        notes.append(f"blanks around {name} ids removed, in rows: {count:,}")
    for (name, text), count in sorted(missing.items()):
        notes.append(
            f"{name} {text!r} in {count:,} rows is taken as an id like any other; if it means that the id is missing, "
            "remove these rows"
        )
    if note := unit_note(unit, sizes):
        notes.append(note)
    spans = [
        tuple(to_seconds(np.array(summary.span), unit or "s") if _is_open(chunk) else summary.span)
        for chunk, summary in zip(chunks, summaries, strict=True)
        if summary.span
    ]
    has_time = any("time" in chunk.columns for chunk in chunks)
    found = next((chunk.unit or "s" for chunk in settled if chunk.time == "number"), "clock") if has_time else ""
    times = ""
    if spans:
        low, high = min(low for low, _ in spans), max(high for _, high in spans)
        times = f"{low:,.12g} to {high:,.12g}" if found == "order" else f"{date_of(low)} to {date_of(high)} UTC"
    return Settled(settled, notes, dropped, found, times)


def year_of(seconds: np.ndarray) -> np.ndarray:
    """[N] int16, UTC calendar year of Unix seconds."""
    year: np.ndarray = np.floor(seconds).astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970
    return year.astype(np.int16)


def explain(chunk: Chunk, summary: ChunkSummary, bad: Counter[str], most: TimeUnit | None = None) -> InputError:
    """Make the error for the first unusable row of a chunk. `bad` counts such rows in all chunks. `most`, if
    given, is the unit of most times, and the row to find has a time that does not fit it.

    This reads row by row in Python, which is slow but happens only for a broken file.
    """
    with readable(chunk.path):
        for where, problem, column in _problems(chunk, most):
            count = f" ({bad[column]:,} rows with an unusable {column} in all)" if bad[column] > 1 else ""
            return InputError(f"{chunk.path}, {where}: {problem}{count}")
    reason = shown(" ".join(str(summary.error).split()), 300)
    return InputError(f"{chunk.path}: not readable as {'Parquet' if chunk.kind == 'parquet' else 'CSV'} ({reason})")


def _is_open(chunk: Chunk) -> bool:
    """Whether `settle` has yet to say what the chunk's numbers are."""
    return chunk.time == "number" and chunk.unit is None


def _csv_chunks(whole: Chunk, name: str, begin: int, chunk_bytes: int) -> tuple[InputFile, list[Chunk]]:
    """Hash the file and cut it at line ends outside quotes, that is, after an even number of quotes (RFC 4180)."""
    filesystem, inner = storage.open_store(whole.path)
    digest, chunks = hashlib.sha256(), []
    position, line = 0, 1  # of the block's start
    start, start_line = begin, 1 + whole.header
    quotes = Quotes(whole.path, whole.delimiter, start_line)

    def chunk(stop: int) -> Chunk:
        # The block is the whole chunk, so that a line fits, however long it is.
        return replace(whole, start=start, stop=stop, line=start_line, block_bytes=stop - start)

    with filesystem.open_input_stream(inner, compression=None) as stream:
        while block := stream.read(min(READ_BYTES, chunk_bytes)):
            digest.update(block)
            was_inside = quotes.inside
            quotes.feed(block[max(begin - position, 0) :])
            if position + len(block) - start >= chunk_bytes:
                cut = _last_line_end(block, was_inside)
                if cut and position + cut > start:
                    chunks.append(chunk(position + cut))
                    start, start_line = position + cut, line + block.count(b"\n", 0, cut)
            position, line = position + len(block), line + block.count(b"\n")
    quotes.end()
    if start < position:
        chunks.append(chunk(position))
    return InputFile(name=name, size=position, sha256=digest.hexdigest()), chunks


def _last_line_end(block: bytes, inside_quotes: bool) -> int:
    """Bytes of `block` up to and with its last line end outside quotes; 0 if there is none."""
    quotes, end = inside_quotes + block.count(b'"'), len(block)
    while (line_end := block.rfind(b"\n", 0, end)) >= 0:
        quotes -= block.count(b'"', line_end, end)
        if quotes % 2 == 0:
            return line_end + 1
        end = line_end
    return 0


def _parquet_chunks(path: str, name: str, chunk_bytes: int, data: DataConfig) -> list[Chunk]:
    """Make chunks of consecutive row groups, of about `chunk_bytes` each."""
    filesystem, inner = storage.open_store(path)
    with filesystem.open_input_file(inner) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: not a Parquet file, or a damaged one ({shown(str(error), 300)})") from None
        schema, metadata = parquet.schema_arrow, parquet.metadata
        columns, folder = find_columns(path, tuple(schema.names), data, folder_values(name))
        types = {role: schema.field(place).type for place, role in enumerate(columns[: len(schema.names)])}
        strings = tuple(role for role in _IDS if role in types and _is_string(path, role, types[role]))
        time = _time_kind(path, types["time"]) if "time" in types else "text"
        if time == "text":
            sample = dict(folder).get("time", "")
            if "time" in types:
                sample = _first_of(parquet, schema.names[columns.index("time")])
            time = "text" if looks_like_a_date(sample) else "number"
    whole = Chunk(
        *(path, "parquet", columns, 0, 0, 1, chunk_bytes),
        strings=strings,
        names=tuple(schema.names),
        folder=folder,
        time=time,
        unit=None if data.time_unit == "auto" else data.time_unit,
    )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks, start, row, rows, size = [], 0, 1, 0, 0
    for stop, group in enumerate(groups, 1):
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if size >= chunk_bytes or stop == len(groups):
            chunks.append(replace(whole, start=start, stop=stop, line=row))
            start, row, rows, size = stop, row + rows, 0, 0
    return chunks if metadata.num_rows else []


def _first_of(parquet: pq.ParquetFile, name: str) -> str:
    """The first value of a column of text; empty if there is none."""
    for batch in parquet.iter_batches(1024, columns=[name]):
        if len(values := batch.column(0).drop_null()):
            return str(values.cast(pa.string())[0].as_py())
    return ""


def _is_string(path: str, role: str, kind: pa.DataType) -> bool:
    """Whether a Parquet column has ids that are strings, and not integers."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _is_text(kind):
        return True
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return False
    raise InputError(f"{path}: column {role} is {kind}; expected integers or strings")


def _time_kind(path: str, kind: pa.DataType) -> Literal["number", "text", "clock"]:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _is_text(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "clock"
    raise InputError(f"{path}: column time is {kind}; expected numbers, ISO 8601 text, dates or timestamps")


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
        )
    )


def _read(chunk: Chunk, ints: list[str]) -> Iterator[pa.Table]:
    """Yield user and item, as they are spelled or, in `ints`, as int64, and time: numbers, text, or Unix seconds."""
    types = {name: pa.int64() if name in ints else _TEXT for name in _IDS}
    if "time" in chunk.columns:
        types["time"] = pa.string() if chunk.time == "text" else pa.float64()
    own = [name for name in types if name not in dict(chunk.folder)]
    tables = _read_parquet(chunk, types, own) if chunk.kind == "parquet" else _read_csv(chunk, types, own)
    for table in tables:
        for name, value in chunk.folder:
            column = pa.repeat(pa.scalar(value), len(table))
            column = column.dictionary_encode() if name in _IDS else column.cast(types[name])
            table = table.append_column(name, column)
        yield table


def _read_csv(chunk: Chunk, types: dict[str, pa.DataType], own: list[str]) -> Iterator[pa.Table]:
    # Only the wanted columns keep their names, because the names of other columns may repeat.
    names = [name if name in own else f"column {i}" for i, name in enumerate(chunk.columns[: len(chunk.names)])]
    with _open_bytes(chunk) as stream:
        reader = pacsv.open_csv(
            stream,
            pacsv.ReadOptions(
                use_threads=False,
                block_size=chunk.block_bytes,
                skip_rows=int(chunk.kind == "stream" and chunk.header),
                column_names=names,
            ),
            pacsv.ParseOptions(delimiter=one_byte(chunk.delimiter), newlines_in_values=True),
            pacsv.ConvertOptions(column_types={name: types[name] for name in own}, include_columns=own, null_values=[]),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _read_parquet(chunk: Chunk, types: dict[str, pa.DataType], own: list[str]) -> Iterator[pa.Table]:
    table = _parquet_rows(chunk)
    columns = {}
    for name in own:
        column, kind = table[name], table[name].type
        if pa.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if name == "time":
            columns[name] = _parquet_times(chunk, column)
            continue
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), None, column).cast(pa.int64())
        elif pa.types.is_decimal(kind):
            column = column.cast(pa.decimal256(76, 0)).cast(pa.string())
        elif pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
            column = column.cast(pa.binary())
        if types[name] == _TEXT:
            columns[name] = column.cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
        else:
            columns[name] = column.cast(types[name])
    yield pa.table(columns)


def _parquet_times(chunk: Chunk, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if chunk.time == "text":
        return column.cast(pa.binary() if pa.types.is_binary_view(kind) else kind).cast(pa.string()).fill_null("")
    if chunk.time == "clock":
        unit, per_second = ("ms", 1e3) if pa.types.is_date(kind) else ("us", 1e6)
        moments = column.cast(pa.timestamp(unit), safe=False).cast(pa.int64()).cast(pa.float64(), safe=False)
        column = pc.divide(moments, per_second)
    elif _is_text(kind):
        column = column.cast(pa.string())
    return column.cast(pa.float64(), safe=False).fill_null(np.nan)


@storage.patient
def _parquet_rows(chunk: Chunk) -> pa.Table:
    """The chunk's columns user, item and time that are in the file, as the file has them."""
    own = {role: place for place, role in enumerate(chunk.columns[: len(chunk.names)]) if role in (*_IDS, "time")}
    filesystem, inner = storage.open_store(chunk.path)
    with filesystem.open_input_file(inner) as file:
        groups, names = list(range(chunk.start, chunk.stop)), [chunk.names[place] for place in own.values()]
        table = pq.ParquetFile(file).read_row_groups(groups, columns=names, use_threads=False)
    return table.select(names).rename_columns(list(own))


@contextmanager
def _open_bytes(chunk: Chunk) -> Iterator[pa.NativeFile]:
    """Open the chunk's CSV, decompressed and with one-byte delimiters."""
    if chunk.kind == "stream":
        with open_text(chunk.path, chunk.form) as stream:
            is_long = len(chunk.delimiter) > 1
            yield pa.TransformInputStream(stream, _Replacing(chunk.delimiter)) if is_long else stream
        return
    filesystem, inner = storage.open_store(chunk.path)
    with filesystem.open_input_file(inner) as file:
        content = file.read_at(chunk.stop - chunk.start, chunk.start)
    if len(chunk.delimiter) > 1:
        content = content.replace(chunk.delimiter.encode(), one_byte(chunk.delimiter).encode())
    # Arrow drops a byte order mark at the start of its input, but within a file the mark is part of an id.
    yield pa.BufferReader(b"\n" + content if content.startswith(codecs.BOM_UTF8) else content)


class _Replacing:
    """Replaces a delimiter of several bytes in a stream, block by block."""

    def __init__(self, delimiter: str) -> None:
        self.long, self.short, self.rest = delimiter.encode(), one_byte(delimiter).encode(), b""

    def __call__(self, block: bytes) -> bytes:
        """The next bytes; an empty block ends the stream."""
        *whole, last = (self.rest + bytes(block)).split(self.long)
        begun = [size for size in range(1, len(self.long)) if last.endswith(self.long[:size])]
        kept = max(begun, default=0) if block else 0
        self.rest = last[len(last) - kept :]
        return self.short.join([*whole, last[: len(last) - kept]])


def _clean(chunk: Chunk, column: pa.ChunkedArray | pa.Array) -> tuple[pa.DictionaryArray, int]:
    """Ids without blanks around them, and the number of rows that had some."""
    ids = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if len(chunk.delimiter) > 1 and chunk.kind != "parquet":  # in a quoted field it is no delimiter
        spelled = pc.replace_substring(ids.dictionary, one_byte(chunk.delimiter), chunk.delimiter)
        ids = pa.DictionaryArray.from_arrays(ids.indices, spelled)
    return trim(ids)


def _times(chunk: Chunk, column: pa.ChunkedArray) -> np.ndarray:
    """[N] float64 times: Unix seconds, or, before `settle`, numbers in the file's unit."""
    if chunk.time == "text":
        return parse_dates(column)
    times: np.ndarray = column.to_numpy()
    return times if chunk.unit is None or chunk.time == "clock" else to_seconds(times, chunk.unit)


def _problems(chunk: Chunk, most: TimeUnit | None) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the problem and the column of each unusable row."""
    for column, value in chunk.folder:
        if problem := _problem(chunk, column, value, most):
            yield "its folders", problem, column
    if chunk.kind == "parquet":
        table = _parquet_rows(chunk)
        if chunk.time == "clock" and "time" in table.column_names:  # as text, because Python's own end in 9999
            place, times = table.column_names.index("time"), table["time"]
            kind = times.type.value_type if pa.types.is_dictionary(times.type) else times.type
            moments = times.cast(kind).cast(pa.timestamp("ms"), safe=False).cast(pa.string())
            table = table.set_column(place, "time", moments)
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        for number, row in enumerate(rows, chunk.line):
            for column, value in zip(table.column_names, row, strict=True):
                if problem := _problem(chunk, column, value, most):
                    yield f"row {number}", problem, column
        return
    with _open_bytes(chunk) as stream, io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as text:
        yield from _csv_problems(chunk, text, most)


def _csv_problems(chunk: Chunk, text: TextIO, most: TimeUnit | None) -> Iterator[tuple[str, str, str]]:
    reader = csv.reader(text, delimiter=one_byte(chunk.delimiter))
    if chunk.kind == "stream" and chunk.header:
        next(reader)
    for fields in reader:
        where = f"line {chunk.line + reader.line_num - 1}"
        if not fields:
            continue
        if len(fields) != len(chunk.names):
            expected = shown(chunk.delimiter.join(chunk.names), 300)
            yield where, f"{len(fields)} fields, expected {len(chunk.names)} ({expected})", ""
            continue
        for column, value in zip(chunk.columns, fields, strict=False):
            if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
                yield where, f"column {column} is not UTF-8 text", ""
            elif problem := _problem(chunk, column, value, most):
                yield where, problem, column


def _problem(
    chunk: Chunk,
    column: str,
    value: Any,  # noqa: ANN401 - a value of a CSV or Parquet file
    most: TimeUnit | None,
) -> str:
    """What is wrong with a value; empty if nothing is."""
    if column in _IDS:
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                return f"{column} is {shown(repr(value))}; expected UTF-8 text"
        if value is None or value != value or not str(value).strip():
            return f"{column} is missing"
        if isinstance(value, float | Decimal) and value != int(value):
            return f"{column} is {value}; expected whole numbers or text"
        return ""
    if column != "time":
        return ""
    if chunk.time == "clock":
        is_near = value is not None and -1199 < int(re.match(r"-?\d+", value)[0]) < 5138  # type: ignore[index]
        return "time is missing" if value is None else "" if is_near else f"time is {value}; expected one before 5138"
    value = "" if value is None else value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return _time_problem(chunk, value, most)


def _time_problem(chunk: Chunk, value: str, most: TimeUnit | None) -> str:
    text = shown(repr(value))
    if chunk.time == "text":
        try:
            parse_dates(pa.chunked_array([[value]], pa.string()))
        except pa.ArrowInvalid:
            return f"time is {text}; expected an ISO 8601 date or time such as 2024-01-31T23:59:59Z, as in other rows"
        return ""
    number = parse_number(value)
    if not np.isfinite(number):
        return f"time is {text}; expected a finite number, such as Unix seconds"
    if chunk.unit is None:
        if abs(number) > LARGEST_NUMBER:
            return f"time is {text}; expected a number of at most {LARGEST_NUMBER:g}"
        if most and not fits(own := size_of_number(number), most):
            return (
                f"time is {text}, which looks like {own}, but most times look like {UNIT_NAMES[most]}; data.time_unit "
                "says what all of them are"
            )
        return ""
    if not abs(to_seconds(np.array([number]), chunk.unit)[0]) <= LARGEST_TIME:
        expected = "a date such as 20240131" if chunk.unit == "date" else "a time before the year 5138"
        return f"time is {text}; expected {expected} (data.time_unit={chunk.unit})"
    return ""
