"""What metadata buy on MovieLens-100K: NDCG with and without them, and how items without interactions are ranked.

`python -m benchmarks.metadata [--seeds 1 2 3] [--epochs 80] [--record]`
"""

import argparse
import shutil
import statistics
import tempfile
import time

import numpy as np
import pandas as pd
import torch

from benchmarks.common import add_record, publish
from bert4rec.cluster.resources import begin
from bert4rec.config import Config, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.movielens import ensure_ml_100k
from bert4rec.data.prepare import prepare
from bert4rec.data.windows import Windows
from bert4rec.embedding.embed import embed_titles, read_texts
from bert4rec.evaluation.evaluate import evaluate
from bert4rec.inference.ranking import score_next
from bert4rec.model.network import BERT4Rec
from bert4rec.training.train import train

DATA = "data/ml-100k"
PRESET = "configs/ml-100k.yaml"
METADATA = ["model.use_genre_emb=true", "model.use_title_emb=true"]
VARIANTS = {
    "item ids alone": ["model.use_title_emb=false"],
    "genres and titles, gate": [*METADATA, "model.metadata_fusion=gate"],
    "genres and titles, add": [*METADATA, "model.metadata_fusion=add"],
    "genres and titles, concat": [*METADATA, "model.metadata_fusion=concat"],
    "genres and titles, gate, fused output": [*METADATA, "model.metadata_fusion=gate", "model.output_features=fused"],
}


def main() -> None:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="rows of the table, by name")
    add_record(parser)
    arguments = parser.parse_args()
    ensure_ml_100k(DATA)
    begin(load_config())
    with tempfile.TemporaryDirectory() as scratch:
        common = [f"run.storage_path={scratch}/runs", f"training.num_epochs={arguments.epochs}"]
        common += ["embedding.method=tfidf-svd", f"embedding.output_path={scratch}/titles.parquet"]
        embed_titles(config := load_config(PRESET, common), read_texts(DATA, config.embedding.with_genres))
        rows = _with_and_without(arguments.variants, arguments.seeds, common)
        new_items = _new_items(arguments.seeds, common, scratch)
    notes = [
        f"MovieLens-100K, {arguments.epochs} epochs, holdout 2, all items ranked without the seen ones, test split; "
        "tfidf-svd titles."
    ]
    publish("metadata", notes, rows, arguments.record)
    notes = [
        "A tenth of the items loses all its ratings; the model knows their titles and genres alone "
        "(`data.include_new_items=true`, fused output).",
        "AUC, for each user who had watched some of them: the chance that the model scores one that was watched above "
        "one that was not (0.5 is chance).",
    ]
    publish("new_items", notes, new_items, arguments.record)


def _with_and_without(variants: list[str], seeds: list[int], common: list[str]) -> list[dict[str, str]]:
    rows = []
    for variant in variants:
        ndcg, hit, seconds, gates = [], [], [], ""
        for seed in seeds:
            config = load_config(PRESET, [*common, "data.holdout=2", f"data.seed={seed}", *VARIANTS[variant]])
            prepare(config.data, config.prepared_path)
            result = train(config, config.prepared_path)
            metrics = evaluate(config, config.prepared_path, result.best_checkpoint).protocols["all"]["BERT4Rec"]
            ndcg.append(metrics["ndcg@10"])
            hit.append(metrics["hr@10"])
            seconds.append(result.seconds)
            best = result.best_metrics.items()
            gates = ", ".join(f"{name[9:]} {value:.2f}" for name, value in best if name.startswith("val_gate/"))
        rows.append(
            {
                "variant": variant,
                "NDCG@10": f"{statistics.mean(ndcg):.4f}",
                "spread": ", ".join(f"{value:.4f}" for value in ndcg),
                "HR@10": f"{statistics.mean(hit):.4f}",
                "gates": gates,
                "seconds a training": f"{statistics.median(seconds):.0f}",
            }
        )
    return rows


def _new_items(seeds: list[int], common: list[str], scratch: str) -> list[dict[str, str]]:
    """A tenth of the items is hidden from training: how do they rank among themselves for those who watched them?"""
    rows = []
    for seed in seeds:
        data_dir = f"{scratch}/hidden-{seed}"
        hidden = _hide_a_tenth(data_dir, seed)
        overrides = [*common, f"data.data_dir={data_dir}", "data.include_new_items=true", f"data.seed={seed}"]
        config = load_config(PRESET, [*overrides, *METADATA, "model.output_features=fused"])
        prepare(config.data, config.prepared_path)
        result = train(config, config.prepared_path)
        values = _auc(config, result.best_checkpoint, hidden)
        error = statistics.stdev(values) / len(values) ** 0.5
        rows.append(
            {
                "seed": str(seed),
                "hidden items": str(hidden["item"].nunique()),
                "users": str(len(values)),
                "AUC": f"{statistics.mean(values):.4f}",
                "standard error": f"{error:.4f}",
            }
        )
    return rows


def _hide_a_tenth(data_dir: str, seed: int) -> pd.DataFrame:
    """Copy the data without the ratings of a random tenth of the items; those ratings."""
    shutil.copytree(DATA, data_dir)
    ratings = pd.read_csv(f"{DATA}/train_ratings.csv")
    items = np.sort(ratings["item"].unique())
    chosen = np.random.default_rng(seed).choice(items, len(items) // 10, replace=False)
    is_hidden = ratings["item"].isin(chosen)
    ratings[~is_hidden].to_csv(f"{data_dir}/train_ratings.csv", index=False)
    return ratings[is_hidden]


def _auc(config: Config, checkpoint: str, hidden: pd.DataFrame) -> list[float]:
    """Of each user who watched some, not all, of the hidden items."""
    dataset = PreparedDataset(config.prepared_path)
    model = BERT4Rec.from_pretrained(checkpoint)
    first = dataset.num_items - dataset.manifest.num_new_items
    new_ids = dataset.items().ids.to_pylist()[first:]
    column = {item: place for place, item in enumerate(new_ids)}
    sequences = dataset.sequences()
    with torch.inference_mode():
        scores = score_next(model, Windows.from_sequences(sequences))(first, dataset.num_items).numpy()
    watched = np.zeros(scores.shape, bool)
    row = {user: place for place, user in enumerate(sequences.users.to_pylist())}
    for user, item in zip(hidden["user"], hidden["item"], strict=True):
        if user in row and item in column:
            watched[row[user], column[item]] = True
    values = []
    for user_scores, user_watched in zip(scores, watched, strict=True):
        yes, no = user_scores[user_watched], user_scores[~user_watched]
        if len(yes) and len(no):
            higher = (yes[:, None] > no).mean() + 0.5 * (yes[:, None] == no).mean()
            values.append(float(higher))
    return values


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"\n{time.monotonic() - began:.0f} s in all")
