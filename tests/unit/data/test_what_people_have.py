"""Logs as people have them: each kind of file, with its right content or one clear error or note."""

import bz2
import gzip
import io
import lzma
import os
import zipfile
from datetime import UTC, date, datetime
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

from bert4rec.config import DataConfig
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.files import find_interactions
from bert4rec.data.prepare import prepare
from bert4rec.errors import InputError
from tests.unit.data.test_prepare import items_of, users_of

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("local_ray_data")]

ML = {"user": "userId", "item": "movieId", "time": "timestamp"}
DAY = 86_400
T0 = 1_700_006_400  # 2023-11-15 00:00:00 UTC


@pytest.fixture
def run(tmp_path):
    """Prepare files by name, text, bytes or tables; the dataset and the lines that were printed."""

    def prepared(files, data_file="ratings.csv", **options):
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, pa.Table):
                pq.write_table(content, path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        lines = []
        data = DataConfig(data_dir=str(tmp_path / "data"), data_file=data_file, **options)
        prepare(data, str(tmp_path / "out"), lines.append)
        dataset = PreparedDataset(str(tmp_path / "out"))
        manifest = dataset.manifest
        return SimpleNamespace(
            users=users_of(dataset), items=items_of(dataset), lines=lines, manifest=manifest, dataset=dataset
        )

    return prepared


def fails(run, *arguments, words, **options):
    with pytest.raises(InputError) as raised:
        run(*arguments, **options)
    message = str(raised.value)
    assert message.isprintable()
    for word in [words] if isinstance(words, str) else words:
        assert word in message
    return message


# 1: other names


@pytest.mark.parametrize(
    ("delimiter", "sign"),
    [(",", ","), ("tab", "\t"), (r"\t", "\t"), (";", ";"), ("|", "|"), ("::", "::"), (r"\x01", "\x01")],
)
def test_other_names_and_separators(run, delimiter, sign):
    rows = [
        ["userId", "movieId", "rating", "timestamp"],
        ["7", "50", "4.5", f"{T0 + 2}"],
        ["7", "60", "3", f"{T0 + 1}"],
    ]
    text = "\n".join(sign.join(row) for row in rows)
    assert run({"ratings.csv": text}, columns=ML, delimiter=delimiter).users == [(7, [60, 50], 2023)]
    headless = "\n".join(sign.join(row) for row in rows[1:])
    numbered = {"user": "1", "item": "2", "time": "4"}
    assert run({"ratings.csv": headless}, columns=numbered, delimiter=delimiter, header=False).users == [
        (7, [60, 50], 2023)
    ]


def test_a_long_separator_in_a_compressed_file_and_in_quotes(run):
    rows = "".join(f'{user}::"a::b{user % 3}"::{T0 + user}\n' for user in range(15_000))
    found = run(
        {"ratings.gz": gzip.compress(rows.encode())},
        "ratings.gz",
        delimiter="::",
        header=False,
        columns={"user": "1", "item": "2", "time": "3"},
    )
    assert found.users[14_999] == (14_999, ["a::b2"], 2023)
    assert [item[:2] for item in found.items] == [("a::b0", 5000), ("a::b1", 5000), ("a::b2", 5000)]


@pytest.mark.parametrize(
    "name",
    [
        "timestamp",
        "ts",
        "date",
        "Time",
        "unixReviewTime",
        "timestamp:float",
        "event_time",
        "createdAt",
        "reviewDate",
        "datetime",
    ],
)
def test_a_time_that_nothing_reads_is_named(run, name):
    files = {"ratings.csv": f"user,item,{name}\n1,5,{T0}\n1,6,{T0 - 1}\n"}
    fails(run, files, words=["ratings.csv: no column time", name, f'data.columns="{{time: {name}}}"', "time: null"])
    assert run(files, columns={"time": name}).users == [(1, [6, 5], 2023)]
    assert run(files, columns={"time": None}).users == [(1, [5, 6], None)]


@pytest.mark.parametrize("name", ["release_date", "runtime", "watch_time", "rating", "updates", "birthDate", "what"])
def test_other_columns_are_no_times(run, name):
    assert run({"ratings.csv": f"user,item,{name}\n1,5,3\n"}).users == [(1, [5], None)]


def test_hints_name_the_option(run):
    for text, words in {
        "userId,movieId,timestamp\n1,2,4\n": '; perhaps data.columns="{user: userId, item: movieId, time: timestamp}"',
        "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n": [
            "set data.delimiter=tab",
            "{user: user_id:token, item: item_id:token, time: timestamp:float}",
        ],
        "user;item;time\n1;2;3\n": "data.delimiter=';'",
        "1::1193::5::978300760\n": ["data.delimiter='::'", "data.header=false", "{user: 1, item: 2, time: 4}"],
        "196\t242\t3\t881250949\n": ["data.delimiter=tab", "data.header=false"],
        "1,2,3\n4,5,6\n": ["a row of numbers", "data.header=false"],
        '{"user": 1, "item": 2}\n': "looks like JSON",
        "a,b\n1,2\n": "data.columns names other columns",
    }.items():
        fails(
            run, {"ratings.csv": text}, words=["no column user; found", *([words] if isinstance(words, str) else words)]
        )
    fails(
        run,
        {"ratings.csv": "1,2\n"},
        header=False,
        columns={"user": "1", "item": "3"},
        words="without a header, columns have numbers",
    )


@pytest.mark.parametrize("column", ["time", "user"])
def test_doubled_columns(run, column):
    names = ["user", "item", "time", column]
    fails(run, {"ratings.csv": ",".join(names) + "\n1,2,3,4\n"}, words=f"more than one column {column}")
    table = pa.Table.from_arrays([pa.array([1])] * 4, names=names)
    fails(run, {"r": table}, "r", words=f"more than one column {column}")


def test_parquet_has_other_names_too(run):
    table = pa.table({"userId": [1, 1], "time": ["x", "y"], "movieId": [5, 6], "timestamp": [T0 + 1, T0]})
    assert run({"r": table}, "r", columns=ML).users == [(1, [6, 5], 2023)]
    fails(
        run,
        {"r": table.drop_columns("time")},
        "r",
        columns={"user": "userId", "item": "movieId"},
        words="{user: userId, item: movieId, time: timestamp}",
    )


# 2: dates


@pytest.mark.parametrize(
    ("early", "late", "year"),
    [
        ("2023-12-31", "2024-01-01", 2024),
        ("2023-12-31 23:59:59", "2024-01-01T00:00:00", 2024),
        ("2024-01-01T00:30:00+01:00", "2023-12-31T23:45:00Z", 2023),
        ("2023-12-31 23:59:59.999 UTC", "2024-01-01 00:00:00.123456789 UTC", 2024),
        ("20231231T235959Z", "20240101T000000Z", 2024),
        ("2023-12-31T22:00:00-01:30[America/Nowhere]", "2023-12-31t23:45z", 2023),
        ("1700006400000", "1731628800000", 2024),
        ("1700006400000000", "1731628800000000", 2024),
        ("1700006400000000000", "1731628800000000000", 2024),
        ("20231231", "20240101", 2024),
        ("20231231235959", "20240101000000", 2024),
        ("-0.5", "1e8", 1973),
    ],
)
def test_times_as_people_write_them(run, early, late, year):
    found = run({"ratings.csv": f"user,item,time\n1,5,{late}\n1,6,{early}\n"})
    assert found.users == [(1, [6, 5], year)]
    says = [note for note in found.manifest.notes if note.startswith("times are")]
    assert len(says) == (early.isdigit())
    assert f"{year}" in found.lines[1]


def test_what_was_found_is_said(run):
    found = run({"ratings.csv": f"user,item,time\n1,5,{1000 * T0}\n2,6,{1000 * (T0 + DAY) + 5}\n"})
    assert found.lines[1] == "times: 2023-11-15 00:00:00 to 2023-11-16 00:00:00 UTC"
    assert (
        "times are milliseconds since 1970, by their size; data.time_unit=ms says so for certain"
        in found.manifest.notes
    )
    assert found.manifest.time_unit == "ms"
    assert found.dataset.manifest.time_origin == T0


@pytest.mark.parametrize("unit", ["auto", "order"])
def test_ordinals_are_an_order_without_years(run, unit):
    files = {
        "ratings.csv": "user,item,time\n1,5,2\n1,6,1\n2,7,3\n",
        "years.tsv": "item\tyear\n5\t1999\n6\t2001\n7\t1995\n",
    }
    found = run(files, time_unit=unit)
    assert found.users == [(1, [6, 5], None), (2, [7], None)]
    assert found.lines[1] == "times: 1 to 3"
    assert any(note.startswith("WARNING times are numbers below") for note in found.manifest.notes) == (unit == "auto")
    assert run(files, time_unit="s").users == [(1, [6, 5], 1970), (2, [7], 1970)]


def test_a_given_unit_is_taken_and_checked(run):
    files = {"ratings.csv": "user,item,time\n1,5,1700000000\n1,6,0\n1,7,1600000000000\n"}
    fails(
        run,
        files,
        words=["line 4: time is '1600000000000', which looks like milliseconds, but most times look like seconds"],
    )
    assert run(files, time_unit="ms").users == [(1, [6, 5, 7], 2020)]
    fails(
        run,
        files,
        time_unit="date",
        words="line 2: time is '1700000000'; expected a date such as 20240131 (data.time_unit=date)",
    )
    fails(run, files, time_unit="s", words="line 4: time is '1600000000000'; expected a time before the year 5138")
    fails(run, {"ratings.csv": "user,item,time\n1,5,20230230\n"}, time_unit="date", words="'20230230'; expected a date")


def test_dates_that_are_none(run):
    for text in ("2024-13-01", "2023-02-29", "31.12.2023", "2023-12-31 25:00", "2024-01-01 10:00 CET"):
        files = {"ratings.csv": f"user,item,time\n1,5,2023-12-31\n1,6,{text}\n1,6,2023-12-30\n"}
        fails(run, files, words=f"line 3: time is '{text}'; expected an ISO 8601 date")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([date(2023, 12, 31), date(2022, 1, 1)], pa.date32()),
        pa.array([date(2023, 12, 31), date(2022, 1, 1)], pa.date64()),
        *(
            pa.array([datetime(2023, 12, 31, tzinfo=UTC), datetime(2022, 1, 1, tzinfo=UTC)], pa.timestamp(unit, zone))
            for unit in ("s", "ms", "us", "ns")
            for zone in (None, "UTC", "Asia/Tokyo")
        ),
        pa.array(["2023-12-31T23:00:00Z", "2022-01-01"]),
        pa.array([b"1704063600000", b"1640995200000"]),
        pa.array([Decimal(1704063600), Decimal(1640995200)], pa.decimal128(38, 0)),
        pa.array([20231231, 20220101], pa.int32()),
    ],
    ids=lambda values: str(values.type),
)
def test_times_of_parquet(run, values):
    table = pa.table({"user": [1, 1], "item": [5, 6], "time": values})
    assert run({"r": table}, "r").users == [(1, [6, 5], 2023)]
    fails(
        run,
        {"r": pa.table({"user": [1], "item": [2], "time": pa.nulls(1, values.type)})},
        "r",
        words=["row 1: time is"],
    )
    fails(run, {"r": table.set_column(2, "time", pa.array([[1], [2]]))}, "r", words="column time is list")


