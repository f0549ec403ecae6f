"""Top-10 of all items for all users, without seen items, ours and RecTools' in turn: `python -m benchmarks.recommend`.

With --items and --users: ours alone on a synthetic catalogue of that size.
"""

import os
import tempfile
from dataclasses import replace

from benchmarks.common import (
    SYNTHETIC_SHORT,
    Workload,
    median,
    options,
    publish,
    read_histories,
    rectools_environment,
    run,
    scoring_flops,
    share_of_peak,
    spread,
    synthetic_histories,
)

OUR_BATCH_SIZE = 512
"""The default of inference.batch_size."""


def main() -> None:
    parser = options("Recommendation speed of ours and of RecTools.")
    parser.add_argument(
        "--data", default="data/ml-100k", help=f"directory with train_ratings.csv, or {SYNTHETIC_SHORT}"
    )
    parser.add_argument("--items", type=int, help="size of a synthetic catalogue, instead of --data")
    parser.add_argument("--users", type=int, default=10_000, help="users of that catalogue, 50 items each on average")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--max-len", type=int, help=f"default: 200, and 50 for {SYNTHETIC_SHORT}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each implementation has its turn")
    parser.add_argument("--peers", choices=("rectools", "none"), default="rectools")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: ours alone")
    args = parser.parse_args()
    if args.device == "cuda":
        args.peers = "none"

    name = f"synthetic, seed {args.seed}" if args.items else args.data
    histories = synthetic_histories(args.users, args.items, 50, args.seed) if args.items else None
    histories = histories or read_histories(args.data, args.seed)
    contenders = {"ours": ("benchmarks.ours", "")}
    if args.peers == "rectools" and not args.items:
        contenders["RecTools 0.19"] = ("benchmarks.rectools_peer", rectools_environment())
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "histories.npz")
        histories.save(path)
        for hidden in args.hidden:
            workload = Workload(
                data=path,
                task="recommend",
                hidden=hidden,
                max_len=args.max_len or (50 if name == SYNTHETIC_SHORT else 200),
                batch_size=OUR_BATCH_SIZE,
                threads=args.threads,
                seed=args.seed,
                device=args.device,
            )
            flops = scoring_flops(workload, histories.lengths, len(histories.item_ids))
            rows += _measure(workload, contenders, args.repeats, flops, f"{name}, {len(histories.item_ids):,} items")
    notes = [
        f"Data: {name}, {histories}. 2 layers, max_len {workload.max_len}, untrained, float32, {args.threads} threads; "
        f"top {workload.topk} of all items but the user's own, from histories to arrays of original ids, without the "
        f"load of the model; medians of {args.repeats} turns.",
        "Useful FLOP: `scoring_flops` in benchmarks/common.py; peak: the fastest square float32 product in the same "
        "call, and their mean speed (sustained); memory: of the whole process, its libraries included.",
    ]
    publish("recommend", notes, rows, args.record)


def _measure(
    workload: Workload, contenders: dict[str, tuple[str, str]], repeats: int, flops: float, data: str
) -> list[dict[str, str]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    peaks: list[dict[str, float]] = []
    for _ in range(repeats):
        peaks.append(run("benchmarks.ours", replace(workload, task="peak", seconds=6)))
        for name, (module, python) in contenders.items():
            results[name].append(run(module, workload, python))
    own = median(results["ours"], "seconds")
    table = []
    for name, ran in results.items():
        seconds = median(ran, "seconds")
        table.append(
            {
                "data": data,
                "hidden": str(workload.hidden),
                "implementation": name,
                "users/s": f"{ran[0]['users'] / seconds:,.0f}",
                "seconds": f"{seconds:.2f}",
                "spread": spread(ran, "seconds", ".2f"),
                "useful GFLOP/s": f"{flops / seconds / 1e9:.1f}",
                "share of peak": share_of_peak(flops / seconds, peaks),
                "memory, MiB": f"{median(ran, 'memory') / 2**20:,.0f}",
                "ours is": "" if name == "ours" else f"{seconds / own:.1f}×",
            }
        )
    return table


if __name__ == "__main__":
    main()
