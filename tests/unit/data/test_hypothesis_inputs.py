"""Generated input files: each gives what the slow readers give, or one clear error.

`prepare` runs here without Ray: its tasks are called one after the other. BERT4REC_EXAMPLES sets the number of files of
each test (docs/reliability.md has a run of 10,000).
"""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import os
import re
import shutil
import tempfile
import zipfile
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bert4rec.config import DataConfig
from bert4rec.data import interactions
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.files import METADATA, Quotes
from bert4rec.errors import InputError
from tests.twins import slow_prepare
from tests.twins.slow_prepare import UnusableError
from tests.unit.data.test_prepare import items_of, prepare_module, times_of, users_of

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("local_ray_data")]

EXAMPLES = int(os.environ.get("BERT4REC_EXAMPLES", "75"))
files_of = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="BERT4REC_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def directory():
    path = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path)


def prepared(files, chunk_bytes=32 << 20, range_rows=10**6, **options):
    """The dataset of files by name as a twin, or the InputError. `options` are those of the data."""
    before = prepare_module.CHUNK_BYTES, prepare_module.RANGE_ROWS, prepare_module._SHARD_ROWS
    interactions.SAMPLE_EVERY = 4096 if range_rows > 100_000 else 3
    prepare_module.CHUNK_BYTES, prepare_module.RANGE_ROWS = chunk_bytes, range_rows
    prepare_module._SHARD_ROWS = 8192 if chunk_bytes > 10_000 else 0
    with directory() as path:
        for name, content in files.items():
            (path / name).write_bytes(content)
        data_file = next(name for name in files if name.startswith("ratings"))
        try:
            data = DataConfig(data_dir=str(path), data_file=data_file, **options)
            prepare_module.prepare(data, str(path / "out"))
        except InputError as error:
            return error
        finally:
            prepare_module.CHUNK_BYTES, prepare_module.RANGE_ROWS, prepare_module._SHARD_ROWS = before
            interactions.SAMPLE_EVERY = 4096
        dataset = PreparedDataset(str(path / "out"), verify=True)
        manifest = dataset.manifest
        twin = slow_prepare.PreparedTwin(
            users_of(dataset), items_of(dataset), manifest.num_duplicates, times_of(dataset)
        )
        assert manifest.num_interactions == sum(len(items) for _, items, _ in twin.users)
        assert manifest.num_users == len(twin.users)
        dropped = [note for note in manifest.notes if note.startswith("exact duplicates")]
        expected = f"exact duplicates of an interaction dropped: {manifest.num_duplicates:,}"
        assert dropped == [expected] * (manifest.num_duplicates > 0)
        return twin


