"""What each `model.time_encoding` is worth: `python -m benchmarks.times --encodings none gap`.

Trains in this process, without Ray, and measures on the validation; `--test DIR` measures kept models on the test.
"""

import argparse
import re
import shutil
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.common import add_record, publish
from bert4rec.config import Config, QueryTime, load_config
from bert4rec.data.dataset import PreparedDataset, Sequences
from bert4rec.data.windows import Windows, held_out
from bert4rec.evaluation.metrics import RankCounts, hit_rate, ndcg
from bert4rec.inference.ranking import Exclusions, rank_of_target, score_next
from bert4rec.model.network import BERT4Rec
from bert4rec.training.card import CARD
from bert4rec.training.loop import VALIDATION_USERS
from bert4rec.training.worker import run_epochs

QUERY_TIMES = ("target", "last", "with the item before")


class Printed:
    """Prints each validated epoch."""

    def advance(self, amount: float, text: str = "", always: bool = False) -> None:
        pass

    def record(self, metrics: dict[str, float]) -> None:
        print(metrics, flush=True)

    def skip(self, amount: float) -> None:
        pass


def measured(
    config: Config, model: BERT4Rec, sequences: Sequences, split: Literal["validation", "test"] = "validation"
) -> dict[str, tuple[float, float]]:
    """HR@10 and NDCG@10 of a split by the query's time; the same for all of a model without times."""
    windows, found = Windows.from_sequences(sequences), {}
    for name in QUERY_TIMES if model.config.time_parts else QUERY_TIMES[:1]:
        query_time: QueryTime = "target" if name == "target" else "last"
        gap = 0 if name == QUERY_TIMES[2] else model.usual_gap
        histories, targets = held_out(windows, config.data, split, sequences.before, query_time, gap)
        ranks = RankCounts.empty(model.num_items)
        for users in torch.split(torch.arange(len(histories)), VALIDATION_USERS):
            own = histories.users(users)
            ranks.add(rank_of_target(score_next(model, own), Exclusions.of(own), targets[users], model.num_items))
        found[name] = hit_rate(ranks, 10), ndcg(ranks, 10)
    return {name: found.get(name, found["target"]) for name in QUERY_TIMES}


def train(config: Config, sequences: Sequences, keep: str | None) -> dict[str, str]:
    """A row: losses and NDCG@10 of each validated epoch, joined by slashes. `keep` gets the model directories."""
    dataset = PreparedDataset(config.prepared_path)
    by_epoch: list[dict[str, tuple[float, float]]] = []
    losses: list[float] = []
    began = time.monotonic()

    def report(metrics: dict[str, float], name: str, directory: str | None, in_background: bool) -> None:
        assert directory is not None
        if keep is not None:
            shutil.copytree(directory, f"{keep}/{config.model.time_encoding}-{config.data.seed}-{name}")
        losses.append(metrics["train_loss"])
        by_epoch.append(measured(config, BERT4Rec.from_pretrained(directory), sequences))
        shutil.rmtree(directory)
        print(config.model.time_encoding, int(metrics["epoch"]), metrics["train_loss"], by_epoch[-1], flush=True)

    history = run_epochs(config, dataset, sequences, report=report, progress=Printed())
    epochs = [int(metrics["epoch"]) for metrics in history]
    return row_of(config, epochs, losses, by_epoch) | {"minutes": f"{(time.monotonic() - began) / 60:.0f}"}


def measure(config: Config, sequences: Sequences, kept: Path) -> dict[str, str]:
    """The same row, of the model directories in `kept`, which `train` kept there: one after another, by epoch."""
    paths = kept_models(config, kept)
    by_epoch, losses = [], []
    for path in paths:
        by_epoch.append(measured(config, BERT4Rec.from_pretrained(str(path)), sequences))
        losses.append(re.search(r"\| train_loss \| ([\d.]+) \|", (path / CARD).read_text())[1])  # type: ignore[index]
    return row_of(config, [kept_epoch(path) for path in paths], [float(loss) for loss in losses], by_epoch)


def kept_models(config: Config, kept: Path) -> list[Path]:
    """The model directories of this encoding and seed in `kept`, by epoch."""
    paths = list(kept.glob(f"{config.model.time_encoding}-{config.data.seed}-bert4rec-*"))
    if not paths:
        raise SystemExit(f"{kept}: no model of {config.model.time_encoding}, seed {config.data.seed}")
    return sorted(paths, key=kept_epoch)


