import bz2
import gzip
import importlib
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec.config import DataConfig, load_config
from bert4rec.data import interactions
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import prepare
from bert4rec.errors import InputError
from tests.twins.reference import k_core, prepared_with_pandas

prepare_module = sys.modules[prepare.__module__]

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("local_ray_data")]


def make_pieces(monkeypatch, chunk_bytes=3000, range_rows=200):
    """Small chunks and ranges."""
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(prepare_module, "RANGE_ROWS", range_rows)
    monkeypatch.setattr(prepare_module, "_SHARD_ROWS", 1)
    monkeypatch.setattr(interactions, "SAMPLE_EVERY", 20)


def write(directory, **files):
    """Files by name, `_` for `.`, from bytes or text."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (directory / re.sub(r"_(csv|tsv|gz|bz2)", r".\1", name)).write_bytes(content)
    return directory


def random_ratings(users, items, num_rows, seed=0, time=True):
    """CSV with ties in time, exact duplicates, rows in no order."""
    rng = np.random.default_rng(seed)
    rows = [
        [str(rng.choice(users)), str(rng.choice(items)), *([str(rng.integers(1e9, 1e9 + 3e7) // 10**6 * 10**6)] * time)]
        for _ in range(num_rows)
    ]
    return "\n".join(",".join(row) for row in [["user", "item", "time"][: 2 + time], *rows]) + "\n"


def run(data_dir, path, data_file="train_ratings.csv", **options):
    prepare(DataConfig(data_dir=str(data_dir), data_file=data_file), str(path), **options)
    return PreparedDataset(str(path))


def users_of(dataset):
    """As in PreparedTwin."""
    ids, sequences = dataset.items().ids.to_pylist(), dataset.sequences()
    histories = np.split(sequences.items, sequences.offsets[1:-1])
    years = [int(y) if has else None for y, has in zip(sequences.last_year, sequences.has_last_year, strict=True)]
    users = sequences.users.to_pylist()
    return [(u, [ids[token - 1] for token in h], y) for u, h, y in zip(users, histories, years, strict=True)]


def times_of(dataset):
    """As in PreparedTwin."""
    origin = dataset.manifest.time_origin
    if origin is None:
        return []
    tables = [pq.read_table(file) for file in dataset.sequence_files]
    return [[origin + time for time in times] for table in tables for times in table["times"].to_pylist()]


def items_of(dataset):
    """As in PreparedTwin."""
    manifest = dataset.manifest
    rows = pq.read_table(dataset.items_file).to_pylist()
    assert [row["index"] for row in rows] == list(range(1, manifest.num_items + 1))
    return [
        (
            row["item"],
            row["count"],
            row["year"],
            row["title"],
            [manifest.vocabularies["genre"][i] for i in row["genres"]],
            None if row["director"] is None else manifest.vocabularies["director"][row["director"]],
            [manifest.vocabularies["writer"][i] for i in row["writers"]],
        )
        for row in rows
    ]


def assert_is_twin(dataset, data_dir, data_file="train_ratings.csv", k=0):
    twin = prepared_with_pandas(data_dir, data_file, k)
    assert users_of(dataset) == twin.users
    assert items_of(dataset) == twin.items
    assert times_of(dataset) == twin.times
    manifest = dataset.manifest
    assert manifest.num_users == len(twin.users)
    assert manifest.num_interactions == sum(len(items) for _, items, _ in twin.users)
    assert manifest.num_duplicates == twin.num_duplicates


METADATA = {
    "years_tsv": "item\tyear\n10\t1995\n3\t1990\n99999\t1999\n10\t2001\n",
    "titles_tsv": 'item\ttitle\n3\tThe "Third" Item\n10\tTenth, the\n',
    "genres_tsv": "item\tgenre\n10\tWar\n3\tDrama\n10\tAction\n3\tDrama\n5\tWar\n99999\tNever\n",
    "directors_tsv": "item\tdirector\n5\tZoë\n10\tAnn\n5\tBob\n",
    "writers_tsv": "item\twriter\n5\tBob\n5\tAnn\n",
}


@pytest.mark.parametrize(
    ("users", "items"),
    [
        (range(50), range(3, 40)),
        ([f"u{i}" for i in range(40)] + ["Ünï", "用户", "a b"], ["007", "7", "+1", "x", "10", "3", "5"]),
        ([-5, 7, 2**63 - 1, -(2**63)], [str(2**63), "10", "3", "5"]),
    ],
)
def test_equals_the_pandas_twin(tmp_path, users, items):
    data = write(tmp_path / "data", train_ratings_csv=random_ratings(list(users), list(items), 3000), **METADATA)
    assert_is_twin(run(data, tmp_path / "out"), data)


def test_without_time_the_row_order_is_kept_and_repeated_rows_stay(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv="user,item\n1,5\n2,5\n1,4\n1,5\n1,5\n")
    dataset = run(data, tmp_path / "out")
    assert users_of(dataset) == [(1, [5, 4, 5, 5], None), (2, [5], None)]
    assert not dataset.manifest.has_time
    assert any("time" in note for note in dataset.manifest.notes)


def test_the_result_depends_on_neither_chunks_nor_ranges(tmp_path, monkeypatch):
    data = write(tmp_path / "data", train_ratings_csv=random_ratings(range(300), range(60), 4000), **METADATA)
    whole = run(data, tmp_path / "whole")
    make_pieces(monkeypatch)
    pieces = run(data, tmp_path / "pieces")
    assert len(pieces.sequence_files) > 1
    assert users_of(pieces) == users_of(whole)
    assert items_of(pieces) == items_of(whole)
    assert pieces.manifest.catalogue == whole.manifest.catalogue
    assert_is_twin(pieces, data)


def hashes(dataset):
    """SHA-256 of each file, by its name without the folder of the version."""
    return {name.partition("/")[2]: sha256 for name, sha256 in dataset.manifest.sha256.items()}


@pytest.mark.parametrize("users", [range(300), [f"u{i}" for i in range(300)]])
def test_files_are_equal_to_the_last_byte_whatever_the_chunks_and_the_format(tmp_path, monkeypatch, users):
    text = random_ratings(users, range(60), 4000)
    data = write(tmp_path / "data", r_csv=text, r_csv_gz=gzip.compress(text.encode()), **METADATA)
    table = pd.read_csv(io.StringIO(text))
    for part in range(3):  # with the line ends of one file in the middle of another's chunk
        rows = text.splitlines(keepends=True)[1:][1300 * part : 1300 * (part + 1) if part < 2 else None]
        (data / f"part-{part}.csv").write_text("user,item,time\n" + "".join(rows))
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), data / "r.parquet", row_group_size=90)
    found = []
    for name, chunk_bytes in (("r.csv", 10**6), ("r.csv", 9000), ("r.csv", 1000), ("r.csv.gz", 2000), ("r.parquet", 1)):
        make_pieces(monkeypatch, chunk_bytes)
        found.append(hashes(run(data, tmp_path / f"out-{len(found)}", name)))
    assert len(found[0]) > 15
    assert found == [found[0]] * len(found)
    assert_is_twin(run(data, tmp_path / "parts", "part-*.csv"), data, "r.csv")


def skewed_ratings(num_rows, seed=0):
    """CSV of users and items of which some are common and some rare; whole seconds, many of them the same."""
    rng = np.random.default_rng(seed)
    pairs = zip(
        *(rng.geometric(share, num_rows) for share in (0.02, 0.05)), rng.integers(0, 900, num_rows), strict=True
    )
    return "user,item,time\n" + "".join(f"{user},{item},{10**9 + 3600 * hour}\n" for user, item, hour in pairs)


@pytest.mark.parametrize("pieces", [False, True])
def test_the_k_core_equals_the_pandas_twin(tmp_path, monkeypatch, pieces):
    if pieces:
        make_pieces(monkeypatch)
    data = write(tmp_path / "data", train_ratings_csv=skewed_ratings(2000))
    whole = prepared_with_pandas(data)
    config = DataConfig(data_dir=str(data), min_item_interactions=6)
    prepare(config, str(tmp_path / "out"))
    dataset = PreparedDataset(str(tmp_path / "out"))
    assert (len(dataset.sequence_files) > 3) == pieces
    assert_is_twin(dataset, data, k=6)
    manifest = dataset.manifest
    assert manifest.identity == {"min_item_interactions": 6}
    assert manifest.num_core_users == len(whole.users) - manifest.num_users > 20
    assert manifest.num_core_items == len(whole.items) - manifest.num_items > 20
    missing = sum(len(items) for _, items, _ in whole.users) - manifest.num_interactions
    assert manifest.num_core_interactions == missing > 100
    assert f"{missing:,} interactions" in manifest.notes[-1]
    lines = []
    prepare(config, str(tmp_path / "out"), lines.append)
    assert lines == ["up to date: the input files have not changed"]


def test_a_core_of_nothing_is_one_message(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv="user,item\n1,5\n1,6\n2,5\n")
    with pytest.raises(InputError, match=r"train_ratings\.csv: data\.min_item_interactions=3 leaves no interaction"):
        prepare(DataConfig(data_dir=str(data), min_item_interactions=3), str(tmp_path / "out"))


def test_an_item_outside_the_core_is_not_new(tmp_path):
    """Items 5 and 6 make the 2-core; 7 has one interaction and a title, 8 a title alone."""
    data = write(
        tmp_path / "data",
        train_ratings_csv="user,item\n1,5\n1,6\n2,5\n2,6\n2,7\n",
        titles_tsv="item\ttitle\n7\tSeven\n8\tEight\n",
    )
    config = DataConfig(data_dir=str(data), min_item_interactions=2, include_new_items=True)
    manifest = prepare(config, str(tmp_path / "out"))
    assert PreparedDataset(str(tmp_path / "out")).items().ids.to_pylist() == [5, 6, 8]
    assert (manifest.num_new_items, manifest.num_core_items) == (1, 1)


@pytest.mark.parametrize(("split_time", "k"), [(0.8, 0), (0.55, 4), (1_001_000_000, 0)])
def test_temporal_cut_offs_equal_the_slow_way(tmp_path, monkeypatch, split_time, k):
    make_pieces(monkeypatch)
    monkeypatch.setattr(prepare_module, "_SEARCHED_TIMES", 5)
    data = write(tmp_path / "data", train_ratings_csv=skewed_ratings(1500, seed=4))
    config = DataConfig(data_dir=str(data), split="temporal", split_time=split_time, min_item_interactions=k)
    cutoffs = prepare(config, str(tmp_path / "out")).cutoffs

    kept = k_core(pd.read_csv(data / "train_ratings.csv").drop_duplicates(), k)
    times = np.sort(kept["time"])
    test = int(split_time) if split_time > 1 else times[int(split_time * len(times))]
    before_test = (times < test).sum()
    validation = times[before_test**2 // len(times)]
    week = 7 * 24 * 3600
    assert cutoffs == {
        "validation": validation,
        "test": test,
        "recent_validation": validation - week,
        "recent_test": test - week,
    }
    sequences = PreparedDataset(str(tmp_path / "out")).sequences()
    for name, cutoff in cutoffs.items():
        expected = kept["time"].lt(cutoff).groupby(kept["user"]).sum()
        assert sequences.before[name].tolist() == expected[sequences.users.to_pylist()].tolist()
    assert 0 < sequences.before["recent_test"].sum() < sequences.before["test"].sum() < len(kept)


def test_a_dataset_of_another_split_is_prepared_again(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv=skewed_ratings(300))
    prints = set()
    for options in ({}, {"split": "temporal"}, {"split": "temporal", "split_time": 0.8}, {"min_item_interactions": 2}):
        manifest = prepare(DataConfig(data_dir=str(data), **options), str(tmp_path / "out"))
        prints.add(manifest.fingerprint)
        assert ("test" in manifest.cutoffs) == ("split" in options)
    assert len(prints) == 4


def test_a_temporal_split_that_cannot_be(tmp_path):
    data = write(tmp_path / "data", untimed_csv="user,item\n1,5\n", few_csv="user,item,time\n1,5,7\n1,6,8.5\n2,6,9\n")
    for name, split_time, message in (
        ("untimed.csv", 0.9, "no column time, which data.split=temporal needs"),
        ("few.csv", 8, r"data.split_time=8 gives 0 interactions for training, 1 for validation and 2 for test"),
        ("few.csv", 2000, r"data.split_time=2000 gives .* and 0 for test, none of which may be 0; .* from 7 to 9"),
    ):
        config = DataConfig(data_dir=str(data), data_file=name, split="temporal", split_time=split_time)
        with pytest.raises(InputError, match=message):
            prepare(config, str(tmp_path / "out"))


def test_several_files_are_read_in_name_order(tmp_path):
    data = write(tmp_path / "data", r2_csv="item,user\n5,1\n9,2\n", r1_csv="user,note,item\n1,x,6\n", other_csv="a\n")
    dataset = run(data, tmp_path / "out", "r?.csv")
    assert users_of(dataset) == [(1, [6, 5], None), (2, [9], None)]
    assert [file.name for file in dataset.manifest.inputs] == ["r1.csv", "r2.csv"]


def test_formats_agree(tmp_path, monkeypatch):
    """gz, bz2, Parquet, and CSV with BOM, CRLF, quotes, other columns in other order: all the same dataset."""
    text = random_ratings(range(100), range(3, 30), 2000)
    header, *rows = [line.split(",") for line in text.splitlines()]
    crlf = "\ufefftime,extra,item,user,extra\r\n" + "\r\n".join(
        f'{time},"a, ""b""\n",{item},"{user}",' + ("\r\n" if i % 7 == 0 else "")
        for i, (user, item, time) in enumerate(rows)
    )
    write(
        tmp_path,
        plain_csv=text,
        a_csv_gz=gzip.compress(text.encode()),
        a_csv_bz2=bz2.compress(text.encode()),
        crlf_csv=crlf,
    )
    columns = dict(zip(header, zip(*[map(int, row) for row in rows], strict=True), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=300)
    make_pieces(monkeypatch, chunk_bytes=4000)
    expected = prepared_with_pandas(tmp_path, "plain.csv")
    for name in ("plain.csv", "a.csv.gz", "a.csv.bz2", "crlf.csv", "a.parquet"):
        dataset = run(tmp_path, tmp_path / f"out-{name}", name)
        assert users_of(dataset) == expected.users, name
        assert items_of(dataset) == expected.items, name


def test_parquet_keeps_its_own_types(tmp_path):
    times = pa.array([1.5e9, 1.6e9], pa.float64()).cast(pa.int64()).cast(pa.timestamp("s")).cast(pa.timestamp("ns"))
    pq.write_table(
        pa.table({"user": ["1", "2"], "item": pa.array([4, 5], pa.int32()), "time": times}), tmp_path / "r.parquet"
    )
    dataset = run(tmp_path, tmp_path / "out", "r.parquet")
    assert users_of(dataset) == [("1", [4], 2017), ("2", [5], 2020)]


def test_times_may_be_negative_and_fractional(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv="user,item,time\n1,5,-0.5\n1,6,-0.75\n1,7,-1e9\n")
    assert users_of(run(data, tmp_path / "out")) == [(1, [7, 6, 5], 1969)]


def test_metadata_files_as_other_writers_leave_them(tmp_path):
    data = write(
        tmp_path / "data",
        train_ratings_csv="user,item\n1,1\n1,2\n1,3\n1,4\n",
        titles_tsv_gz=gzip.compress(
            '\ufeffitem\ttitle\r\n1\t"Say ""Hi"""\r\n2\t"One" and "Two"\r\n3\t"Four\r\n'.encode()
        ),
        years_tsv="year\textra\titem\n1995.0\tx\t2\n\tx\t1\n",
        genres_tsv="item\tgenre\n",
    )
    dataset = run(data, tmp_path / "out")
    assert dataset.items().title.to_pylist() == ['Say "Hi"', '"One" and "Two"', '"Four', None]
    assert [item[2] for item in items_of(dataset)] == [None, 1995, None, None]
    assert [file.name for file in dataset.manifest.inputs] == [
        "train_ratings.csv",
        "years.tsv",
        "titles.tsv.gz",
        "genres.tsv",
    ]


