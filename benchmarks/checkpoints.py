"""What saving in the middle of epochs costs: `python -m benchmarks.checkpoints --data data/ml-1m`.

The same training through the job, in turn: without such saves; with one every ten minutes, as by default; and as often
as `worker.MOST_OF_THE_TIME` lets it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import median, options, publish, spread

MINUTES = {"none": 1e9, "every 10 minutes": 10.0, "as often as it may": 1e-6}


def main() -> None:
    parser = options("Training with checkpoints by time and without.")
    parser.add_argument("--data", default="data/ml-100k", help="directory with train_ratings.csv")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each has its turn")
    args = parser.parse_args()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in MINUTES}
    with tempfile.TemporaryDirectory() as directory:
        common = [
            f"data.data_dir={args.data}",
            f"data.batch_size={args.batch_size}",
            f"data.seed={args.seed}",
            f"model.hidden_units={args.hidden}",
            "model.num_heads=2",
            f"training.num_epochs={args.epochs}",
            f"training.num_workers={args.workers}",
            f"run.storage_path={directory}",
        ]
        _run("prepare", common)
        for turn in range(args.repeats):
            for name, minutes in MINUTES.items():
                run = f"{name}, turn {turn}".replace(" ", "-").replace(",", "")
                _run("train", [*common, f"training.checkpoint_minutes={minutes}", f"run.name={run}"])
                history = json.loads(Path(directory, run, "run.json").read_text())["history"]
                times[name].append({"seconds": sum(epoch["seconds"] for epoch in history)})
    rows = [
        {
            "hidden": str(args.hidden),
            "saves in the middle of epochs": name,
            "seconds": f"{median(found, 'seconds'):.1f}",
            "spread": spread(found, "seconds"),
            "of the time without": f"{median(found, 'seconds') / median(times['none'], 'seconds'):.3f}×",
        }
        for name, found in times.items()
    ]
    notes = [
        f"Data: {args.data}; hidden {args.hidden}, {args.batch_size} users a step, {args.epochs} epochs, "
        f"{args.workers} workers; seconds of the epochs' steps, without validation; medians of {args.repeats} turns."
    ]
    publish("checkpoints", notes, rows, args.record)


def _run(job: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", f"jobs.{job}", *arguments, "training.early_stopping=false"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "RAY_worker_niceness": "0"})


if __name__ == "__main__":
    main()
