"""Runs a worker over all users of a dataset: Ray Data gives the dataset's parts to actors."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from bert4rec.data.dataset import Part


def map_parts(
    parts: list[Part], worker: Callable[..., Any], arguments: tuple[Any, ...], num_workers: int, use_gpu: bool
) -> Iterator[dict[str, Any]]:
    """Run `worker` over the parts, in any order, on one CPU core (and one GPU) each.

    Parameters
    ----------
    worker : class
        Made once in each actor from `arguments`; called with a `Part`, it returns columns of results.

    Yields
    ------
    dict
        The columns, as numpy arrays, of one or more parts.
    """
    import ray.data

    rows = [part._asdict() for part in parts]
    ray.data.DataContext.get_current().raise_original_map_exception = True  # else a worker's error loses its cause
    mapped = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map_batches(
        _PartWorker,
        fn_constructor_args=(worker, arguments),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=max(1, min(num_workers, len(rows)))),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    failed = None
    try:
        yield from mapped.iter_batches(batch_format="numpy", batch_size=None)
    except Exception as error:
        failed = error.with_traceback(None)
        failed.__context__ = None
    if failed is not None:
        del mapped
        gc.collect()  # the error's frames held Ray Data's actors, whose cores the next work would wait for
        raise failed


class _PartWorker:
    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.worker = worker(*arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table(self.worker(Part(**batch.to_pylist()[0])))
