"""The same sequences with pandas, in memory: `python -m benchmarks.prepare_pandas WORKLOAD`."""

import os
import tempfile
import time

from benchmarks.common import Workload, report
from benchmarks.prepare import TreeMemory, die_first


def prepare(data_dir: str, path: str) -> None:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    ratings = pd.read_csv(os.path.join(data_dir, "train_ratings.csv"))
    ratings = ratings.drop_duplicates().sort_values(["user", "time"], kind="stable")
    counts = ratings["item"].value_counts()  # falling
    item_ids = counts.reset_index().sort_values(["count", "item"], ascending=[False, True])["item"].to_numpy()
    token = pd.Series(np.arange(1, len(item_ids) + 1, dtype=np.int32), index=item_ids)
    items = token.reindex(ratings["item"]).to_numpy()
    users = ratings["user"].to_numpy()
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    offsets = np.append(starts, len(users)).astype(np.int32)
    last = pd.to_datetime(ratings["time"].iloc[offsets[1:] - 1], unit="s").dt.year.astype("int16")
    sequences = pa.table(
        {
            "user": users[starts],
            "items": pa.ListArray.from_arrays(pa.array(offsets), pa.array(items)),
            "last_year": last.to_numpy(),
        }
    )
    pq.write_table(sequences, os.path.join(path, "sequences.parquet"))
    catalogue = pa.table({"item": item_ids, "count": counts[item_ids].to_numpy()})
    pq.write_table(catalogue, os.path.join(path, "items.parquet"))


def main() -> None:
    began = time.perf_counter()
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    workload = Workload.from_command_line()
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
