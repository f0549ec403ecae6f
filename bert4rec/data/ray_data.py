"""How `prepare` uses Ray Data: its settings, a source whose read tasks are calls, and progress."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.shuffle_operators import shuffle_reduce_operator
from ray.data._internal.planner import plan_all_to_all_op
from ray.data.block import BlockMetadata
from ray.data.dataset import MaterializedDataset
from ray.data.datasource import ReadTask
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError

from bert4rec.progress import Line

PATIENCE_SECONDS = 300.0
"""How long a task of the shuffle waits for its rows, and half of the time that the work may stand still. When a node is
lost, the tasks that wait for its rows can hold all cores that Ray needs to make them again."""
_ATTEMPTS = 3
_LOST = (GetTimeoutError, ObjectLostError, ExecutionTimeoutError)
_Result = TypeVar("_Result")


class _Calls(Datasource):  # type: ignore[misc]
    """One read task per call. A call returns tables."""

    def __init__(self, calls: list[Callable[[], Iterable[pa.Table]]]) -> None:
        super().__init__()
        self._calls = calls

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown. Ray Data would use it to choose the number of tasks, which is given."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Make one task per call, whatever the parallelism."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(call, unknown, per_task_row_limit=per_task_row_limit) for call in self._calls]


def dataset_of(calls: list[Callable[[], Iterable[pa.Table]]]) -> Dataset:
    """Make a dataset of the tables of all calls. Each call is one read task."""
    return ray.data.read_datasource(_Calls(calls), override_num_blocks=len(calls))


@contextmanager
def settings() -> Iterator[None]:
    """Inside this block, Ray Data's settings are those of `prepare`."""
    context = DataContext.get_current().copy()
    context.shuffle_input_batch_bytes = 0  # by default one task takes blocks of 1 GiB together, so other cores idle
    context.shuffle_compression = "none"  # by default zstd, which costs more time than it saves
    context.hash_shuffle_reduce_get_timeout_s = PATIENCE_SECONDS
    with DataContext.current(context), _one_pool_of_processes():
        yield


@contextmanager
def _one_pool_of_processes() -> Iterator[None]:
    """Inside this block, the shuffle's tasks run in the processes that run all other tasks.

    Ray Data would give its map and its reduce tasks processes of their own. On a small machine Ray ends the idle
    processes then, and starts them again after the shuffle. Each start takes a core 1.5 s.
    """
    places = (plan_all_to_all_op, "_SHUFFLE_MAP_RUNTIME_ENV"), (shuffle_reduce_operator, "_SHUFFLE_REDUCE_RUNTIME_ENV")
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, None)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def repeated(work: Callable[[], _Result], report: Callable[[str], None]) -> _Result:
    """Do the work, and do it again if a node was lost with blocks that Ray cannot make again by itself.

    Ray makes most lost blocks again, but see `PATIENCE_SECONDS`.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return work()
        except (RayError, ExecutionTimeoutError) as error:
            if attempt == _ATTEMPTS or not any(isinstance(each, _LOST) for each in (error, getattr(error, "cause", 0))):
                raise
            report(f"blocks of rows were lost ({type(error).__name__}); starting again")
    raise AssertionError


def run_shuffle(dataset: Dataset, stage: str, num_tasks: int) -> MaterializedDataset:
    """Execute a dataset of `num_tasks` tasks, and show how many of them are done."""
    line = Line(stage, num_tasks, "tasks")
    line.start()
    done, is_running = 0, True

    class Show(ExecutionCallback):  # type: ignore[misc]
        def on_execution_step(self, executor: Any) -> None:  # noqa: ANN401 - of Ray Data, not public
            nonlocal done
            if not is_running:  # datasets made of the result have its settings
                return
            finished = sum(operator.metrics.num_tasks_finished for operator in executor._topology)
            if finished > done:
                line.advance(finished - done)
                done = finished
            line.show()

    dataset.context.custom_execution_callback_classes.append(Show)
    dataset.context.execution_no_progress_timeout_s = 2 * PATIENCE_SECONDS
    try:
        return dataset.materialize()
    finally:
        is_running = False
        line.end()
