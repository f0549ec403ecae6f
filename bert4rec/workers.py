"""What a job takes of the cluster, and the one way to run over all users: Ray Data over the dataset's parts."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from bert4rec.config import Config, TrainingConfig
from bert4rec.dataset import Part


def for_training(training: TrainingConfig) -> tuple[bool, int]:
    """Whether training workers get a GPU each, and how many CPU cores each."""
    gpus, cpus, largest_node = _cluster()
    use_gpu = training.accelerator == "gpu" or (training.accelerator == "auto" and gpus >= training.num_workers)
    if training.cpus_per_worker is not None:
        return use_gpu, training.cpus_per_worker
    return use_gpu, max(1, min(cpus // training.num_workers, largest_node))


def for_scoring(config: Config) -> tuple[bool, int]:
    """Whether scoring workers get a GPU each, and how many workers there are."""
    gpus, cpus, _ = _cluster()
    use_gpu = config.training.accelerator == "gpu" or (config.training.accelerator == "auto" and gpus > 0)
    return use_gpu, config.inference.num_workers or max(1, gpus if use_gpu else cpus)


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
    rows = [part._asdict() for part in parts]
    mapped = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map_batches(
        _PartWorker,
        fn_constructor_args=(worker, arguments),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=max(1, min(num_workers, len(rows)))),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    return iter(mapped.iter_batches(batch_format="numpy", batch_size=None))


class _PartWorker:
    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.worker = worker(*arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table(self.worker(Part(**batch.to_pylist()[0])))


def _cluster() -> tuple[int, int, int]:
    """GPUs and CPUs of the cluster, and CPUs of its largest node."""
    total = ray.cluster_resources()
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return int(total.get("GPU", 0)), int(total.get("CPU", 0)), max(nodes, default=0)