def kept_epoch(path: Path) -> int:
    return int(path.name.rpartition("bert4rec-")[2].partition("-")[0])


def test(configs: list[Config], sequences: Sequences, kept: Path) -> dict[str, str]:
    """A row of the test, over the seeds of `configs`: of each, the model of the best NDCG@10 on the validation."""
    found: list[dict[str, tuple[float, float]]] = []
    epochs: list[int] = []
    for config in configs:
        models = {kept_epoch(path): BERT4Rec.from_pretrained(str(path)) for path in kept_models(config, kept)}
        validated = {epoch: measured(config, model, sequences)["last"][1] for epoch, model in models.items()}
        epochs.append(max(validated, key=lambda epoch: validated[epoch]))
        found.append(measured(config, models[epochs[-1]], sequences, "test"))
    row = {"data": Path(configs[0].data.data_dir).name, "width": str(configs[0].model.hidden_units)}
    row |= {"encoding": configs[0].model.time_encoding, "epoch chosen": " / ".join(map(str, epochs))}
    for place, metric in enumerate(("HR@10", "NDCG@10")):
        for name in QUERY_TIMES:
            values = [each[name][place] for each in found]
            error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
            row[f"{metric}, {name}"] = f"{np.mean(values):.4f}{error}"
    return row


def row_of(
    config: Config, epochs: list[int], losses: list[float], by_epoch: list[dict[str, tuple[float, float]]]
) -> dict[str, str]:
    columns = {"NDCG@10, " + name: " / ".join(f"{each[name][1]:.4f}" for each in by_epoch) for name in QUERY_TIMES}
    return {
        "data": Path(config.data.data_dir).name,
        "width": str(config.model.hidden_units),
        "encoding": f"`{config.model.time_encoding}`, {config.model.position_encoding} positions",
        "epochs": " / ".join(map(str, epochs)),
        "loss": " / ".join(f"{loss:.3f}" for loss in losses),
        **columns,
        "HR@10, last": f"{by_epoch[-1]['last'][0]:.4f}",
        "seed": str(config.data.seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation metrics of time encodings.")
    parser.add_argument("--config", default="configs/ml-1m.yaml")
    parser.add_argument("--data", default="data/ml-1m-times", help="prepared with the config before")
    parser.add_argument("--runs", default="runs", help="where it was prepared (run.storage_path)")
    parser.add_argument("--encodings", nargs="+", default=["none", "rotary", "gap", "bias", "calendar", "rotary+gap"])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--positions", default="rotary")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--validate-every", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--keep", metavar="DIR", help="for the model directories")
    parser.add_argument("--kept", metavar="DIR", help="measure the models that lie there, instead of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test", metavar="DIR", help="measure on the test split, of the models there, by encoding")
    add_record(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for encoding in args.encodings:
        configs = [config_of(args, encoding, seed) for seed in args.seeds]
        with_times = bool(configs[0].model.time_parts)
        sequences = PreparedDataset(configs[0].prepared_path).sequences(with_times=with_times)
        seeds = ", ".join(map(str, args.seeds))
        notes = [
            f"{args.data}, {args.config}, width {args.hidden}, {args.heads} heads, {args.epochs} epochs, seed {seeds}, "
            f"{args.threads} thread; all items without the seen ones.",
            "NDCG@10 by when the [MASK] is asked for: at the target's own time, the usual time (the median gap) "
            "after the item before it, or at the same time as that.",
        ]
        if args.test:
            if configs[0].data.holdout < 2:
                parser.error(f"--test: {args.config} validates on the last items; expected data.holdout=2")
            publish("times_test", notes, [test(configs, sequences, Path(args.test))], args.record)
            continue
        for config in configs:
            row = measure(config, sequences, Path(args.kept)) if args.kept else train(config, sequences, args.keep)
            publish("times", notes, [row], args.record)


def config_of(args: argparse.Namespace, encoding: str, seed: int) -> Config:
    overrides = {
        "data.data_dir": args.data,
        "run.storage_path": args.runs,
        "data.seed": seed,
        "model.hidden_units": args.hidden,
        "model.num_heads": args.heads,
        "model.position_encoding": args.positions,
        "model.time_encoding": encoding,
        "training.num_epochs": args.epochs,
        "training.val_check_interval": args.validate_every,
        "training.checkpoint_minutes": 1_000_000,
    }
    return load_config(args.config, [f"{key}={value}" for key, value in overrides.items()])


if __name__ == "__main__":
    main()
