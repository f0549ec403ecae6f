"""Training speed, ours and the peers', in turn on the same data: `python -m benchmarks.training`."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.common import (
    SYNTHETIC_SHORT,
    Workload,
    busy,
    median,
    options,
    publish,
    read_histories,
    recbole_environment,
    rectools_environment,
    run,
    share_of_peak,
    spread,
    training_flops,
)
from bert4rec.training.train import WORKER_ENVIRONMENT

PEERS = ("rectools", "plain", "recbole")


def main() -> None:
    parser = options("Training speed of ours and of the peers.")
    parser.add_argument(
        "--data", default="data/ml-100k", help=f"directory with train_ratings.csv, or {SYNTHETIC_SHORT}"
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64], help="users an optimiser step, of all")
    parser.add_argument("--max-len", type=int, help=f"default: 200, and 50 for {SYNTHETIC_SHORT}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each implementation has its turn")
    parser.add_argument("--seconds", type=float, default=10, help="measured in each turn, after the warm-up")
    parser.add_argument("--peers", default="rectools,plain", help=f"of {','.join(PEERS)}")
    parser.add_argument("--beside", type=int, nargs="+", default=[0], help="processes that compute beside it")
    parser.add_argument("--optimizer", choices=("adam", "adamw", "muon"), default="adamw", help="of ours")
    parser.add_argument("--positions", choices=("learned", "rotary"), default="learned", help="of ours")
    parser.add_argument("--time-encodings", nargs="*", default=[], help="ours once more with each, for example gap")
    parser.add_argument("--before", metavar="DIR", help="a checkout of an earlier commit, for ours of then")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: ours alone")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of ours, on cuda")
    args = parser.parse_args()
    if args.device == "cuda":
        args.peers = ""
    elif args.precision != "32-true":
        parser.error("--precision is for --device cuda: the peers on the CPU compute in float32")
    peers = [name for name in args.peers.split(",") if name]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; expected some of {', '.join(PEERS)}")

    histories = read_histories(args.data, args.seed)
    max_len = args.max_len or (50 if args.data == SYNTHETIC_SHORT else 200)
    real = histories.lengths.clip(max=max_len)
    if args.time_encodings and histories.times is None:
        parser.error(f"--time-encodings: {args.data} has no times")
    contenders = _contenders(peers, args.threads, args.before, args.time_encodings)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "histories.npz")
        histories.save(path)
        for hidden in args.hidden:
            for batch_size in args.batch_size:
                workload = Workload(
                    data=path,
                    hidden=hidden,
                    max_len=max_len,
                    batch_size=batch_size,
                    seconds=args.seconds,
                    threads=args.threads,
                    seed=args.seed,
                    device=args.device,
                    precision=args.precision,
                    optimizer=args.optimizer,
                    position_encoding=args.positions,
                )
                for beside in args.beside:
                    rows += _measure(workload, contenders, args.repeats, len(histories.item_ids), args.data, beside)
    notes = [
        f"Data: {args.data}, {histories}; {1 - real.mean() / max_len:.0%} padding at max_len {max_len}. 2 layers, mask "
        f"0.2, dropout 0.2, {args.device}, {args.precision}, {args.threads} threads; seed {args.seed}; medians of "
        f"{args.repeats} turns of at least {args.seconds:g} s, in turn.",
        "Tokens are real ones; useful FLOP: `training_flops` in benchmarks/common.py; peak: the fastest square product "
        "in the same call, and their mean speed (sustained); memory: of the whole process, its libraries included; "
        "input: share of the time in which training waits for its next step. Ours: a worker of one thread a core, as a "
        "job has by default, and its memory is one worker's.",
    ]
    publish("training" if args.beside == [0] else "busy", notes, rows, args.record)


class Contender(NamedTuple):
    """One implementation, and how it is run."""

    module: str
    python: str = ""
    root: str = ""
    environment: Mapping[str, str] = MappingProxyType({})
    loader_workers: int = 0
    workers: int = 1
    time_encoding: str = "none"


def _contenders(peers: list[str], threads: int, before: str | None, time_encodings: list[str]) -> dict[str, Contender]:
    """Ours as a job runs it by default, a worker of one thread a core; ours in one process; and the peers."""
    found = {"ours": Contender("benchmarks.ours", environment=WORKER_ENVIRONMENT, workers=threads)}
    for encoding in time_encodings:
        found[f"ours, time_encoding {encoding}"] = found["ours"]._replace(time_encoding=encoding)
    if threads > 1:
        found["ours, one process"] = Contender("benchmarks.ours", environment=WORKER_ENVIRONMENT)
    if before:
        spin = {"GOMP_SPINCOUNT": WORKER_ENVIRONMENT["GOMP_SPINCOUNT"]}
        found["ours before, one process"] = Contender("benchmarks.ours", root=before, environment=spin)
    if "plain" in peers:
        found |= {f"plain, {n} loader processes": Contender("benchmarks.plain", loader_workers=n) for n in (0, 2)}
    if "rectools" in peers:
        found["RecTools 0.19"] = Contender("benchmarks.rectools_peer", rectools_environment())
    if "recbole" in peers:
        found["RecBole 1.2.1"] = Contender("benchmarks.recbole_peer", recbole_environment())
    return found


def _measure(
    workload: Workload, contenders: dict[str, Contender], repeats: int, num_items: int, data: str, beside: int
) -> list[dict[str, str]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    peaks: list[dict[str, float]] = []
    for _ in range(repeats):
        peaks.append(run("benchmarks.ours", replace(workload, task="peak", seconds=6)))
        for name, each in contenders.items():
            own = replace(workload, loader_workers=each.loader_workers, workers=each.workers)
            own = replace(own, time_encoding=each.time_encoding)
            with busy(beside):
                ran = run(each.module, own, each.python, each.root, each.environment)
            flops = training_flops(workload, ran["tokens"], ran["squares"], num_items)
            ran |= {f"{key}_rate": ran[key] / ran["seconds"] for key in ("tokens", "users")}
            results[name].append({**ran, "flops_rate": flops / ran["seconds"]})
    ours = median(results["ours"], "tokens_rate")
    return [
        {
            "data": data,
            "hidden": str(workload.hidden),
            "users a step": str(workload.batch_size),
            "beside": f"{beside} busy process{'es' * (beside != 1)}",
            "implementation": name,
            "tokens/s": f"{median(ran, 'tokens_rate'):,.0f}",
            "spread": spread(ran, "tokens_rate"),
            "users/s": f"{median(ran, 'users_rate'):,.0f}",
            "useful GFLOP/s": f"{median(ran, 'flops_rate') / 1e9:.1f}",
            "share of peak": share_of_peak(median(ran, "flops_rate"), peaks),
            "memory, MiB": f"{median(ran, 'memory') / 2**20:,.0f}",
            "input": f"{median(ran, 'input_share'):.1%}" if "input_share" in ran[0] else "",
            "ours is": "" if name == "ours" else f"{ours / median(ran, 'tokens_rate'):.1f}×",
        }
        for name, ran in results.items()
    ]


if __name__ == "__main__":
    main()
