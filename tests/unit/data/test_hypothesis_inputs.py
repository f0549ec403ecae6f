"""Generated input files: each gives what the slow readers give, or one clear error.

`prepare` runs here without Ray: its tasks are called one after the other. BERT4REC_EXAMPLES sets the number of files of
each test (docs/reliability.md has a run of 10,000).
"""

import contextlib
import csv
import gzip
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bert4rec.config import DataConfig
from bert4rec.data import interactions
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.files import METADATA
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


def prepared(files, chunk_bytes=32 << 20, range_rows=10**6, expect=None):
    """The dataset of files by name as a twin, or the InputError."""
    before = prepare_module.CHUNK_BYTES, prepare_module.RANGE_ROWS, prepare_module._SHARD_ROWS
    interactions.SAMPLE_EVERY = 4096 if range_rows > 100_000 else 3
    prepare_module.CHUNK_BYTES, prepare_module.RANGE_ROWS = chunk_bytes, range_rows
    prepare_module._SHARD_ROWS = 8192 if chunk_bytes > 10_000 else 0
    with directory() as path:
        for name, content in files.items():
            (path / name).write_bytes(content)
        data_file = next(name for name in files if name.startswith("ratings"))
        try:
            prepare_module.prepare(DataConfig(data_dir=str(path), data_file=data_file), str(path / "out"))
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
PLAIN = st.characters(codec="utf-8", exclude_characters="\r\x00")
TEXT = st.one_of(
    st.text(PLAIN, min_size=1, max_size=6),
    st.sampled_from(
        [
            '"',
            '""',
            ",",
            "\n",
            " ",
            "a\nb",
            '","',
            "\t",
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
TIMES = st.one_of(
    st.sampled_from(["0", "-1", "1.5", "1.25", "1e9", "-1e11", "1E-3", ".5", "7.", "-0", "946684799.9999999"]),
    st.integers(-(10**11), 10**11).map(str),
    st.floats(-1e11, 1e11, allow_nan=False).map(repr),
)


@st.composite
def ratings_files(draw):
    """Name and content of a valid CSV file."""
    users, items, times = draw(IDS), draw(IDS), draw(st.lists(TIMES, min_size=1, max_size=4))
    extra = draw(st.lists(st.sampled_from(["extra", "", "user2", "a b", "extra"]), max_size=2))
    columns = draw(st.permutations(["user", "item", *["time"] * draw(st.booleans()), *extra]))
    values = {"user": users, "item": items, "time": times}
    num_rows = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    text = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer = csv.writer(text, quoting=quoting, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow(columns)
    for _ in range(num_rows):
        row = [rng.choice(values.get(name, ["", "x", 'a,"b"\nc'])) for name in columns]
        writer.writerow(row)
        if rng.random() < 0.1:
            text.write("\n")
    content = text.getvalue()
    if draw(st.booleans()):
        content = content.rstrip("\r\n")
    content = content.encode("utf-8-sig" if draw(st.booleans()) else "utf-8")
    return ("ratings.csv.gz", gzip.compress(content)) if draw(st.integers(0, 4)) == 0 else ("ratings.csv", content)


SIZES = st.one_of(st.just(32 << 20), st.integers(1, 200))


@files_of
@example(("ratings.csv", b"user,item\n0,0\n"), 1, 1)  # no line end in the first bytes behind the header
@example(("ratings.csv", b"user,item\n\xef\xbb\xbf,0\n"), 32 << 20, 1)  # a byte order mark as an id
@example(("ratings.csv", b'\xef\xbb\xbf"user","item"\n"1","2"\n'), 32 << 20, 1)
@given(ratings_files(), SIZES, st.integers(1, 40))
def test_valid_ratings_are_read_as_the_slow_reader_does(file, chunk_bytes, range_rows):
    name, content = file
    chunk_bytes = max(chunk_bytes, 400 if name.endswith(".gz") else 1)  # a block of a stream must hold a line
    found = prepared({name: content}, chunk_bytes, range_rows)
    assert found == slow_prepare.prepared({name: content})


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
    _, content = draw(ratings_files().filter(lambda file: file[0] == "ratings.csv"))
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        content[begin : begin + draw(st.integers(0, 3))] = draw(SPOILT)
    return bytes(content)


def expected_of(files):
    try:
        return slow_prepare.prepared(files)
    except (UnusableError, csv.Error) as problem:
        return problem


@files_of
@example(b'user,item,note\n1,2,x\n3,4,"\n5,6,x\n', 32 << 20, 1)  # a quote takes all further rows into a note
@example(b'user,item\n1,5"\n2,6\n3,7\n', 10, 1)
@example(b'user,item,time\n1,2,"\n0"\n', 32 << 20, 1)
@example(b"\ruser,item\n0,0\n", 32 << 20, 1)
@example(b'""time","item","user"\n"0","0","0"\n', 32 << 20, 1)
@given(spoilt_files(), SIZES, st.integers(1, 40))
def test_spoilt_ratings_are_read_rightly_or_refused(content, chunk_bytes, range_rows):
    """What the slow reader refuses is refused; what is read, is read as the slow reader does."""
    files = {"ratings.csv": content}
    found = prepared(files, chunk_bytes, range_rows)
    if isinstance(found, InputError):
        assert re.match(r"\S+/ratings\.csv(, line \d+)?: [^\n]+$", str(found))
    else:
        assert found == expected_of(files)


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
        assert spoil, found
    else:
        assert found == expected_of(files)


@st.composite
def parquet_tables(draw):
    """A table of ids and times of the types that Parquet has, nulls among them."""
    num_rows = draw(st.integers(1, 20))

    def column(kinds, values):
        kind = draw(st.sampled_from(kinds))
        limits = {1: 2**7 - 1, 2: 2**15 - 1, 4: 2**31 - 1, 8: 2**63 - 1}
        if pa.types.is_integer(kind):
            largest = limits[kind.bit_width // 8] if draw(st.booleans()) else 9
            values = st.integers(0 if pa.types.is_unsigned_integer(kind) else -largest, largest)
        drawn = draw(st.lists(values, min_size=num_rows, max_size=num_rows))
        if draw(st.integers(0, 9)) == 0:
            drawn[draw(st.integers(0, num_rows - 1))] = None
        array = pa.array(drawn, kind)
        return array.dictionary_encode() if draw(st.booleans()) and not pa.types.is_timestamp(kind) else array

    ids = [pa.int8(), pa.int32(), pa.int64(), pa.uint32(), pa.uint64(), pa.string(), pa.large_string()]
    columns = {name: column(ids, TEXT) for name in draw(st.permutations(["user", "item"]))}
    if draw(st.booleans()):
        numbers = [pa.int32(), pa.int64(), pa.uint32(), pa.float64()]
        if draw(st.booleans()):
            columns["time"] = column(numbers, st.floats(-1e11, 1e11)).cast(pa.float64(), safe=False)
        else:
            unit = draw(st.sampled_from(["s", "ms", "us", "ns"]))
            times = st.integers(-(2**33), 2**33)
            scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
            columns["time"] = column([pa.timestamp(unit)], times.map(lambda time: time * scale))
    return pa.table(columns)


@files_of
@given(parquet_tables(), st.integers(1, 5), SIZES, st.integers(1, 40))
def test_parquet_is_read_as_its_rows_say_or_refused(table, row_group_size, chunk_bytes, range_rows):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size)
    files = {"ratings.parquet": sink.getvalue().to_pybytes()}
    found = prepared(files, chunk_bytes, range_rows)
    names = ["user", "item", "time"][: len(table.column_names)]
    if isinstance(found, InputError):
        assert re.match(r"\S+/ratings\.parquet, row \d+: (user|item|time) is [^\n]+$", str(found))
        in_seconds = all(abs(time) <= 1e11 for time in _seconds(table) if time is not None)
        assert any(table[name].null_count for name in names) or not in_seconds
        return
    columns = [table["user"].to_pylist(), table["item"].to_pylist(), *([_seconds(table)] if len(names) == 3 else [])]
    kinds = [table[name].type for name in ("user", "item")]
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    are_strings = tuple(not pa.types.is_integer(kind) for kind in kinds)
    assert found == slow_prepare.prepared_from(list(zip(*columns, strict=True)), {}, are_strings)


def _seconds(table):
    if "time" not in table.column_names:
        return []
    if not pa.types.is_timestamp(table["time"].type):
        return table["time"].to_pylist()
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[table["time"].type.unit]
    return [None if time is None else time / scale for time in table["time"].cast(pa.int64()).to_pylist()]


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
    quotes = interactions._Quotes("file")
    try:
        for start in range(0, len(text), size):
            quotes.feed(text[start : start + size].encode())
        quotes.end()
        accepted = True
    except InputError:
        accepted = False
    field = r'(?:[^",\n]*|"(?:[^"]|"")*")'
    assert accepted == bool(re.fullmatch(rf"{field}(?:[,\n]{field})*", text))
