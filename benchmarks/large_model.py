"""Memory of a process that scores from a large model's directory: `python -m benchmarks.large_model --items 10000000`.

The model has random weights. As many gloo processes write it as there are shards, as a training in shards does; with
`--shards 1`, one process writes one file. Another process then reads it, and ranks all items for some users.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed
import torch.multiprocessing

from benchmarks.common import Workload, options, peak_memory, publish, report, run, synthetic_histories
from benchmarks.ours import catalogue_of, model_config
from bert4rec.config import InferenceConfig
from bert4rec.data.dataset import Sequences
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import Shard
from bert4rec.training.train import WORKER_ENVIRONMENT

KINDS = {"anonymous": "RssAnon", "mapped": "RssFile", "shared": "RssShmem"}


def write(rank: int, workload: Workload, num_items: int) -> None:
    """Write one shard of the directory, or the whole of it."""
    size = workload.workers
    torch.set_num_threads(1)
    shard = None
    if size > 1:
        meeting = f"file://{workload.data}.meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
        shard = Shard(rank, size, num_items)
    torch.manual_seed(workload.seed)
    BERT4Rec(model_config(workload), num_items, shard=shard).save_pretrained(workload.data)
    if size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)  # as in `benchmarks.ours`


class Peaks:
    """Most bytes of memory of each kind that this process holds, looked at all the time."""

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(KINDS, 0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.wait(0.01):
            held = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for kind, name in KINDS.items():
                self.peaks[kind] = max(self.peaks[kind], int(held[name].split()[0]) * 1024)

    def end(self) -> dict[str, int]:
        """The peaks until now."""
        self._ends.set()
        self._thread.join()
        return self.peaks


def score(workload: Workload) -> None:
    """Read the directory as the scoring job does, and rank all items for its users."""
    torch.set_num_threads(workload.threads)
    peaks, began = Peaks(), time.perf_counter()
    model = BERT4Rec.from_pretrained(workload.data)
    loaded = time.perf_counter()
    histories = synthetic_histories(workload.batch_size, model.num_items, 10, workload.seed)
    recommender = Recommender(model, catalogue_of(np.arange(1, model.num_items + 1)))
    inference = InferenceConfig(topk=workload.topk)
    own = np.split(histories.items, histories.offsets[1:-1])
    sequences = Sequences.of(pa.array(histories.user_ids), own, pa.nulls(workload.batch_size, pa.int16()))
    ranked = recommender.rank(sequences, inference, Ranking.of(inference))
    rows = sum(len(each.table) for each in ranked)
    assert rows == workload.topk * workload.batch_size
    done = time.perf_counter()
    report(load_seconds=loaded - began, seconds=done - loaded, memory=peak_memory(), **peaks.end())


def main() -> None:
    parser = options("Memory of a process that scores from a large model's directory.")
    parser.add_argument("--items", type=int, nargs="+", default=[200_000])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2], help="processes that write the model")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--users", type=int, default=512, help="who are scored")
    args = parser.parse_args()

    rows = []
    for num_items in args.items:
        for size in args.shards:
            with tempfile.TemporaryDirectory() as directory:
                workload = Workload(
                    data=os.path.join(directory, "model"),
                    hidden=args.hidden,
                    max_len=50,
                    batch_size=args.users,
                    threads=args.threads,
                    seed=args.seed,
                    workers=size,
                )
                torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
                    write, (workload, num_items), nprocs=size
                )
                weights = sum(path.stat().st_size for path in Path(workload.data).glob("*.safetensors"))
                found = run("benchmarks.large_model", workload, environment=WORKER_ENVIRONMENT)
            files = "one file" if size == 1 else f"{size} shards"
            held = {f"{kind}, MiB": f"{found[kind] / 2**20:,.0f}" for kind in ("anonymous", "mapped")}
            rows.append(
                {
                    "claim": f"{num_items:,} items, hidden {args.hidden}, {files}",
                    "weights, MiB": f"{weights / 2**20:,.0f}",
                    **held,
                    "of both at once, MiB": f"{found['memory'] / 2**20:,.0f}",
                    "s to read": f"{found['load_seconds']:,.1f}",
                    "users a second": f"{args.users / found['seconds']:,.0f}",
                }
            )
    notes = [
        f"{args.users} users, {args.threads} threads, inference.score_memory_mb={InferenceConfig().score_memory_mb}; "
        f"seed {args.seed}. Peaks of the whole process that reads and scores, Python and torch included. Anonymous: "
        "what no other process shares, and what has to stay in memory; mapped: of files, which the system may drop and "
        "read again, and which processes that read the same file share.",
    ]
    publish("large_model", notes, rows, args.record)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):  # by `run`
        score(Workload.from_command_line())
    else:
        main()