def test_notes_say_what_was_ignored(tmp_path):
    data = write(
        tmp_path / "data",
        train_ratings_csv="user,item,time\n1,3,1e9\n1,5,1.1e9\n1,3,1e9\n2,10,1e9\n",
        **{name: content for name, content in METADATA.items() if name != "writers_tsv"},
    )
    manifest = run(data, tmp_path / "out").manifest
    assert manifest.dropped == {
        "years.tsv: rows of items without interactions ignored": 1,
        "years.tsv: further rows of an item ignored, the first counts": 1,
        "genres.tsv: rows of items without interactions ignored": 1,
        "directors.tsv: further rows of an item ignored, the first counts": 1,
    }
    assert manifest.notes == [
        "years.tsv: rows of items without interactions ignored: 1",
        "years.tsv: further rows of an item ignored, the first counts: 1",
        "genres.tsv: rows of items without interactions ignored: 1",
        "directors.tsv: further rows of an item ignored, the first counts: 1",
        "no writers.tsv: items have no writers",
        "exact duplicates of an interaction dropped: 1",
    ]


def test_a_rerun_does_nothing_until_an_input_changes(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv="user,item\n1,5\n1,10\n", **METADATA)
    first = run(data, tmp_path / "out").manifest
    lines = []
    assert run(data, tmp_path / "out", report=lines.append).manifest == first
    assert lines == ["up to date: the input files have not changed"]
    write(data, years_tsv="item\tyear\n5\t1988\n")
    changed = run(data, tmp_path / "out", report=lines.append).manifest
    assert changed.catalogue != first.catalogue
    assert changed.fingerprint != first.fingerprint
    assert any("reading 6 files" in line for line in lines)