# 3: what Spark and warehouses write


def test_a_folder_stands_for_its_parts(run):
    part = "user,item,time\n{},{},{}\n"
    files = {
        "log/year=2023/part-00000.csv": part.format(1, 5, T0 + 9),
        "log/year=2024/part-00000.csv.gz": gzip.compress(part.format(1, 6, T0 + 5).encode()),
        "log/year=2024/part-00001.csv": "",
        "log/year=2024/part-00002.csv": "user,item,time\n",
        "log/_SUCCESS": "",
        "log/.part-00000.csv.crc": b"\x00\x01",
        "log/_temporary/0/part-00000.csv": part.format(8, 8, 8),
    }
    for data_file in (
        "log",
        "log/",
        "log/*",
        "log/**",
        "l*/year=*/part-*",
        "**/part-*",
        "log/**/*.csv*",
        "log/*/part-0000[0-2].csv*",
    ):
        found = run(files, data_file)
        assert found.users == [(1, [6, 5], 2023)], data_file
        assert found.manifest.dropped == {"empty files": 2}
        assert "files without rows: 2" in found.manifest.notes
    assert run(files, "log/*/*0.csv").users == [(1, [5], 2023)]
    assert run(files, "log/_temporary", time_unit="s").users == [(8, [8], 1970)]
    fails(run, files, "log/*.parquet", words="no such file; the directory holds")
    fails(run, files, "log/year=2024/part-0000[12].csv", words="no data rows")


