"""How long jobs take to begin, before and after: `python -m benchmarks.start --before DIR`.

A job of the earlier checkout and one of this one take turns, on MovieLens-100K. The first step of `jobs.train` is that
of its first epoch: the time from the command to the first checkpoint, without that epoch's own seconds. Validation and
the checkpoint of so small a model, under half a second, are in it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import add_record, publish

ROOT = str(Path(__file__).parent.parent)
SETTINGS = ("--config", "configs/ml-100k.yaml", "training.num_epochs=1")


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Seconds until jobs begin, and jobs that have little to do.")
    parser.add_argument("--before", metavar="DIR", help="a checkout of an earlier commit")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each has its turn")
    add_record(parser)
    args = parser.parse_args()
    versions = {"now": ROOT} | ({"before": args.before} if args.before else {})
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, root in versions.items():
            _run(root, "prepare", f"run.storage_path={directory}/{name}")
        for turn in range(args.repeats):
            for name, root in versions.items():
                place = f"{directory}/{name}"
                common = (f"run.storage_path={place}", f"data.data_dir={root}/data/ml-100k")
                run = f"run.name=run{turn}"
                for job, seconds in {
                    "jobs.prepare, up to date": _run(root, "prepare", f"run.storage_path={place}"),
                    "jobs.train, first step": _first_step(root, place, run),
                    "jobs.train, found trained": _run(root, "train", f"run.storage_path={place}", run),
                    "jobs.recommend, 943 users": _run(root, "recommend", f"run.storage_path={place}", run),
                    "jobs.train, no prepared dataset": _run(root, "train", *common[1:], f"run.storage_path={place}/no"),
                }.items():
                    times.setdefault((job, name), []).append(seconds)
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    rows = [
        {
            "claim": f"{job}{'' if name == 'now' else ', before'}",
            "seconds": f"{medians[job, name]:.1f}",
            "spread": f"{min(seconds):.1f}–{max(seconds):.1f}",
            "of before": f"{medians[job, name] / medians[job, 'before']:.2f}×" if (job, "before") in times else "",
        }
        for (job, name), seconds in sorted(times.items())
    ]
    publish("start", [f"MovieLens-100K, configs/ml-100k.yaml; medians of {args.repeats} turns."], rows, args.record)


def _run(root: str, job: str, *overrides: str) -> float:
    """Wall time of a job of the checkout `root`; one that ends with the user's mistake counts as well."""
    began = time.time()
    command = [sys.executable, "-m", f"jobs.{job}", *SETTINGS, *overrides]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 2):
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return time.time() - began


def _first_step(root: str, place: str, run: str) -> float:
    began = time.time()
    _run(root, "train", f"run.storage_path={place}", run)
    directory = Path(place, run.removeprefix("run.name="))
    (checkpoint,) = directory.glob("bert4rec-01-*")
    (epoch,) = json.loads((directory / "run.json").read_text())["history"]
    return os.stat(checkpoint / "training_state.pt").st_mtime - began - float(epoch["seconds"])


if __name__ == "__main__":
    main()
