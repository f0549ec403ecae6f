"""Search for the best settings: `python -m jobs.tune [--config FILE] [group.key=value ...]`."""

from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.progress import duration
from bert4rec.tune.outputs import ranked
from bert4rec.tune.tune import SHOWN_BEST, TuneResult, table, tune


def tune_model(config: Config) -> TuneResult:
    """Search on the prepared dataset and print a summary."""
    result = tune(config, config.prepared_path)
    trials, monitor = result.trials, config.monitor
    statuses = [trial.status for trial in trials]
    counts = {status: statuses.count(status) for status in ("finished", "stopped", "failed", "crashed", "running")}
    print(
        f"{len(trials)} trials in {duration(result.seconds)}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
    )
    if result.epochs_spared:
        total = sum(trial.epochs for trial in trials) + result.epochs_spared
        print(f"asha spared {result.epochs_spared:,} of {total:,} epochs ({result.epochs_spared / total:.0%})")
    print(f"the best {SHOWN_BEST}:\n{table(ranked(trials, monitor)[:SHOWN_BEST], monitor)}")
    print(f"best model: {result.best_checkpoint}\nbest config: {result.best_config}")
    if result.refit:
        print(f"model of the full data: {result.refit.last_checkpoint}")
    print("trials: " + " ".join(result.files))
    return result


if __name__ == "__main__":
    run_job("Search for the best settings.", tune_model)
