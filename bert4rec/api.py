"""The five steps as functions of a config, for notebooks and programs. The package `bert4rec` exports them.

Each function joins the cluster of RAY_ADDRESS or starts Ray on this machine, unless Ray already runs.
"""

from bert4rec.cluster.resources import begin
from bert4rec.config import Config
from bert4rec.data.movielens import fetch_if_default
from bert4rec.data.prepare import prepare as _prepare
from bert4rec.embedding.embed import EmbedResult, embed_titles, read_texts
from bert4rec.evaluation.evaluate import Evaluation
from bert4rec.evaluation.evaluate import evaluate as _evaluate
from bert4rec.inference.recommend import RecommendResult
from bert4rec.inference.recommend import recommend as _recommend
from bert4rec.model.average import checkpoint_and_output
from bert4rec.training.train import TrainResult
from bert4rec.training.train import train as _train


def prepare(config: Config) -> str:
    """Write the prepared dataset of config.data, unless it exists already. Return its directory.

    If config.data.data_dir is the default and does not exist, this downloads MovieLens-100K.

    Raises
    ------
    InputError
        If an input file is missing or cannot be used.
    """
    fetch_if_default(config.data.data_dir)
    manifest = _prepare(config.data, config.prepared_path, print, lambda: begin(config, meanwhile=("ray.data",)))
    for note in manifest.notes:
        print(f"note: {note}")
    return config.prepared_path


def embed(config: Config) -> EmbedResult:
    """Write the title embeddings of config.embedding, which training then uses (`model.use_title_emb`).

    Raises
    ------
    InputError
        If there are no titles, or the encoder is not available.
    """
    fetch_if_default(config.data.data_dir)
    texts = read_texts(config.data.data_dir, config.embedding.with_genres, config.data.list_separator)
    return embed_titles(config, texts)


def train(config: Config, path: str) -> TrainResult:
    """Train on the prepared dataset at `path`, or continue an unfinished run with the same config.

    If that run is finished, return its result.

    Raises
    ------
    InputError
        If there is no such dataset, or it does not suit the config.
    """
    return _train(config, path)


def evaluate(config: Config, path: str, checkpoint: str) -> Evaluation:
    """Measure a model directory and the baselines on the held-out items of the prepared dataset at `path`.

    Raises
    ------
    InputError
        If the model belongs to other data, or its training has seen the held-out items.
    """
    return _evaluate(config, path, checkpoint)


def recommend(config: Config, path: str, checkpoint: str, output_path: str | None = None) -> RecommendResult:
    """Write the top items of every user of the prepared dataset at `path` as Parquet and CSV.

    Without `output_path` they go to config.inference.output_path, or to `recommendations` beside the model directory.

    Raises
    ------
    InputError
        If the model belongs to other data, or the output directory is not writable.
    """
    return _recommend(config, path, checkpoint, output_path or checkpoint_and_output(config, checkpoint)[1])
