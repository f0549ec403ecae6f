"""The same sequences with polars, in memory: `python -m benchmarks.prepare_polars WORKLOAD`."""

import os
import tempfile
import time

from benchmarks.common import Workload, report
from benchmarks.prepare import TreeMemory, die_first


def prepare(data_dir: str, path: str) -> None:
    import polars as pl  # type: ignore[import-not-found]

    ratings = pl.read_csv(os.path.join(data_dir, "train_ratings.csv")).unique(maintain_order=True)
    items = ratings.group_by("item").len("count").sort(["count", "item"], descending=[True, False])
    items = items.with_row_index("token", offset=1).with_columns(pl.col("token").cast(pl.Int32))
    sequences = (
        ratings.join(items.select("item", "token"), on="item", maintain_order="left")
        .sort(["user", "time"], maintain_order=True)
        .group_by("user", maintain_order=True)
        .agg(pl.col("token").alias("items"), pl.from_epoch(pl.col("time").last()).dt.year().alias("last_year"))
    )
    sequences.write_parquet(os.path.join(path, "sequences.parquet"))
    items.write_parquet(os.path.join(path, "items.parquet"))


def main() -> None:
    workload = Workload.from_command_line()
    os.environ["POLARS_MAX_THREADS"] = str(workload.threads)
    began = time.perf_counter()
    import polars  # type: ignore[import-not-found]  # noqa: F401

    die_first()
    memory = TreeMemory()
    memory.start()
    ready = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        prepare(workload.data, directory)
    done = time.perf_counter()
    report(startup_seconds=ready - began, seconds=done - ready, tree_memory=memory.peak)


if __name__ == "__main__":
    main()
