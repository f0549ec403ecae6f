"""Trains a model on a prepared dataset: `python -m jobs.train [--config FILE] [group.key=value ...]`."""

from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.progress import duration
from bert4rec.training.train import TrainResult, train


def train_model(config: Config) -> TrainResult:
    """Train on the prepared dataset and print a summary."""
    result = train(config, config.prepared_path)
    best = result.best_metrics
    print(
        f"trained {int(result.history[-1]['epoch'])} epochs in {duration(result.seconds)}; best epoch "
        f"{int(best['epoch'])}: {config.monitor} {best[config.monitor]:.4f}"
    )
    gates = {name.removeprefix("val_gate/"): value for name, value in best.items() if name.startswith("val_gate/")}
    if gates:
        print("mean gates: " + ", ".join(f"{name} {value:.2f}" for name, value in gates.items()))
    print(f"best model: {result.best_checkpoint}\ncurves: tensorboard --logdir {result.run_path}")
    return result


if __name__ == "__main__":
    run_job("Train BERT4Rec on the prepared dataset.", train_model)
