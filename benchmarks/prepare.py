"""Time and memory of preparing synthetic ratings, ours and in memory: `python -m benchmarks.prepare`."""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.common import Workload, descendants, environment, median, options, publish, run, spread

NUM_USERS = 138_493
NUM_ITEMS = 26_744


def write_ratings(path: str, num_rows: int, seed: int) -> None:
    """A CSV `user,item,time` of users with uneven histories, items of falling (Zipf) frequency, and times at random."""
    import pyarrow as pa
    import pyarrow.csv

    random = np.random.default_rng(seed)
    activity = np.cumsum(random.exponential(size=NUM_USERS))
    popularity = np.cumsum(1 / np.arange(1, NUM_ITEMS + 1))
    with pa.OSFile(path, "wb") as file:
        file.write(b"user,item,time\n")
        for begin in range(0, num_rows, 1_000_000):
            count = min(1_000_000, num_rows - begin)
            table = pa.table(
                {
                    "user": 1 + np.searchsorted(activity, random.random(count) * activity[-1]),
                    "item": 1 + np.searchsorted(popularity, random.random(count) * popularity[-1]),
                    "time": random.integers(789_652_004, 1_427_784_002, count),
                }
            )
            pa.csv.write_csv(table, file, pa.csv.WriteOptions(include_header=False))


class TreeMemory(threading.Thread):
    """Samples the memory of this process and all its descendants; shared pages are counted once (PSS)."""

    def __init__(self, interval: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.peak = 0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, sum(_pss(pid) for pid in descendants(os.getpid())))
            time.sleep(self.interval)


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def die_first() -> None:
    """Let Linux end this process before others when memory is short."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    parser = options("Time and memory of preparing synthetic ratings.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 20_000_000], help="sizes of the input")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each implementation has its turn")
    parser.add_argument("--peers", default="pandas", help="of pandas,polars; one that runs out of memory is told so")
    parser.add_argument("--object-store-gb", type=float, default=0, help="of ours; 0 for Ray's default")
    parser.add_argument("--before", default="", help="checkout of an earlier commit of ours, which has turns too")
    args = parser.parse_args()
    contenders = {"ours": ("benchmarks.prepare_ours", "", "")}
    if args.before:
        contenders["ours, before"] = ("benchmarks.prepare_ours", "", args.before)
    for peer in filter(None, args.peers.split(",")):
        if peer not in ("pandas", "polars"):
            parser.error(f"unknown peer {peer}; expected pandas or polars")
        python = environment("polars", ["polars==1.*", "numpy"]) if peer == "polars" else ""
        contenders[f"{peer}, in memory"] = (f"benchmarks.prepare_{peer}", python, "")

    results: dict[tuple[int, str], list[dict[str, float]]] = {}
    sizes = sorted(set(args.rows))
    for num_rows in sizes:
        with tempfile.TemporaryDirectory() as directory:
            write_ratings(os.path.join(directory, "train_ratings.csv"), num_rows, args.seed)
            for _ in range(args.repeats):
                for name, (module, python, root) in contenders.items():
                    store = round(args.object_store_gb * 1e9) if name == "ours" else 0
                    workload = Workload(data=directory, threads=args.threads, seed=args.seed, object_store=store)
                    done = results.setdefault((num_rows, name), [])
                    try:
                        done.append(run(module, workload, python, root))
                    except SystemExit as failed:
                        if name.startswith("ours"):
                            raise
                        print(f"{name}, {num_rows:,} rows: {failed}", file=sys.stderr)
    rows = []
    of_store = f", object store of {args.object_store_gb:g} GB" if args.object_store_gb else ""
    for (num_rows, name), ran in results.items():
        about = {"rows": f"{num_rows:,}", "implementation": name + of_store if name == "ours" else name}
        if not ran:
            rows.append(about | dict.fromkeys(_FIGURES, "failed"))
            continue
        seconds = median(ran, "seconds")
        tenth = results.get((num_rows // 10, name))
        figures = [
            f"{median(ran, 'startup_seconds'):.1f}",
            f"{seconds:.1f}",
            spread(ran, "seconds", ".1f"),
            f"{num_rows / seconds:,.0f}",
            f"{seconds / median(tenth, 'seconds'):.1f}×" if tenth else "",
            f"{max(result['tree_memory'] for result in ran) / 2**20:,.0f}",
            "" if name == "ours" else f"{seconds / median(results[num_rows, 'ours'], 'seconds'):.2f}×",
        ]
        rows.append(about | dict(zip(_FIGURES, figures, strict=True)))
    store = f"an object store of {args.object_store_gb:g} GB" if args.object_store_gb else "Ray's default object store"
    notes = [
        f"{NUM_USERS:,} users, {NUM_ITEMS:,} items, with time; seed {args.seed}; {args.threads} threads; {store}; "
        f"medians of {args.repeats} turns.",
        "From the CSV file to Parquet files of sequences. Start-up: imports and, for ours, Ray. "
        "Memory: the most that all processes together had in any turn, shared pages counted once.",
    ]
    publish("prepare", notes, rows, args.record)


_FIGURES = ("start-up, s", "seconds past it", "spread", "rows/s", "times its tenth", "memory, MiB", "of ours")


if __name__ == "__main__":
    main()
