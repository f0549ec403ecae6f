"""Steps of large catalogues, all rows or those touched alone: `python -m benchmarks.catalogue --items 100000 1000000`.

`--shard-items --workers 2` measures tables in shards beside whole ones; `--shard-items alone`, where those do not fit.

Each row is a process of its own (or one a worker), with sampled softmax, on synthetic histories of about ten items.
"""

import itertools
import os
import sys
import tempfile
from dataclasses import replace

from benchmarks.common import (
    LEAST_MEMORY,
    OutOfMemoryError,
    Workload,
    median,
    options,
    publish,
    run,
    spread,
    synthetic_histories,
)
from bert4rec.training.train import WORKER_ENVIRONMENT

MEAN_LENGTH = 10


def main() -> None:
    parser = options("Time, memory and traffic of a training step, by the number of items.")
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--item-optimizer", choices=("dense", "rowwise"), nargs="+", default=["dense", "rowwise"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="gloo processes, which share the threads")
    parser.add_argument("--shard-items", nargs="?", choices=("beside", "alone"), const="beside")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--users", type=int, default=256, help="a step, over all workers")
    parser.add_argument("--negatives", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="measured in each turn, after the warm-up")
    args = parser.parse_args()

    in_shards = {None: [False], "beside": [False, True], "alone": [True]}[args.shard_items]
    variants = list(itertools.product(args.workers, args.items, args.item_optimizer, in_shards))
    results: dict[tuple[int, int, str, bool], list[dict[str, float]]] = {variant: [] for variant in variants}
    too_large: set[tuple[int, int, str, bool]] = set()
    with tempfile.TemporaryDirectory() as directory:
        workload = Workload(
            data=os.path.join(directory, "histories.npz"),
            hidden=args.hidden,
            max_len=50,
            batch_size=args.users,
            seconds=args.seconds,
            threads=args.threads,
            seed=args.seed,
            loss="sampled-softmax",
            num_negatives=args.negatives,
        )
        for items in args.items:
            synthetic_histories(100 * args.users, items, MEAN_LENGTH, args.seed).save(workload.data)
            for turn, variant in itertools.product(range(args.repeats), [own for own in variants if own[1] == items]):
                if variant in too_large:
                    continue
                own = replace(workload, workers=variant[0], item_optimizer=variant[2], shard_items=variant[3])
                try:
                    ran = run("benchmarks.ours", own, environment=WORKER_ENVIRONMENT)
                except OutOfMemoryError as error:
                    too_large.add(variant)
                    print(f"{_claim(args.hidden, *variant)}: out of memory: {error}", file=sys.stderr, flush=True)
                    continue
                for name in ("seconds", "cpu_seconds", "bytes_sent"):
                    ran[f"{name}_step"] = ran[name] / ran["steps"]
                ran["ms"], ran["cpu_ms"] = 1e3 * ran["seconds_step"], 1e3 * ran["cpu_seconds_step"]
                results[variant].append(ran)
                took = f"{ran['ms']:,.1f} ms a step, {ran['memory'] / 2**20:,.0f} MiB"
                print(f"{_claim(args.hidden, *variant)}: turn {turn + 1}: {took}", file=sys.stderr, flush=True)
    rows = []
    for variant, turns in results.items():
        size, items, kind, shards = variant
        fewest = results[size, min(args.items), kind, shards]
        whole = results.get((size, items, kind, False), []) if shards else []
        row = {
            "claim": _claim(args.hidden, *variant),
            "ms a step": "out of memory",
            "spread": "",
            "CPU ms a step": "",
            "of the fewest items": "",
            "memory, MiB": "",
            "of whole tables": "",
            "MB sent": "",
        }
        if variant not in too_large:
            relative = f"{median(turns, 'cpu_ms') / median(fewest, 'cpu_ms'):.2f}×" if fewest else ""
            row |= {
                "ms a step": f"{median(turns, 'ms'):,.1f}",
                "spread": spread(turns, "ms", ",.1f"),
                "CPU ms a step": f"{median(turns, 'cpu_ms'):,.1f}",
                "of the fewest items": relative,
                "memory, MiB": f"{median(turns, 'memory') / 2**20:,.0f}",
                "of whole tables": f"{median(turns, 'memory') / median(whole, 'memory'):.2f}×" if whole else "",
                "MB sent": f"{median(turns, 'bytes_sent_step') / 1e6:,.2f}" if size > 1 else "",
            }
        rows.append(row)
    notes = [
        f"{args.users} users a step of about {MEAN_LENGTH} items, {args.negatives} negatives, 2 layers, {args.threads} "
        f"threads; seed {args.seed}; medians of {args.repeats} turns of at least {args.seconds:g} s.",
        "CPU ms: time of all cores that a worker's process takes, which other processes disturb less than the wall "
        "time; of the fewest items: that, beside the first row's; memory: a worker's whole process at its peak; of "
        "whole tables: that of a table in shards, beside a copy in each worker; MB sent: by a worker in a step, all "
        "that this machine sent to itself; out of memory: it would have left the machine less than "
        f"{LEAST_MEMORY / 2**20:,.0f} MiB.",
    ]
    publish("catalogue", notes, rows, args.record)


def _claim(hidden: int, size: int, items: int, kind: str, shards: bool) -> str:
    of_all = f"{kind}, {items:,} items, hidden {hidden}, {size} worker{'s' * (size > 1)}"
    return of_all + (", in shards" if shards else "")


if __name__ == "__main__":
    main()