def test_a_name_with_a_pattern_in_it(run):
    assert run({"a[1]*.csv": "user,item\n1,2\n", "a1b.csv": "user,item\n3,4\n"}, "a[1]*.csv").users == [(1, [2], None)]


def test_patterns_see_each_file_once(tmp_path):
    for name in ("a/b/c/x.csv", "a/x.csv", "x.csv", "a/b/.x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_interactions(str(tmp_path), "**/x.csv") == ["a/b/c/x.csv", "a/x.csv", "x.csv"]
    assert find_interactions(str(tmp_path), "a/**/*") == ["a/b/c/x.csv", "a/x.csv"]
    assert find_interactions(str(tmp_path), "a") == ["a/b/c/x.csv", "a/x.csv"]
    assert find_interactions(str(tmp_path / "a"), "../x.csv") == ["../x.csv"]
    assert find_interactions(str(tmp_path), "a/b/.x.csv") == ["a/b/.x.csv"]


def test_folders_give_columns(run):
    files = {
        "log/date=2023-12-31/user=a%20b/part.csv": "item\n5\n6\n",
        "log/date=2023-12-30/user=a%20b/part": pa.table({"item": [7]}),
        "log/date=2022-01-01/user=7/part.csv": "item\n6\n",
    }
    fails(run, files, "log", words="no column time, but column date")
    found = run(files, "log", columns={"time": "date"})
    assert found.users == [("7", [6], 2022), ("a b", [7, 5, 6], 2023)]
    del files["log/date=2023-12-31/user=a%20b/part.csv"], files["log/date=2023-12-30/user=a%20b/part"]
    assert run(files, "log/date=2022*", columns={"time": "date"}).users == [(7, [6], 2022)]
    files = {"other/user=__HIVE_DEFAULT_PARTITION__/part.csv": "item\n6\n"}
    fails(run, files, "other", words="its folders: user is missing")


CSV = b"user,item\n1,5\n2,6\n"


def packed(codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(CSV)
    return sink.getvalue().to_pybytes()


def zipped(*names, content=CSV):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("name", ["ratings", "ratings.csv", "ratings.gz", "ratings.parquet"])
@pytest.mark.parametrize(
    "content",
    [
        *(CSV, gzip.compress(CSV), gzip.compress(CSV[:14]) + gzip.compress(CSV[14:]), bz2.compress(CSV)),
        *(lzma.compress(CSV), packed("zstd"), packed("lz4"), zipped("a/b.csv", "__MACOSX/._b.csv")),
        pa.table({"user": [1, 2], "item": [5, 6]}),
    ],
    ids=["text", "gzip", "gzips", "bz2", "xz", "zstd", "lz4", "zip", "parquet"],
)
def test_the_content_says_what_a_file_is(run, name, content):
    assert run({name: content}, name).users == [(1, [5], None), (2, [6], None)]


def orc():
    sink = pa.BufferOutputStream()
    pyarrow.orc.write_table(pa.table({"user": [1], "item": [2]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (orc(), "an ORC file; expected CSV in UTF-8"),
        (b"Obj\x01\x04\x16avro", "an Avro file"),
        ("user,item\n1,2\n".encode("utf-16"), "UTF-16 text"),
        (zipped("a.csv", "b.csv"), "a zip archive that holds 2 files"),
        (zipped(), "line 1: not text"),
        (gzip.compress(gzip.compress(CSV)), "a gzip file inside of gzip"),
        (lzma.compress(CSV)[:-20], "cannot be read"),
        (bz2.compress(CSV)[:-5], "cannot be read"),
        (zipped("a.csv")[:-30], "cannot be read"),
        (b"\x1b[2J\x00\x07user,item\n", "line 1: not text; it begins with b'\\x1b[2J"),
        (b"\x1b[2Juser,item\n1,2\n", "no column user; found \\x1b[2Juser, item"),
        (b"user,item,time\n1,\x1b[2J,\x1b[2J\n", "line 2: time is '\\x1b[2J'"),
        (b"user,item\n1,\x1b[2J,5\n", "line 2: 3 fields"),
    ],
)
def test_what_cannot_be_read_is_named_and_moves_no_terminal(run, content, words):
    fails(run, {"ratings": content}, "ratings", words=words)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([Decimal(7), Decimal(9)], pa.decimal128(38, 0)),
        pa.array([Decimal("7.00"), Decimal("9.00")], pa.decimal128(10, 2)),
        pa.array([7.0, 9.0], pa.float64()),
        pa.array([7.0, 9.0], pa.float32()),
        pa.array([7, 9], pa.uint64()).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_ids_of_warehouses(run, values):
    assert run({"r": pa.table({"user": values, "item": values})}, "r").users == [(7, [7], None), (9, [9], None)]
    missing = pa.concat_arrays([values, pa.nulls(1, values.type)])
    fails(run, {"r": pa.table({"user": missing, "item": missing})}, "r", words="row 3: user is missing")


def test_ids_of_warehouses_that_are_text_or_none(run):
    users = pa.array([b"7", "é".encode()], pa.binary())
    found = run({"r": pa.table({"user": users, "item": pa.array([b"ab", b"cd"], pa.binary(2))})}, "r")
    assert found.users == [("7", ["ab"], None), ("é", ["cd"], None)]
    huge = pa.array([Decimal(10**30)], pa.decimal128(38, 0))
    assert run({"r": pa.table({"user": huge, "item": [1]})}, "r").users == [(str(10**30), [1], None)]
    for bad, words in (
        (pa.array([1.5]), "row 1: user is 1.5; expected whole numbers"),
        (pa.array([Decimal("0.5")]), "row 1: user is 0.5"),
        (pa.array([b"\xff"]), "row 1: user is b'\\xff'; expected UTF-8"),
        (pa.array([float("nan")]), "row 1: user is missing"),
        (pa.array([True]), "column user is bool"),
    ):
        fails(run, {"r": pa.table({"user": bad, "item": [1]})}, "r", words=words)


# 4: ids


def test_blanks_around_ids_are_removed_and_counted(run):
    found = run({"ratings.csv": "user,item\n 1,a \n1,a\n2,\u00a0b\n3\t,c d\n"})
    assert found.users == [(1, ["a", "a"], None), (2, ["b"], None), (3, ["c d"], None)]
    assert found.manifest.dropped == {
        "item ids with blanks around them, trimmed": 2,
        "user ids with blanks around them, trimmed": 2,
    }
    assert found.manifest.notes[:2] == [
        "blanks around item ids removed, in rows: 2",
        "blanks around user ids removed, in rows: 2",
    ]
    fails(run, {"ratings.csv": "user,item\n1,2\n ,5\n"}, words="line 3: user is missing")


def test_ids_that_may_mean_a_missing_one_are_counted(run):
    texts = ["nan", "NULL", "None", r"\N", "<NA>", "NULL", "7"]
    found = run({"ratings.csv": "user,item\n" + "".join(f"1,{text}\n" for text in texts)})
    notes = [note for note in found.manifest.notes if "is taken as an id like any other" in note]
    assert [note.split(" is taken")[0] for note in notes] == [
        "item '<NA>' in 1 rows",
        "item 'NULL' in 2 rows",
        "item 'None' in 1 rows",
        "item '\\\\N' in 1 rows",
        "item 'nan' in 1 rows",
    ]
    assert found.users == [(1, texts, None)]


def test_metadata_of_other_ids_is_an_error_or_a_loud_note(run):
    ratings = {"ratings.csv": "user,item\n" + "".join(f"1,{item}\n" for item in range(101, 111))}
    floats = "".join(f"{item}.0\tx\n" for item in range(101, 111))
    fails(
        run,
        {**ratings, "titles.tsv": "item\ttitle\n" + floats},
        words=[
            "titles.tsv: none of its 10 items has ratings",
            "'101.0', '102.0', '103.0'",
            "of the ratings '101', '102', '103'",
        ],
    )
    some = "".join(f"{item if item > 107 else f'0{item}'}\tx\n" for item in range(101, 111))
    found = run({**ratings, "titles.tsv": "item\ttitle\n" + some})
    assert found.manifest.notes[0].startswith(
        "WARNING titles.tsv: only 3 of its 10 items are among the 10 of the ratings; other items of the file are "
        "'0101', '0102', '0103', of the ratings '101', '102', '103'"
    )
    few = run({**ratings, "titles.tsv": "item\ttitle\n101\tx\n102\ty\n999\tz\n"})
    assert not any("WARNING" in note for note in few.manifest.notes)


# 5: metadata


@pytest.mark.parametrize(
    ("separator", "genres"), [("|", ["A", "C,D", "B"]), (",", ["A | C", "D", "B"]), ("", ["A | C,D", "B"])]
)
def test_lists_in_one_field_are_split(run, separator, genres):
    files = {
        "ratings.csv": "user,item\n1,5\n",
        "genres.tsv": "item\tgenre\n5\tA | C,D\n5\tB\n",
        "directors.tsv": "item\tdirector\n5\tX|Y\n",
    }
    found = run(files, list_separator=separator)
    assert sorted(found.items[0][4]) == sorted(genres)
    assert found.items[0][5] == "X|Y"
    assert ("genres.tsv: fields split at " + separator in found.manifest.dropped) == bool(separator)
    assert any(note == f"genres.tsv: fields split at {separator}: 1" for note in found.manifest.notes) == bool(
        separator
    )


def test_metadata_in_csv(run):
    ratings = {"ratings.csv": "user,item\n1,5\n1,6\n1,7\n"}
    titles = 'item,title\n5,"One, ""the"" first"\n\n" 6 ","two\nlines"\n7,three\n'
    found = run({**ratings, "titles.csv": titles})
    assert [item[3] for item in found.items] == ['One, "the" first', "two\nlines", "three"]
    assert found.manifest.dropped == {"titles.csv: items with blanks around them, trimmed": 1}
    fails(
        run,
        {**ratings, "titles.csv": titles + "8\n"},
        words="titles.csv, line 7: 1 fields, expected 2, separated by commas",
    )
    fails(run, {**ratings, "titles.csv": titles + ",x\n"}, words="titles.csv, line 7: item is missing")
    fails(run, {**ratings, "titles.csv": titles + '8,a"b"\n'}, words="titles.csv, line 7: a quote inside a field")
    fails(
        run,
        {**ratings, "titles.csv": titles, "years.csv": 'item,year\n5,"1999"\n6,soon\n'},
        words="years.csv, line 3: year is 'soon'",
    )


def test_metadata_that_is_not_read_is_named(run, tmp_path):
    files = {
        "ratings.csv": "user,item\n1,5\n",
        "titles.tsv": "item\ttitle\n5\tA\n",
        "titles.csv": "item,title\n5,B\n",
        "genres.parquet": "x",
        "titles.tsv.bak": "",
    }
    found = run(files)
    assert found.items[0][3] == "A"
    assert found.manifest.notes[:3] == [
        "titles.csv is not read, because titles.tsv is there",
        "titles.tsv.bak is not read, because titles.tsv is there",
        "genres.parquet is not read; expected genres.tsv or genres.csv",
    ]
    os.remove(tmp_path / "data" / "titles.tsv")
    assert run({}).items[0][3] == "B"
    assert run({"titles.csv": lzma.compress(b"item,title\n5,C\n")}).items[0][3] == "C"


def test_the_files_are_known_by_every_option_together(run):
    """A log with foreign names, dates, an own separator and no header, in parts of a folder, from two writers."""
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(5)), int(rng.integers(9)), f"2024-0{rng.integers(1, 9)}-01") for _ in range(40)]
    text = "".join(f"x;{item};{user};{day}\n" for user, item, day in rows)
    plain = run({"ratings.csv": "user,item,time\n" + "".join(f"{u},{i},{d}\n" for u, i, d in rows)})
    half = len(text) // 2
    cut = text.index("\n", half) + 1
    files = {"log/1": text[:cut], "log/2": lzma.compress(text[cut:].encode())}
    other = run(files, "log", delimiter=";", header=False, columns={"user": "3", "item": "2", "time": "4"})
    assert other.users == plain.users
    assert other.items == plain.items