@pytest.mark.parametrize("is_small", [True, False])
def test_ray_starts_once_it_is_needed(tmp_path, monkeypatch, is_small):
    data = write(tmp_path / "data", train_ratings_csv="user,item,time\n1,5,7\n1,6,8\n2,5,9\n")
    config, happened = DataConfig(data_dir=str(data)), []
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 10**6 if is_small else 1)
    scan = interactions.scan_interactions
    monkeypatch.setattr(interactions, "scan_interactions", lambda *each: happened.append("scan") or scan(*each))
    for _ in range(2):
        prepare(config, str(tmp_path / "out"), start_ray=lambda: happened.append("start"))
    large = ["start", "scan", "start", "start", "scan"]
    assert happened == (["scan", "start", "scan"] if is_small else large)


def test_half_a_dataset_is_refused_and_repaired(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv="user,item\n1,5\n2,5\n")
    whole = run(data, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        PreparedDataset(str(tmp_path / "out"))
    (tmp_path / "out" / "data-0").mkdir()
    (tmp_path / "out" / "data-0" / "part-99999.parquet").write_bytes(b"left behind")
    assert users_of(run(data, tmp_path / "out")) == users_of(whole)
    assert sorted(os.listdir(tmp_path / "out")) == [whole.items_file.split("/")[-2], "manifest.json"]
    Path(whole.items_file).write_bytes(b"short")
    assert users_of(run(data, tmp_path / "out")) == users_of(whole)


def test_bad_input_leaves_the_old_dataset_alone(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv="user,item\n1,5\n")
    old = run(data, tmp_path / "out")
    write(data, train_ratings_csv="user,item\n1,\n")
    with pytest.raises(InputError, match="item is missing"):
        run(data, tmp_path / "out")
    assert users_of(PreparedDataset(str(tmp_path / "out"))) == users_of(old)


GOOD = "user,item,time\n" + "".join(f"{i},{i % 7},{10**9 + i}\n" for i in range(400))
DAMAGED_GZIP = gzip.compress(GOOD.encode())[:-400]
RATINGS = "train_ratings_csv"

BAD_INPUT = {
    "empty file": ({RATINGS: ""}, ["train_ratings", "no data rows", "empty", "user,item"]),
    "no item column": ({RATINGS: "user,movie\n1,2\n"}, ["no column item", "found user, movie"]),
    "two user columns": ({RATINGS: "user,item,user\n1,2,1\n"}, ["more than one column user"]),
    "header only": ({RATINGS: "user,item\n"}, ["train_ratings", "no data rows"]),
    "blank lines only": ({RATINGS: "user,item\n\n\n"}, ["no data rows"]),
    "missing users": ({RATINGS: GOOD + "\n,5,1\n,6,2\n1,2,3\n"}, ["line 403", "user is missing", "(2 rows"]),
    "missing item": ({RATINGS: GOOD + '1,"",1\n'}, ["line 402: item is missing"]),
    "time is text": ({RATINGS: GOOD + "1,2,2001-01-01\n"}, ["line 402", "'2001-01-01'", "Unix seconds"]),
    "time is missing": ({RATINGS: GOOD + "1,2,\n"}, ["line 402", "time is ''"]),
    "time is nan": ({RATINGS: GOOD + "1,2,nan\n1,2,inf\n"}, ["line 402", "'nan'", "(2 rows"]),
    "milliseconds among seconds": (
        {RATINGS: GOOD + "1,2,1500000000000\n"},
        ["line 402: time is '1500000000000', which looks like milliseconds, but most times look like seconds"],
    ),
    "seconds among nanoseconds": (
        {RATINGS: "user,item,time\n1,2,1.5e18\n1,3,15e17\n1,4,1.5e9\n1,5,0\n1,6,15e17\n"},
        ["line 4: time is '1.5e9', which looks like seconds", "nanoseconds; data.time_unit", "(2 rows"],
    ),
    "too many fields": ({RATINGS: GOOD + "1,2,3,4\n"}, ["line 402: 4 fields, expected 3 (user,item,time)"]),
    "too few fields": ({RATINGS: 'user,item,x\n1,2,"a\nb"\n\n1,2\n'}, ["line 5: 2 fields, expected 3"]),
    "Latin-1": ({RATINGS: GOOD.encode() + b"caf\xe9,2,3\n"}, ["line 402", "column user is not UTF-8"]),
    "Latin-1 header": ({RATINGS: b"user,item,\xe9\n1,2,3\n"}, ["line 1", "not UTF-8"]),
    "damaged gzip": ({"train_ratings_csv_gz": DAMAGED_GZIP}, ["train_ratings.csv.gz: cannot be read", "damaged"]),
    "bad line in gzip": (
        {"train_ratings_csv_gz": gzip.compress(GOOD.encode() + b"1,,3\n")},
        ["line 402: item is missing"],
    ),
    "columns differ": (
        {"train_ratings_csv": "user,item\n1,2\n", "train_ratings2_csv": GOOD},
        ["train_ratings.csv: no column time", "train_ratings2.csv"],
    ),
    "year is text": ({RATINGS: GOOD, "years_tsv": "item\tyear\n1\t1999\n\n2\tsoon\n"}, ["years.tsv, line 4", "'soon'"]),
    "year too large": ({RATINGS: GOOD, "years_tsv": "item\tyear\n1\t40000\n"}, ["years.tsv, line 2", "'40000'"]),
    "no genre column": ({RATINGS: GOOD, "genres_tsv": "item,genre\n1,War\n"}, ["genres.tsv", "no column item"]),
    "metadata fields": ({RATINGS: GOOD, "titles_tsv": "item\ttitle\n1\ta\n2\n"}, ["titles.tsv, line 3: 1 fields"]),
    "metadata encoding": ({RATINGS: GOOD, "titles_tsv": b"item\ttitle\n1\t\xe9\n"}, ["titles.tsv, line 2: not UTF-8"]),
    "metadata without item": ({RATINGS: GOOD, "writers_tsv": "item\twriter\n\tx\n"}, ["line 2: item is missing"]),
    "empty metadata": ({RATINGS: GOOD, "directors_tsv": ""}, ["directors.tsv", "empty"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message(tmp_path, monkeypatch, case):
    files, expected = BAD_INPUT[case]
    make_pieces(monkeypatch, chunk_bytes=1000)
    with pytest.raises(InputError) as raised:
        run(write(tmp_path / "data", **files), tmp_path / "out", "train_ratings*")
    message = str(raised.value)
    assert type(raised.value) is InputError
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_bad_parquet(tmp_path):
    table = pa.table({"user": [1, None, None], "item": ["a", "b", None], "time": [1.0, 2.0, 1e12]})
    pq.write_table(table, tmp_path / "nulls.parquet", row_group_size=1)
    pq.write_table(table.set_column(0, "user", pa.array([1.0, 2.5, 3.0])), tmp_path / "floats.parquet")
    pq.write_table(table.select(["user"]), tmp_path / "columns.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    (tmp_path / "damaged.parquet").write_bytes((tmp_path / "nulls.parquet").read_bytes()[:-10])
    for name, message in {
        "nulls": "row 2: user is missing (2 rows",
        "floats": "row 2: user is 2.5; expected whole numbers or text",
        "columns": "no column item; found user",
        "none": "no data rows",
        "damaged": "not a Parquet file, or a damaged one",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            run(tmp_path, tmp_path / "out", f"{name}.parquet")


def test_missing_files_are_named_with_what_is_there(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        run(tmp_path / "nowhere", tmp_path / "out")
    write(tmp_path / "data", ratings_csv="user,item\n1,2\n")
    with pytest.raises(InputError, match=r"train_ratings\.csv: no such file; the directory holds ratings\.csv"):
        run(tmp_path / "data", tmp_path / "out")


def test_the_files_on_disk_are_what_the_contract_says(tmp_path):
    data = write(tmp_path / "data", train_ratings_csv=GOOD, **METADATA)
    dataset = run(data, tmp_path / "out")
    schema = pq.read_schema(dataset.sequence_files[0])
    assert [schema.field(name).type for name in ("user", "last_year")] == [pa.int64(), pa.int16()]
    assert schema.field("items").type.value_type == pa.int32()
    assert schema.field("times").type.value_type == pa.int64()
    types = {f.name: f.type for f in pq.read_schema(PreparedDataset(str(tmp_path / "out")).items_file)}
    assert [types[name] for name in ("index", "item", "count", "year", "title", "director")] == [
        pa.int32(), pa.int64(), pa.int64(), pa.int16(), pa.string(), pa.int32(),
    ]  # fmt: skip
    assert types["genres"].value_type == types["writers"].value_type == pa.int32()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert all((tmp_path / "out" / name).stat().st_size == size for name, size in manifest["files"].items())
    users = list(itertools.chain.from_iterable(dataset.read_part(part).users.to_pylist() for part in dataset.parts()))
    assert users == sorted(users)


@pytest.mark.parametrize("module", ["jobs.prepare", "bert4rec.api"])
def test_whoever_prepares_hands_over_how_ray_starts(module, tmp_path, monkeypatch):
    """Ray would start by itself too, but not on the cluster of RAY_ADDRESS, nor with a look at the nodes' disks."""
    caller, begun = importlib.import_module(module), []
    name, job = ("prepare", "prepare_dataset") if module == "jobs.prepare" else ("_prepare", "prepare")
    manifest = SimpleNamespace(notes=[], num_interactions=1, num_users=1, num_items=1)
    monkeypatch.setattr(caller, "begin", lambda config, meanwhile: begun.append((config, meanwhile)))
    monkeypatch.setattr(caller, name, lambda data, path, report, start_ray: start_ray() or manifest)
    config = load_config(None, [f"data.data_dir={tmp_path}", f"run.storage_path={tmp_path}"])
    assert getattr(caller, job)(config) == config.prepared_path
    assert begun == [(config, ("ray.data",))]
