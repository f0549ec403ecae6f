"""What changed settings are worth on the validation: `python -m benchmarks.ablation "" "model.dropout_rate=0.5"`.

Each row is one training with the overrides of one argument, in this process, without Ray. The test split is not
looked at.
"""

import argparse
import shutil
from pathlib import Path

import torch

from benchmarks.common import add_record, publish
from benchmarks.times import Printed
from bert4rec.config import Config, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.training.worker import read_sequences, run_epochs


def row_of(change: str, config: Config, keep: Path | None) -> dict[str, str]:
    """A row: losses and NDCG@10 of each validated epoch, joined by slashes. `keep` gets the last model directory."""
    dataset = PreparedDataset(config.prepared_path)

    def report(metrics: dict[str, float], name: str, directory: str | None, in_background: bool) -> None:
        assert directory is not None
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(directory, keep)
        shutil.rmtree(directory)

    history = run_epochs(config, dataset, read_sequences(config, dataset), report=report, progress=Printed())
    return {
        "change": f"`{change}`" if change else "nothing",
        "epochs": " / ".join(f"{epoch['epoch']:.0f}" for epoch in history),
        "loss": " / ".join(f"{epoch['train_loss']:.3f}" for epoch in history),
        "NDCG@10": " / ".join(f"{epoch['val_ndcg@10']:.4f}" for epoch in history),
        "HR@10": f"{history[-1]['val_hr@10']:.4f}",
        "seconds an epoch": f"{sum(epoch['seconds'] for epoch in history) / len(history):.0f}",
        "seed": str(config.data.seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation metrics of changed settings.")
    parser.add_argument("changes", nargs="+", help="a row each: overrides, separated by blanks; none for the config")
    parser.add_argument("--config", default="configs/short-histories.yaml")
    parser.add_argument("--data", default="data/toys", help="prepared with the config before")
    parser.add_argument("--runs", default="runs", help="where it was prepared (run.storage_path)")
    parser.add_argument("--all", default="", metavar="OVERRIDES", help="of all rows")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for the model directory of each row, by its number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--table", choices=["short_ablations", "causal"], default="short_ablations", help="to record in"
    )
    add_record(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fixed = [f"data.data_dir={args.data}", f"run.storage_path={args.runs}", "training.checkpoint_minutes=1000000"]
    for number, change in enumerate(args.changes):
        config = load_config(args.config, [*fixed, *args.all.split(), *change.split()])
        row = row_of(change, config, args.keep and args.keep / str(number))
        note = (
            f"{args.data}, {args.config}{' ' * bool(args.all)}{args.all}, seed {config.data.seed}, {args.threads} "
            "thread; validation, all items without the seen ones."
        )
        publish(args.table, [note], [row], args.record)


if __name__ == "__main__":
    main()