# Ids and times as data has them, and as nobody expects them. Carriage returns alone are no line ends of any CSV writer.
PLAIN = st.characters(codec="utf-8", exclude_characters="\r\x00\x1f")
TEXT = st.one_of(
    st.text(PLAIN, min_size=1, max_size=6).filter(str.strip),
    st.sampled_from(
        [
            '"',
            '""',
            ",",
            "a\nb",
            '","',
            " a",
            "a\t",
            "a::b",
            "::",
            " 7",
            "007",
            "+1",
            "-0",
            "1e3",
            "NULL",
            "nan",
            "é",
            "用户",
            "\ufeff",
            "'",
        ]
    ),
)
INTEGERS = st.one_of(st.integers(0, 9), st.integers(-(2**63), 2**63 - 1), st.integers(2**63, 2**70)).map(str)
IDS = st.one_of(
    st.lists(st.integers(0, 9).map(str), min_size=1, max_size=6),
    st.lists(INTEGERS, min_size=1, max_size=6),
    st.lists(TEXT, min_size=1, max_size=6),
)
SECONDS = st.one_of(
    st.sampled_from(["0", "-1", "1.5", "1.25", "1e9", "-1e11", "1E-3", ".5", "7.", "-0", "946684799.9999999"]),
    st.integers(-(10**11), 10**11).map(str),
    st.floats(-1e11, 1e11, allow_nan=False).map(repr),
)
MOMENTS = st.datetimes(datetime(1000, 1, 1), datetime(5000, 1, 1))
RECENT = st.datetimes(datetime(1900, 1, 1), datetime(2100, 12, 31))
ISO = st.one_of(
    MOMENTS.map(lambda moment: moment.date().isoformat()),
    MOMENTS.map(lambda moment: moment.isoformat(st_separator(moment))),
    MOMENTS.map(lambda moment: moment.isoformat(timespec="milliseconds") + "Z"),
    MOMENTS.map(lambda moment: moment.isoformat(" ", "seconds") + " UTC"),
    MOMENTS.map(lambda moment: moment.isoformat(" ", "minutes") + "+02:00"),
    MOMENTS.map(lambda moment: moment.isoformat(timespec="seconds") + "-0930"),
    MOMENTS.map(lambda moment: moment.isoformat("T", "seconds") + "+05"),
    MOMENTS.map(lambda moment: moment.strftime("%Y%m%dT%H%M%S").zfill(15) + "Z"),
    MOMENTS.map(lambda moment: f" {moment.isoformat(timespec='milliseconds').replace('.', ',')} "),
)
TIMES = {
    "seconds": SECONDS,
    "ordinals": st.integers(0, 10**8 - 1).map(str),
    "ms": st.integers(10**11 + 1, 10**14 - 1).map(str),
    "us": st.integers(10**14 + 1, 10**17 - 100).map(str),
    "ns": st.integers(10**17 + 100, 10**20).map(str),
    "days": RECENT.map(lambda moment: moment.strftime("%Y%m%d")),
    "date": RECENT.map(lambda moment: moment.strftime("%Y%m%d%H%M%S")),
    "iso": ISO,
}


def st_separator(moment):
    return "T" if moment.second % 2 else " "


PACKED = {
    "csv": lambda content: content,
    "csv.gz": gzip.compress,
    "csv.bz2": bz2.compress,
    "csv.xz": lzma.compress,
    "csv.zip": lambda content: zipped(content),
    "csv.zst": lambda content: packed(content, "zstd"),
    "csv.lz4": lambda content: packed(content, "lz4"),
    "": bz2.compress,  # a name says nothing of the content
}


