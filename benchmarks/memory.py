"""Memory of a training worker, epoch by epoch: `python -m benchmarks.memory --data data/ml-1m`.

The worker's own loop, in this process with one thread, with the environment that the job gives its workers.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from benchmarks.common import add_record, publish
from bert4rec.training.train import WORKER_ENVIRONMENT


def main() -> None:
    parser = argparse.ArgumentParser(description="MiB that a training worker holds after each epoch.")
    parser.add_argument("--config", default="configs/ml-1m.yaml")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    add_record(parser)
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in WORKER_ENVIRONMENT.items()):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]],
            {**os.environ, **WORKER_ENVIRONMENT},
        )
    import torch

    from bert4rec.config import load_config
    from bert4rec.data.dataset import PreparedDataset
    from bert4rec.training.worker import run_epochs

    torch.set_num_threads(1)
    settings = [f"training.num_epochs={args.epochs}", "training.early_stopping=false", *args.overrides]
    config = load_config(args.config, settings)
    dataset = PreparedDataset(config.prepared_path)
    curve: list[float] = []

    class Watch:
        """Takes a worker's progress, and looks at its memory at the end of each epoch."""

        def advance(self, amount: float, text: str = "", always: bool = False) -> None:
            epoch = int(text.split("/")[0].removeprefix("epoch "))
            if epoch > len(curve) + 1:
                curve.append(held())

        def record(self, metrics: dict[str, float]) -> None:
            """Nothing to keep."""

        def skip(self, amount: float) -> None:
            """Nothing to skip."""

    def report(metrics: dict[str, float], name: str, directory: str | None, in_background: bool) -> None:
        if directory is not None:
            shutil.rmtree(directory)

    run_epochs(config, dataset, dataset.sequences(), report=report, progress=Watch())
    curve.append(held())
    after = curve[1]
    shown = sorted({1, 2, 3, 5, 10, 20, 30, len(curve)})
    rows = [
        {
            "claim": f"hidden {config.model.hidden_units}, after epoch {epoch}",
            "MiB": f"{curve[epoch - 1]:,.0f}",
            "of epoch 2": f"{curve[epoch - 1] / after:.2f}×",
        }
        for epoch in shown
        if epoch <= len(curve)
    ]
    notes = [f"{args.config}, one thread; most after epoch 2: {max(curve[1:]) / after:.2f}× of what it held then."]
    publish("memory", notes, rows, args.record)


def held() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
