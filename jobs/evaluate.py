"""Model and popularity on the held-out items: `python -m jobs.evaluate [--config FILE] [group.key=value ...]`."""

from bert4rec.cli import checkpoint_and_output, run_job, table_of_metrics
from bert4rec.config import Config
from bert4rec.evaluate import evaluate, evaluated_split


def evaluate_model(config: Config, checkpoint: str | None = None) -> None:
    """Print the metrics of `checkpoint` (default: the config's) beside popularity's."""
    checkpoint = checkpoint or checkpoint_and_output(config)[0]
    metrics = evaluate(config, config.prepared_path, checkpoint)
    seen = "without" if config.evaluation.exclude_seen else "with"
    print(f"{evaluated_split(config)} split, all items ranked {seen} the user's seen ones, {checkpoint}")
    print(table_of_metrics(metrics))


if __name__ == "__main__":
    run_job("Rank each user's held-out item among all items.", evaluate_model)