def packed(content, codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/file.csv", content)
        archive.writestr("__MACOSX/._file.csv", "x")
    return file.getvalue()


class Written(NamedTuple):
    """A valid CSV file."""

    content: bytes
    options: dict
    """What has to be said of it."""


@st.composite
def ratings_files(draw):
    """A valid CSV file, and how it is written."""
    users, items = draw(IDS), draw(IDS)
    unit = draw(st.sampled_from(["seconds", *TIMES]))
    times = draw(st.lists(TIMES[unit], min_size=1, max_size=4))
    extra = draw(st.lists(st.sampled_from(["extra", "", "user2", "a b", "extra"]), max_size=2))
    columns = draw(st.permutations(["user", "item", *["time"] * draw(st.booleans()), *extra]))
    values = {"user": users, "item": items, "time": times}
    delimiter = draw(st.sampled_from([",", ",", ";", "\t", "|", " ", "\x01", "::", "|~|"]))
    header, foreign = draw(st.booleans()) or draw(st.booleans()), draw(st.booleans())
    names = [f"{name} ID" if foreign and name in values else name for name in columns]
    own = names if header else [str(place + 1) for place in range(len(names))]
    options = {"delimiter": delimiter, "header": header}
    if foreign or not header:
        options["columns"] = {name: own[columns.index(name)] for name in values if name in columns}
    if unit in ("ms", "us", "ns", "date") and draw(st.booleans()):
        options["time_unit"] = unit
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    text = io.StringIO()
    writer = csv.writer(
        text,
        quoting=csv.QUOTE_ALL if len(delimiter) > 1 or draw(st.booleans()) else csv.QUOTE_MINIMAL,
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
        delimiter="\x1f" if len(delimiter) > 1 else delimiter,
    )
    if header:
        writer.writerow(names)
    for _ in range(draw(st.integers(1, 30))):
        writer.writerow([rng.choice(values.get(name, ["", "x", 'a,"b"\nc' * header])) for name in columns])
        if rng.random() < 0.1:
            text.write("\n")
    content = text.getvalue().replace("\x1f", delimiter)
    if draw(st.booleans()):
        content = content.rstrip("\r\n")
    has_mark = draw(st.booleans()) or content.startswith("\ufeff")  # one in front is none of an id
    return Written(content.encode("utf-8-sig" if has_mark else "utf-8"), options)


SIZES = st.one_of(st.just(32 << 20), st.integers(1, 200))


@files_of
@example(Written(b"user,item\n0,0\n", {}), "csv", 1, 1)  # no line end in the first bytes behind the header
@example(Written(b"user,item\n\xef\xbb\xbf,0\n", {}), "csv", 32 << 20, 1)  # a byte order mark as an id
@example(Written(b'\xef\xbb\xbf"user","item"\n"1","2"\n', {}), "csv", 32 << 20, 1)
@given(ratings_files(), st.sampled_from(["csv", "csv", "csv", *PACKED]), SIZES, st.integers(1, 40))
def test_valid_ratings_are_read_as_the_slow_reader_does(file, form, chunk_bytes, range_rows):
    chunk_bytes = max(chunk_bytes, 1 if form == "csv" else 400)  # a block of a stream must hold a line
    name = f"ratings.{form}".rstrip(".")
    found = prepared({name: PACKED[form](file.content)}, chunk_bytes, range_rows, **file.options)
    assert found == slow_prepare.prepared({"ratings.csv": file.content}, **file.options)


SPOILT = st.one_of(
    st.sampled_from(
        [
            b'"',
            b",",
            b"\n",
            b"\r",
            b"\r\n",
            b"\x00",
            b"\xff",
            b" ",
            b"",
            b"_",
            b"nan",
            b"inf",
            b"1e400",
            b"+",
            b"0x1",
            b"''",
        ]
    ),
    st.binary(max_size=3),
)


@st.composite
def spoilt_files(draw):
    """A valid file with some bytes replaced, removed or put in."""
    file = draw(ratings_files())
    content = bytearray(file.content)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        content[begin : begin + draw(st.integers(0, 3))] = draw(SPOILT)
    return Written(bytes(content), file.options)


def expected_of(files, **options):
    try:
        return slow_prepare.prepared(files, **options)
    except (UnusableError, csv.Error) as problem:
        return problem


@files_of
@example(
    Written(b'user,item,note\n1,2,x\n3,4,"\n5,6,x\n', {}), 32 << 20, 1
)  # a quote takes all further rows into a note
@example(Written(b'user,item\n1,5"\n2,6\n3,7\n', {}), 10, 1)
@example(Written(b'user,item,time\n1,2,"\n0"\n', {}), 32 << 20, 1)
@example(Written(b"user,item\n\n0,0\n", {}), 1, 1)  # no sampled user
@example(Written(b"\ruser,item\n0,0\n", {}), 32 << 20, 1)
@example(Written(b'""time","item","user"\n"0","0","0"\n', {}), 32 << 20, 1)
@given(spoilt_files(), SIZES, st.integers(1, 40))
def test_spoilt_ratings_are_read_rightly_or_refused(file, chunk_bytes, range_rows):
    """What the slow reader refuses is refused; what is read, is read as the slow reader does."""
    files = {"ratings.csv": file.content}
    found = prepared(files, chunk_bytes, range_rows, **file.options)
    if isinstance(found, InputError):
        assert re.match(r"\S+/ratings\.csv(, line \d+)?: [^\n]+$", str(found))
        assert str(found).isprintable()
    else:
        assert found == expected_of(files, **file.options)


RATINGS = b"user,item\n" + b"".join(b"u,%s\n" % item for item in (b"1", b"2", b"2", b"x", b"30"))
ITEMS = st.sampled_from(["1", "2", "30", "x", "unknown", '"2"', "1 "])
VALUES = {
    "years": st.one_of(st.integers(-32767, 32767).map(str), st.sampled_from(["", "1999.0", "1999.", "-0", "007"])),
    "titles": st.one_of(TEXT, st.sampled_from(['"A ""B"""', '"A" and "B"', "", '"', "a, b", " "])),
}
for _key in ("genres", "directors", "writers"):
    VALUES[_key] = st.one_of(st.sampled_from(["War", "war", "", '"War"', "Film-Noir"]), TEXT)


@st.composite
def metadata_files(draw, spoil):
    """Key, and content of a TSV file."""
    key = draw(st.sampled_from(list(METADATA)))
    columns = draw(st.permutations(["item", METADATA[key], *draw(st.sampled_from([[], ["extra"]]))]))
    values = {"item": ITEMS, METADATA[key]: VALUES[key]}
    end = draw(st.sampled_from(["\n", "\r\n"]))
    lines = ["\t".join(columns)]
    for _ in range(draw(st.integers(0, 8))):
        fields = [draw(values.get(name, st.just("x"))) for name in columns]
        lines.append("\t".join(field.replace("\t", " ").replace("\n", " ") for field in fields))
        lines += [""] * draw(st.integers(0, 1))
    content = bytearray(
        (end.join(lines) + end * draw(st.booleans())).encode("utf-8-sig" if draw(st.booleans()) else "utf-8")
    )
    for _ in range(draw(st.integers(1, 3)) if spoil else 0):
        begin = draw(st.integers(0, len(content)))
        content[begin : begin + draw(st.integers(0, 3))] = draw(SPOILT)
    return key, bytes(content)


@files_of
@given(st.data(), st.booleans())
def test_metadata_is_read_as_the_slow_reader_does_or_refused(data, spoil):
    key, content = data.draw(metadata_files(spoil))
    files = {"ratings.csv": RATINGS, f"{key}.tsv": content}
    found = prepared(files)
    if isinstance(found, InputError):
        assert re.match(rf"\S+/{key}\.tsv(, line \d+)?: [^\n]+$", str(found))
        assert spoil or isinstance(expected_of(files), Exception), found
    else:
        assert found == expected_of(files)


UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
ID_TYPES = [
    *(pa.int8(), pa.int32(), pa.int64(), pa.uint32(), pa.uint64(), pa.string(), pa.large_string()),
    *(pa.float64(), pa.float32(), pa.decimal128(38, 0), pa.decimal128(30, 3), pa.binary(), pa.large_binary()),
]
NUMBERS = [pa.int32(), pa.int64(), pa.uint32(), pa.float64()]


@st.composite
def parquet_tables(draw):
    """A table of ids and times of the types that Parquet has, nulls among them."""
    num_rows = draw(st.integers(1, 20))

    def column(kind, values):
        drawn = draw(st.lists(values, min_size=num_rows, max_size=num_rows))
        if draw(st.integers(0, 9)) == 0:
            drawn[draw(st.integers(0, num_rows - 1))] = None
        array = pa.array(drawn, kind)
        return array.dictionary_encode() if draw(st.integers(0, 3)) == 0 else array

    def ids():
        kind = draw(st.sampled_from(ID_TYPES))
        largest = {1: 2**7 - 1, 2: 2**15 - 1, 4: 2**23, 8: 2**53}.get(
            kind.bit_width // 8 if pa.types.is_primitive(kind) else 0
        )
        if pa.types.is_decimal(kind):
            return column(kind, st.integers(-(10**20), 10**20).map(Decimal))
        if largest is None:
            return column(kind, TEXT.map(str.encode) if "binary" in str(kind) else TEXT)
        largest = largest if draw(st.booleans()) else 9
        return column(kind, st.integers(0 if pa.types.is_unsigned_integer(kind) else -largest, largest))

    columns = {name: ids() for name in draw(st.permutations(["user", "item"]))}
    match draw(st.sampled_from(["none", "numbers", "timestamps", "dates", "text", "spelled"])):
        case "numbers":
            columns["time"] = column(pa.float64(), st.floats(-1e11, 1e11))
        case "spelled":
            columns["time"] = column(pa.string(), TIMES["ms"])
        case "timestamps":
            unit, zone = draw(st.sampled_from(list(UNITS))), draw(st.sampled_from([None, "UTC", "Asia/Tokyo"]))
            values = st.integers(-(2**33), 2**33).map(lambda time: time * UNITS[unit])
            columns["time"] = column(pa.timestamp(unit, zone), values)
        case "dates":
            columns["time"] = column(
                draw(st.sampled_from([pa.date32(), pa.date64()])), st.dates(max_value=date(5000, 1, 1))
            )
        case "text":
            columns["time"] = column(draw(st.sampled_from([pa.string(), pa.binary()])), ISO)
    return pa.table(columns)


@files_of
@given(parquet_tables(), st.integers(1, 5), SIZES, st.integers(1, 40))
def test_parquet_is_read_as_its_rows_say_or_refused(table, row_group_size, chunk_bytes, range_rows):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size)
    found = prepared({"ratings": sink.getvalue().to_pybytes()}, chunk_bytes, range_rows)
    if isinstance(found, InputError):
        assert re.match(r"\S+/ratings, row \d+: (user|item|time) is missing( \(|$)|.*time is \'\'", str(found))
        assert any(table[name].null_count for name in table.column_names)
        return
    columns = [[_spelled(value) for value in table[name].to_pylist()] for name in ("user", "item")]
    has_years = "time" in table.column_names
    if has_years:
        columns.append(_seconds(table["time"]))
    rows = list(zip(*columns, strict=True))
    if has_years and isinstance(rows[0][2], str):
        rows, has_years = slow_prepare.with_seconds(rows, "auto")
    kinds = [table[name].type for name in ("user", "item")]
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    are_strings = tuple("string" in str(kind) or "binary" in str(kind) for kind in kinds)
    assert found == slow_prepare.prepared_from(rows, {}, are_strings, has_years)


