"""Texts a second of the embedding job's actors and of SentenceTransformer.encode alone, on the same cores.

    python -m benchmarks.embed --model FOLDER [--num-texts N] [--repeats N] DATA_DIR [DATA_DIR ...]

The texts are the distinct ones that the job makes of the directories' titles and genres; where N is larger, the rest
are the same with "Part 2: " before them. Loading the model is left out of the rates and told apart.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import numpy as np
import pyarrow as pa
import ray
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.common import add_record, publish
from bert4rec.cluster.users import map_parts
from bert4rec.config import EmbeddingConfig
from bert4rec.data.dataset import Part
from bert4rec.embedding.embed import Embedder, in_parts, read_texts
from bert4rec.embedding.encoders import load_encoder
from bert4rec.progress import Progress


class Gate:
    """Counts the actors that have loaded their model."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count


class TimedEmbedder(Embedder):
    """Begins only when all actors are ready; tells when each part began and ended."""

    def __init__(
        self, gate: ray.actor.ActorHandle, num_actors: int, embedding: EmbeddingConfig, folder: str, *rest: object
    ) -> None:
        super().__init__(embedding, folder, *rest)  # type: ignore[arg-type]
        torch.set_num_threads(1)
        self.encode = load_encoder(embedding, folder, "cpu")
        self.encode(["warm up"] * embedding.batch_size)
        ray.get(gate.add.remote(1))
        while ray.get(gate.add.remote(0)) < num_actors:
            time.sleep(0.05)

    def __call__(self, part: Part) -> dict[str, list[float]]:  # type: ignore[override]
        began = time.time()
        assert super().__call__(part) == {"error": [""]}
        return {"began": [began], "ended": [time.time()]}


def make_texts(data_dirs: list[str], num_texts: int) -> list[str]:
    texts = list(dict.fromkeys(text for path in data_dirs for text in read_texts(path, True)["text"].to_pylist()))
    print(f"{len(texts):,} distinct texts of {', '.join(data_dirs)}", end="")
    texts += [f"Part 2: {text}" for text in texts[: max(0, num_texts - len(texts))]]
    print(f"; {len(texts[:num_texts]):,} in all, mean length {np.mean([len(text) for text in texts[:num_texts]]):.0f}")
    return texts[:num_texts]


def run_actors(embedding: EmbeddingConfig, texts: list[str], num_actors: int) -> tuple[float, float]:
    """Seconds from the first part's begin to the last one's end, and of all with the actors' start."""
    began = time.time()
    ordered, parts = in_parts(pa.array(texts), embedding.batch_size)
    with tempfile.TemporaryDirectory() as work, Progress("embedding", len(texts), "texts") as reporter:
        gate = ray.remote(num_cpus=0)(Gate).remote()
        arguments = (gate, num_actors, embedding, embedding.model_name, ray.put(ordered), work, False, reporter)
        results = list(map_parts(parts, TimedEmbedder, arguments, num_actors, use_gpu=False))
    seconds = max(result["ended"].max() for result in results) - min(result["began"].min() for result in results)
    return float(seconds), time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Embedding actors and SentenceTransformer.encode alone.")
    parser.add_argument("--model", required=True, help="folder of a sentence-transformers model")
    parser.add_argument("--num-texts", type=int, default=6807)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("data_dirs", nargs="+")
    add_record(parser)
    args = parser.parse_args()
    texts = make_texts(args.data_dirs, args.num_texts)
    embedding = EmbeddingConfig(model_name=os.path.abspath(args.model), batch_size=args.batch_size)
    torch.set_num_threads(args.cores)
    began = time.time()
    model = SentenceTransformer(args.model, device="cpu", local_files_only=True)
    print(f"{args.cores} cores, batches of {args.batch_size}, {args.model} loaded in {time.time() - began:.1f} s")
    model.encode(texts[: args.batch_size])
    ray.init(address="local", num_cpus=args.cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    alone, ours, ratios = [], [], []
    for repeat in range(args.repeats):
        began = time.time()
        model.encode(texts, batch_size=args.batch_size, normalize_embeddings=True, show_progress_bar=False)
        alone.append(len(texts) / (time.time() - began))
        seconds, with_start = run_actors(embedding, texts, args.cores)
        ours.append(len(texts) / seconds)
        ratios.append(ours[-1] / alone[-1])
        print(
            f"{repeat + 1}: encode alone {alone[-1]:,.0f} texts/s; {args.cores} actors {ours[-1]:,.0f} texts/s; "
            f"ratio {ratios[-1]:.2f}; actors' start {with_start - seconds:.1f} s"
        )
    notes = [
        f"{len(texts):,} texts of {', '.join(args.data_dirs)}; {args.cores} cores, batches of {args.batch_size}, model "
        f"{os.path.basename(os.path.abspath(args.model))}; medians of {args.repeats} turns. Loading the model and the "
        "start of the actors are left out."
    ]
    rates = {"SentenceTransformer.encode": alone, "jobs.embed": ours}
    rows = [
        {
            "implementation": name,
            "texts/s": f"{statistics.median(rate):,.0f}",
            "spread": f"{min(rate):,.0f}–{max(rate):,.0f}",
            "of encode": "" if rate is alone else f"{statistics.median(ratios):.2f}×",
        }
        for name, rate in rates.items()
    ]
    publish("embed", notes, rows, args.record)


if __name__ == "__main__":
    main()
