"""What `inference.blend` costs: `python -m benchmarks.blend --items 1000000 --users 100000`.

Generated short histories and an untrained network. Fits the item-item model, writes and reads it, and takes the top 10
of some users with it and without it, in this process.
"""

import argparse
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.common import add_record, peak_memory, publish, synthetic_histories
from bert4rec.config import ItemModel, ModelConfig
from bert4rec.data.windows import Windows
from bert4rec.inference.blend import Blend
from bert4rec.inference.fit_blend import stored_arrays
from bert4rec.inference.item_item import FITTED
from bert4rec.inference.ranking import Exclusions, Ranking, score_next, top_k
from bert4rec.model.network import BERT4Rec


def seconds_to_rank(model: BERT4Rec, windows: Windows, ranking: Ranking, batch: int) -> float:
    """Seconds for the top 10 of all users, after one batch to warm up."""

    def rank(users: torch.Tensor) -> None:
        own = windows.users(users)
        top_k(score_next(model, own, ranking), Exclusions.of(own), len(users), model.num_items, 10)

    batches = torch.split(torch.arange(len(windows)), batch)
    rank(batches[0])
    began = time.perf_counter()
    for users in batches:
        rank(users)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of a blend.")
    parser.add_argument("--model", choices=list(FITTED), default="item-knn")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--users", type=int, default=10_000, help="that the item-item model is fitted to")
    parser.add_argument("--ranked", type=int, default=2_048, help="users of whom the top 10 are taken")
    parser.add_argument("--length", type=int, default=9, help="items of a user")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    add_record(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kind: ItemModel = args.model
    histories = synthetic_histories(args.users, args.items, args.length, 0)
    offsets = torch.from_numpy(histories.offsets)
    windows = Windows(torch.from_numpy(histories.items), offsets[:-1], offsets[1:])
    num_items = len(histories.item_ids)
    began = time.perf_counter()
    fitted = FITTED[kind](windows, num_items)
    fitting, after_fit = time.perf_counter() - began, peak_memory()
    ranked = windows.users(torch.arange(min(args.ranked, len(windows))))
    model = BERT4Rec(ModelConfig(hidden_units=args.hidden, num_heads=2, max_len=50), num_items).eval()
    plain = seconds_to_rank(model, ranked, Ranking(), args.batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blend.safetensors"
        safetensors.torch.save_file(stored_arrays(fitted), str(path))
        blend = Blend(kind, 0.1, 0.1, path=str(path))
        blended = seconds_to_rank(model, ranked, Ranking(blend=blend), args.batch)
        size = path.stat().st_size
    row = {
        "claim": f"{kind}, {num_items:,} items",
        "seconds to fit": f"{fitting:.1f}",
        "memory after the fit, MiB": f"{after_fit / 2**20:,.0f}",
        "MiB on disk": f"{size / 2**20:,.0f}",
        "users/s without": f"{len(ranked) / plain:,.0f}",
        "users/s with": f"{len(ranked) / blended:,.0f}",
        "memory, MiB": f"{peak_memory() / 2**20:,.0f}",
    }
    notes = [
        f"{histories}; {len(ranked):,} users ranked, {args.batch} at once, hidden {args.hidden}, {args.threads} threads"
    ]
    publish("blend", notes, [row], args.record)


if __name__ == "__main__":
    main()