def _spelled(value):
    if isinstance(value, bytes):
        return value.decode().strip()
    return value.strip() if isinstance(value, str) else str(int(value))


def _seconds(times):
    """Seconds of Parquet's own times; the spelling of numbers and of text."""
    values = times.to_pylist()
    kind = times.type.value_type if pa.types.is_dictionary(times.type) else times.type
    if pa.types.is_timestamp(kind):
        plain = times.cast(kind) if pa.types.is_dictionary(times.type) else times
        return [value / UNITS[kind.unit] for value in plain.cast(pa.int64()).to_pylist()]
    if pa.types.is_date(kind):
        return [(value - date(1970, 1, 1)) / timedelta(seconds=1) for value in values]
    return [
        value.decode() if isinstance(value, bytes) else repr(value) if isinstance(value, float) else value
        for value in values
    ]


def test_the_ends_of_what_data_can_be():
    """One user with 100,000 events among users with one; one item; everyone has seen everything."""
    rng = np.random.default_rng(0)
    long = "".join(f"long,{rng.integers(3000)},{rng.integers(50_000)}\n" for _ in range(100_000))
    for rows in (
        long + "".join(f"u{i},{i},5\n" for i in range(100)),
        "".join(f"{user},9,{user % 3}\n" for user in range(50)),
        "".join(f"{user},{item},1\n" for user in range(20) for item in range(30)),
        "1,1,1\n",
    ):
        files = {"ratings.csv": b"user,item,time\n" + rows.encode()}
        assert prepared(files, 5000, 20_000) == slow_prepare.prepared(files)


@files_of
@given(st.text('",\na', max_size=30), st.integers(1, 8))
def test_quotes_are_followed_over_any_blocks(text, size):
    """What is let through is what Python's strict reader reads, with quotes nowhere in unquoted fields."""
    quotes = Quotes("file")
    try:
        for start in range(0, len(text), size):
            quotes.feed(text[start : start + size].encode())
        quotes.end()
        accepted = True
    except InputError:
        accepted = False
    field = r'(?:[^",\n]*|"(?:[^"]|"")*")'
    assert accepted == bool(re.fullmatch(rf"{field}(?:[,\n]{field})*", text))
