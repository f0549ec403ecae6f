"""What Ray costs a training: the job against the same loop in one process without it: `python -m benchmarks.ray_cost`.

Whole processes are timed, from their start to the last checkpoint on disk, on a dataset prepared beforehand. With
--workers, the job also with that many DDP workers, the cores shared among them; more workers than cores show what each
of them costs, not what another machine would gain.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.common import options, publish

BARE = "without Ray"


def main() -> None:
    parser = options("Training through the job against the same loop without Ray.")
    parser.add_argument("--data", default="data/ml-100k", help="directory with train_ratings.csv")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each has its turn")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        common = [
            f"data.data_dir={args.data}",
            f"data.batch_size={args.batch_size}",
            f"data.seed={args.seed}",
            f"model.hidden_units={args.hidden}",
            f"model.max_len={args.max_len}",
            "model.num_heads=2",
            f"training.num_epochs={args.epochs}",
            "training.early_stopping=false",
            f"run.storage_path={directory}",
        ]
        _seconds([sys.executable, "-m", "jobs.prepare", *common], args.threads)
        commands = {BARE: [sys.executable, "-m", "benchmarks.ray_cost_bare", os.path.join(directory, "bare"), *common]}
        job = [sys.executable, "-m", "jobs.train", *common, "run.name=job"]
        for number in args.workers:
            name = f"job, {number} worker{'s' if number > 1 else ''}"
            commands[name] = [*job, f"training.num_workers={number}"]
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                shutil.rmtree(os.path.join(directory, "job"), ignore_errors=True)
                times[name].append(_seconds(command, args.threads))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [
        {
            "hidden": str(args.hidden),
            "run": name,
            "seconds": f"{seconds:.1f}",
            "spread": f"{min(times[name]):.1f}–{max(times[name]):.1f}",
            "of the time without Ray": "" if name == BARE else f"{seconds / medians[BARE]:.2f}×",
        }
        for name, seconds in medians.items()
    ]
    notes = [
        f"Data: {args.data}; hidden {args.hidden}, max_len {args.max_len}, {args.batch_size} users a step, "
        f"{args.epochs} epochs, each with validation and a checkpoint; {args.threads} cores in all; seed {args.seed}; "
        f"medians of {args.repeats} turns, whole processes."
    ]
    publish("ray_cost", notes, rows, args.record)


def _seconds(command: list[str], threads: int) -> float:
    """Wall time of a process; of its threads the job itself decides."""
    if "benchmarks.ray_cost_bare" in command:
        limits = {"OMP_NUM_THREADS": str(threads)}
    else:  # more workers than cores share them: Ray counts logical ones
        workers = max([threads, *(int(each.split("=")[1]) for each in command if "num_workers" in each)])
        limits = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": workers})}
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
