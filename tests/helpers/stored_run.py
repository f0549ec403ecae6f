"""Makes the small run in tests/stored, whose metrics a test computes again.

`python -m tests.helpers.stored_run` makes it again.

The items form a ring of 80, and each of 200 users moves along it, mostly to the next item.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bert4rec import evaluate, prepare, train
from bert4rec.config import Config, load_config
from bert4rec.evaluation.evaluate import Evaluation

STORED = Path(__file__).parents[1] / "stored"
NUM_ITEMS = 80


def config_of(root: Path | str, *overrides: str) -> Config:
    """All settings of the run. It writes to `root`."""
    return load_config(
        None,
        [
            f"data.data_dir={STORED}",
            f"run.storage_path={root}",
            "run.name=run",
            "data.holdout=2",
            "data.batch_size=32",
            "data.seed=7",
            "model.hidden_units=16",
            "model.num_heads=2",
            "model.num_layers=2",
            "model.max_len=20",
            "model.dropout_rate=0.1",
            "training.lr=0.01",
            "training.num_epochs=80",
            "training.val_check_interval=40",
            "training.early_stopping=false",
            "evaluation.protocols=[all, all-with-seen, popularity-100, uniform-100]",
            "evaluation.baselines=[popularity]",  # ties of the item-item models differ between machines
            *overrides,
        ],
    )


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation without its paths, as JSON would return it."""
    content = asdict(evaluation)
    del content["checkpoint"], content["dataset"]
    return json.loads(json.dumps(content))  # type: ignore[no-any-return]


def write_ratings() -> None:
    """Each user starts at a random item and moves on by 1 (60%) or by up to 6 places; repeated items are dropped."""
    rng = np.random.default_rng(7)
    lines = ["user,item,time"]
    for user in range(1, 201):
        length = rng.integers(6, 30)
        steps = np.where(rng.random(length) < 0.6, 1, rng.integers(1, 7, length))
        walk = (rng.integers(NUM_ITEMS) + np.cumsum(steps)) % NUM_ITEMS + 1
        lines += [f"{user},{item},{1_000_000 + 60 * n + user}" for n, item in enumerate(dict.fromkeys(walk.tolist()))]
    (STORED / "train_ratings.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir()
    write_ratings()
    root = STORED / "runs"
    config = config_of(root)
    dataset = prepare(config)
    checkpoint = train(config, dataset).best_checkpoint
    shutil.copytree(checkpoint, STORED / "model", ignore=shutil.ignore_patterns("training_state*", "items*", "*.md"))
    metrics = metrics_of(evaluate(config, dataset, checkpoint))
    (STORED / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
