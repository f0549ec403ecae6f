"""Runs the jobs from ratings to top-k files: `python -m jobs.pipeline [--config FILE] [group.key=value ...]`."""

import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.inference.recommend import PARQUET, check_request
from jobs.embed import embed_items
from jobs.evaluate import evaluate_model
from jobs.prepare import prepare_dataset
from jobs.recommend import recommend_all
from jobs.report import report_run
from jobs.train import train_model

SHOWN_USERS, SHOWN_ITEMS = 5, 5


def run_pipeline(config: Config) -> None:
    """Run all steps, then show recommendations of a few users."""
    if config.model.use_title_emb:
        embed_items(config)
    dataset = PreparedDataset(prepare_dataset(config))
    # Training chooses the run's own directory, which will be in storage_path.
    check_request(config.inference, dataset, storage.absolute(config.inference.output_path or config.run.storage_path))
    result = train_model(config)
    if not config.data.use_full_data:
        evaluate_model(config, result.best_checkpoint)
    output_path = recommend_all(config, result.best_checkpoint)
    if "parquet" in config.inference.formats:
        _show_users(dataset, output_path)
    print()
    report_run(result.run_path, dataset.path, output_path)


def _show_users(dataset: PreparedDataset, output_path: str) -> None:
    """Print the last items and the first recommendations of a few users, by title."""
    items = dataset.items()
    ids, names = items.ids.to_pylist(), dataset.names()
    title_of = dict(zip(ids, names, strict=True))
    first = dataset.parts()[0]
    sequences = dataset.read_part(first)
    filesystem, inner = storage.open_store(storage.join(output_path, PARQUET, f"part-{first.number:05d}.parquet"))
    recommended = pq.read_table(inner, filesystem=filesystem).to_pylist()
    for user in range(min(SHOWN_USERS, len(sequences))):
        user_id = sequences.users[user].as_py()
        history = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        print(f"\nuser {user_id}, {len(history)} interactions; the last:")
        print("".join(f"    {title_of[ids[token - 1]]}\n" for token in history[-SHOWN_ITEMS:]), end="")
        print("  recommended:")
        best = [row for row in recommended if row["user"] == user_id][:SHOWN_ITEMS]
        print("".join(f"    {row['rank']}. {title_of[row['item']]}  ({row['score']:.2f})\n" for row in best), end="")


if __name__ == "__main__":
    run_job("Prepare, train, evaluate, recommend and report.", run_pipeline, prepares=True)
