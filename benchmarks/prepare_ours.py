"""Our `prepare` on a Ray of its own: `python -m benchmarks.prepare_ours WORKLOAD`."""

import contextlib
import logging
import sys
import tempfile
import time

from benchmarks.common import Workload, report
from benchmarks.prepare import TreeMemory


def _wait() -> None:
    time.sleep(0.5)


def main() -> None:
    began = time.perf_counter()
    import ray
    import ray.data  # which a job imports while Ray starts

    from bert4rec.config import DataConfig
    from bert4rec.data.prepare import prepare

    workload = Workload.from_command_line()
    memory = TreeMemory()
    memory.start()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        store = {"object_store_memory": workload.object_store} if workload.object_store else {}
        ray.init(num_cpus=workload.threads, include_dashboard=False, log_to_driver=False, **store)
        ray.get([ray.remote(_wait).remote() for _ in range(workload.threads)])  # the worker processes are up
        ready = time.perf_counter()
        prepare(DataConfig(data_dir=workload.data), directory)
        done = time.perf_counter()
        ray.shutdown()
    report(startup_seconds=ready - began, seconds=done - ready, tree_memory=memory.peak)


if __name__ == "__main__":
    main()
