"""`prepare` on Ray Data gives the files that it gives in one process (tests/unit/data/test_prepare.py)."""

import gzip

import pytest
import ray.data
from ray.data._internal.execution.operators.shuffle_operators import shuffle_reduce_operator
from ray.data._internal.planner import plan_all_to_all_op
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import GetTimeoutError, ObjectLostError, RayTaskError

from bert4rec.config import DataConfig
from bert4rec.data import ray_data
from bert4rec.data.prepare import prepare
from bert4rec.errors import InputError
from tests.unit.data.test_prepare import METADATA, make_pieces, random_ratings, run, write

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

USERS = [f"u{i}" for i in range(300)]


def state():
    environments = plan_all_to_all_op._SHUFFLE_MAP_RUNTIME_ENV, shuffle_reduce_operator._SHUFFLE_REDUCE_RUNTIME_ENV
    return ray.data.DataContext.get_current(), *environments


@pytest.mark.parametrize(
    ("name", "range_rows", "options"),
    [
        ("r.csv", 200, {"split": "temporal", "split_time": 1_020_000_000, "min_item_interactions": 6}),
        ("r.csv", 10**6, {}),
        ("r.csv.gz", 500, {}),
    ],
    ids=["k-core and cut-offs", "one range of many chunks", "a stream of strings"],
)
def test_the_files_are_those_of_one_process(tmp_path, monkeypatch, request, name, range_rows, options):
    text = random_ratings(USERS, range(60), 4000)
    content = {"r_csv": text} if name == "r.csv" else {"r_csv_gz": gzip.compress(text.encode())}
    config = DataConfig(data_dir=str(write(tmp_path / "data", **content, **METADATA)), data_file=name, **options)
    make_pieces(monkeypatch, 9000, range_rows)
    before = state()
    shuffled = prepare(config, str(tmp_path / "shuffled"))
    assert state() == before
    assert [item is None for item in before] == [False] * 3
    request.getfixturevalue("local_ray_data")
    make_pieces(monkeypatch, 10**6, range_rows)
    whole = prepare(config, str(tmp_path / "whole"))
    assert shuffled == whole
    assert (len(whole.files) > 5) == (range_rows < 4000)


def test_errors_of_a_task_are_one_message(tmp_path, monkeypatch, capfd):
    make_pieces(monkeypatch)
    good = "".join(f"{i},{i % 7},{10**9 + i}\n" for i in range(900))
    data = write(tmp_path / "data", a_csv=f"user,item,time\n{good}1,,5\n{good}", b_csv="user,movie\n1,2\n")
    for name, message in (
        ("a.csv", r"a\.csv, line 902: item is missing$"),
        ("b.csv", "no column item; found user, mo"),
    ):
        with pytest.raises(InputError, match=message):
            run(data, tmp_path / "out", name)
    assert capfd.readouterr().err == ""


def test_work_is_repeated_only_where_blocks_were_lost():
    def failing(*errors):
        left, lines = list(errors), []

        def work():
            if left:
                raise left.pop(0)
            return "done"

        return lambda: (ray_data.repeated(work, lines.append), lines)

    lost = ExecutionTimeoutError(), RayTaskError("total", "trace", ObjectLostError("ab", None, ""))
    assert failing()() == ("done", [])
    assert failing(*lost)() == (
        "done",
        [f"blocks of rows were lost ({name}); starting again" for name in ("ExecutionTimeoutError", "RayTaskError")],
    )
    for errors in ((*lost, GetTimeoutError()), [RayTaskError("total", "trace", ValueError())], [InputError("a")]):
        with pytest.raises(type(errors[-1])):
            failing(*errors)()
