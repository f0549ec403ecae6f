"""Top-k for every user: `python -m jobs.recommend [--config FILE] [group.key=value ...]`."""

from bert4rec.cli import checkpoint_and_output, run_job
from bert4rec.config import Config
from bert4rec.progress import duration
from bert4rec.recommend import CSV, PARQUET, recommend


def recommend_all(config: Config, checkpoint: str | None = None) -> str:
    """Write recommendations from `checkpoint` (default: the config's); the output directory."""
    checkpoint, output_path = checkpoint_and_output(config, checkpoint)
    result = recommend(config, config.prepared_path, checkpoint, output_path)
    rate = f", {result.num_users / result.seconds:,.0f} users/s" if result.seconds > 1 else ""
    print(
        f"{result.num_rows:,} recommendations for {result.num_users:,} users in {duration(result.seconds)}{rate}; "
        f"{result.num_short_users:,} users have fewer than {config.inference.topk}"
    )
    names = {"parquet": PARQUET, "csv": CSV}
    print("\n".join(f"{form}: {output_path}/{names[form]}" for form in config.inference.formats))
    return output_path


if __name__ == "__main__":
    run_job("Write the top items of every user.", recommend_all)
