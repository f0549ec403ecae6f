"""Makes the prepared dataset from ratings and metadata: `python -m jobs.prepare [--config FILE] [group.key=value
...]`."""

from bert4rec.cli import run_job
from bert4rec.cluster.resources import begin
from bert4rec.config import Config
from bert4rec.data.movielens import fetch_if_default
from bert4rec.data.prepare import prepare


def prepare_dataset(config: Config) -> str:
    """Prepare the config's data, and download MovieLens-100K if it is the default. Return the dataset's directory."""
    fetch_if_default(config.data.data_dir)
    manifest = prepare(config.data, config.prepared_path, print, lambda: begin(config, meanwhile=("ray.data",)))
    for note in manifest.notes:
        print(f"note: {note}")
    print(
        f"prepared {manifest.num_interactions:,} interactions of {manifest.num_users:,} users with "
        f"{manifest.num_items:,} items: {config.prepared_path}"
    )
    return config.prepared_path


if __name__ == "__main__":
    run_job("Build user sequences and the catalogue from the input files.", prepare_dataset, prepares=True)
