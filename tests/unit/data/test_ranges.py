"""Rows and ranges of users, worked out by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec.data import ranges
from bert4rec.data.ranges import Vocabulary, build, count_before, encode, keep, total, write

pytestmark = pytest.mark.unit

ROWS = pa.table(  # of two ranges, in no order; user 20 saw code 0 twice at time 5, and 2 and 1 at the same time
    {
        "range": pa.array([1, 0, 1, 1, 0, 1, 1], pa.uint8()),
        "user": [20, 7, 20, 30, 7, 20, 20],
        "code": pa.array([1, 2, 0, 1, 0, 2, 0], pa.int32()),
        "row": pa.array([6, 5, 4, 3, 2, 1, 0], pa.uint8()),
        "time": [9.0, 3.5, 5.0, 1.0, 4.0, 9.0, 5.0],
    }
)


def test_rows_have_ranges_and_codes():
    vocabulary = Vocabulary(pa.array(["a", "b", "c"]), pa.array(["m", "t"]))
    table = pa.table({"user": ["z", "m", "a", "l", "t"], "item": list("cabca"), "row": [4, 5, 6, 7, 8]})
    assert encode(table, vocabulary).to_pydict() == {
        "range": [2, 1, 0, 0, 2],
        "user": ["z", "m", "a", "l", "t"],
        "code": [2, 0, 1, 2, 0],
        "row": [4, 5, 6, 7, 8],
    }


def test_ranges_are_built():
    assert build(ROWS).to_pydict() == {
        "range": [0, 1],
        "user": [[7], [20, 30]],
        "length": [[2], [3, 1]],
        "code": [[2, 0], [0, 2, 1, 1]],
        "time": [[3.5, 4.0], [5.0, 9.0, 9.0, 1.0]],
    }
    assert build(ROWS.drop_columns("time")).to_pydict() == {  # repeated rows stay
        "range": [0, 1],
        "user": [[7], [20, 30]],
        "length": [[2], [4, 1]],
        "code": [[0, 2], [0, 2, 0, 1, 1]],
    }
    assert len(build(ROWS.slice(0, 0))) == 0


def test_a_range_may_lose_all_its_users():
    assert keep(build(ROWS), lambda whole: whole.code < 2, 2).to_pydict() == {
        "range": [0, 1],
        "user": [[], [20]],
        "length": [[], [2]],
        "code": [[], [0, 1]],
        "time": [[], [5.0, 9.0]],
    }


def test_ranges_are_counted():
    ranges = build(ROWS)
    assert total(ranges).to_pylist() == [
        {"code": [0, 1, 2], "count": [2, 2, 2], "num_users": 3, "first": 1.0, "last": 9.0}
    ]
    assert total(ranges.slice(0, 1)).to_pylist() == [
        {"code": [0, 2], "count": [1, 1], "num_users": 1, "first": 3.5, "last": 4.0}
    ]
    untimed = total(build(ROWS.drop_columns("time"))).to_pylist()[0]
    assert (untimed["count"], untimed["first"], untimed["last"]) == ([3, 2, 2], np.inf, -np.inf)
    assert count_before(ranges, np.array([1, 4, 5, 10])).to_pylist() == [{"count": [0, 2, 3, 6]}]


def test_each_range_is_a_file(tmp_path):
    tokens = np.array([3, 1, 2], np.int32)
    written = write(build(ROWS), str(tmp_path), "data-1", tokens, {"test": 4}, 1, True)
    assert written["name"].to_pylist() == [f"data-1/sequences/part-0000{number}.parquet" for number in (0, 1)]
    assert written["size"].to_pylist() == [(tmp_path / name).stat().st_size for name in written["name"].to_pylist()]
    assert pq.read_table(tmp_path / written["name"][1].as_py()).to_pydict() == {
        "user": [20, 30],
        "items": [[3, 2, 1], [1]],
        "last_year": [1970, 1970],
        "times": [[4, 8, 8], [0]],
        "before_test": [0, 1],
    }
    untimed = write(build(ROWS.drop_columns("time")).slice(0, 1), str(tmp_path), "data-2", tokens, {}, None, False)
    assert pq.read_table(tmp_path / untimed["name"][0].as_py()).to_pydict() == {
        "user": [7],
        "items": [[3, 2]],
        "last_year": [None],
    }


@pytest.mark.parametrize(
    "times",
    [[], [5], [70_000, 3, 65_536, 3, 2**32, 0], [1.5, 1, 2.5, 1], [-4, 2**40, -4, 7], [1e-162, 0, -1, 0, 1e-162]],
)
def test_times_are_ordered_stably(times):
    times = np.array(times, np.float64)
    expected = sorted(range(len(times)), key=lambda place: times[place])
    assert ranges._order_of(times).tolist() == expected
