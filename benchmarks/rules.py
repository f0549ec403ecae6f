"""What lists of items cost: `python -m benchmarks.rules`.

A list for all: one process ranks a synthetic catalogue with and without `inference.candidates`. Lists of users:
`jobs.recommend`'s own function scores all users with and without a file `user,item`, and the memory of each of its
processes is sampled.
"""

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import Workload, add_record, available_cores, descendants, publish, spread, synthetic_histories
from benchmarks.ours import catalogue_of, model_config
from bert4rec import storage
from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import Manifest, Sequences
from bert4rec.inference.item_lists import list_of_items
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender
from bert4rec.model.network import BERT4Rec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="size of the catalogue of the list for all")
    parser.add_argument("--allowed", type=int, default=10_000, help="items of the list for all")
    parser.add_argument("--users", type=int, default=2_048, help="users who are ranked with the list for all")
    parser.add_argument("--list-users", type=int, default=1_000_000, help="users who have a list each")
    parser.add_argument("--list-rows", type=int, default=100_000_000, help="rows of these lists")
    parser.add_argument("--list-items", type=int, default=50_000, help="size of their catalogue")
    parser.add_argument("--history", type=int, default=10, help="items of a user on average")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--repeats", type=int, default=3, help="of the list for all")
    parser.add_argument("--only", choices=("all", "users"), help="one of the two measurements")
    add_record(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    if args.only != "users":
        rows += _list_for_all(args)
    if args.only != "all":
        rows += _lists_of_users(args)
    notes = [
        f"Untrained, 2 layers, hidden {args.hidden}, max_len 50, histories of {args.history} items on average; top 10 "
        f"without seen items. A list for all: one process, {args.threads} threads. Lists of users: `recommend` on all "
        "cores, Ray's start not included.",
        "memory: of the largest worker process, the pages that it shares included.",
    ]
    publish("rules", notes, rows, args.record)


def _model(hidden: int, num_items: int) -> BERT4Rec:
    torch.manual_seed(0)
    model = BERT4Rec(model_config(Workload(data="", hidden=hidden, max_len=50)), num_items).eval()
    model.catalogue = "synthetic"
    return model


def _list_for_all(args: argparse.Namespace) -> list[dict[str, str]]:
    histories = synthetic_histories(args.users, args.items, args.history, seed=0)
    num_items = len(histories.item_ids)
    own = np.split(histories.items, histories.offsets[1:-1])
    sequences = Sequences.of(pa.array(histories.user_ids), own, pa.nulls(args.users, pa.int16()))
    recommender, inference = (
        Recommender(_model(args.hidden, num_items), catalogue_of(histories.item_ids)),
        InferenceConfig(),
    )
    chosen = np.random.default_rng(0).choice(histories.item_ids, args.allowed, replace=False).tolist()
    rankings = {
        "no list": Ranking(exclude_future=False),
        f"list for all of {args.allowed:,} items": Ranking(
            exclude_future=False, candidates=list_of_items("inference.candidates", chosen)
        ),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in rankings}
    for name, ranking in rankings.items():  # the rules are made once in a worker, before its first batch
        recommender.rules(ranking)
        for _ in range(args.repeats):
            began = time.perf_counter()
            for _batch in recommender.rank(sequences, inference, ranking):
                pass
            seconds[name].append({"seconds": time.perf_counter() - began})
    fastest = {name: float(np.median([each["seconds"] for each in ran])) for name, ran in seconds.items()}
    return [
        {
            "data": f"{num_items:,} items",
            "rules": name,
            "users/s": f"{args.users / fastest[name]:,.0f}",
            "seconds": f"{fastest[name]:.2f}",
            "spread": spread(ran, "seconds", ".2f"),
            "of no list": f"{fastest['no list'] / fastest[name]:.1f}× as fast",
            "memory, MiB": "",
        }
        for name, ran in seconds.items()
    ]


def _lists_of_users(args: argparse.Namespace) -> list[dict[str, str]]:
    from bert4rec.cluster.resources import begin
    from bert4rec.inference.recommend import recommend

    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        path = _write_dataset(root / "prepared" / "d", args)
        _model(args.hidden, args.list_items).save_pretrained(str(root / "m"))
        _write_lists(root / "lists", args.list_users, args.list_items, args.list_rows)
        begin(load_config(), meanwhile=("ray.data",))
        first = 0.0
        for name, overrides in {
            "no list": [],
            f"lists of users, {args.list_rows:,} rows": [f"inference.candidates={root}/lists/*.parquet"],
            "the same lists, sorted before": [f"inference.candidates={root}/lists/*.parquet"],
        }.items():
            config = load_config(None, ["inference.exclude_future=false", "inference.formats=[parquet]", *overrides])
            with _largest_process() as largest:
                began = time.perf_counter()
                result = recommend(config, path, str(root / "m"), str(root / f"out {len(rows)}"))
                seconds = time.perf_counter() - began
            first = first or seconds
            rows.append(
                {
                    "data": f"{args.list_users:,} users, {args.list_items:,} items",
                    "rules": name,
                    "users/s": f"{result.num_users / seconds:,.0f}",
                    "seconds": f"{seconds:.1f}",
                    "spread": "1 turn",
                    "of no list": f"{first / seconds:.2f}× as fast",
                    "memory, MiB": f"{largest[0] / 2**20:,.0f}",
                }
            )
    return rows


def _write_dataset(path: Path, args: argparse.Namespace) -> str:
    """A prepared dataset, written as `prepare` would."""
    num_users, num_items = args.list_users, args.list_items
    histories = synthetic_histories(num_users, num_items, args.history, seed=1)
    (path / "sequences").mkdir(parents=True)
    users = pa.array(np.arange(1, num_users + 1))
    lists = pa.ListArray.from_arrays(pa.array(histories.offsets, pa.int32()), pa.array(histories.items, pa.int32()))
    table = {"user": users, "items": lists, "last_year": pa.nulls(num_users, pa.int16())}
    pq.write_table(pa.table(table), path / "sequences" / "part-00000.parquet", row_group_size=4096)
    count = np.bincount(histories.items, minlength=num_items + 1)[1:]
    nothing = pa.array([[]] * num_items, pa.list_(pa.int32()))
    items = {
        "index": pa.array(np.arange(1, num_items + 1), pa.int32()),
        "item": pa.array(np.arange(1, num_items + 1)),
        "count": pa.array(count, pa.int64()),
        "year": pa.nulls(num_items, pa.int16()),
        "title": pa.nulls(num_items, pa.string()),
        "genres": nothing,
        "director": pa.nulls(num_items, pa.int32()),
        "writers": nothing,
    }
    pq.write_table(pa.table(items), path / "items.parquet")
    files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*.parquet")}
    manifest = Manifest(
        num_users=num_users,
        num_items=num_items,
        num_interactions=len(histories.items),
        num_duplicates=0,
        time_origin=None,
        catalogue="synthetic",
        vocabularies={"genre": [], "director": [], "writer": []},
        notes=[],
        inputs=[],
        files=files,
        sha256={name: storage.sha256(str(path / name)) for name in files},
    )
    storage.commit(str(path), manifest.model_dump())
    return str(path)


def _write_lists(path: Path, num_users: int, num_items: int, num_rows: int) -> None:
    """Rows user,item in an order that follows neither, none twice: for each user the same number of items."""
    path.mkdir()
    each = num_rows // num_users
    rng = np.random.default_rng(2)
    step = num_items // each
    for number, users in enumerate(np.array_split(rng.permutation(num_users) + 1, max(1, num_rows // 5_000_000))):
        begin = rng.integers(0, num_items, len(users))
        item = (begin[:, None] + step * np.arange(each)) % num_items + 1
        order = rng.permutation(item.size)
        rows = {"user": np.repeat(users, each)[order], "item": item.ravel()[order]}
        pq.write_table(pa.table(rows), path / f"{number:04d}.parquet")


@contextlib.contextmanager
def _largest_process() -> Iterator[list[int]]:
    """Bytes of the largest process below this one inside the block, sampled five times a second."""
    largest, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(0.2):
            for pid in descendants(os.getpid())[1:]:
                with contextlib.suppress(OSError, IndexError, ValueError):
                    name = Path(f"/proc/{pid}/cmdline").read_text()
                    if name.startswith("ray::"):
                        status = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1]
                        largest[0] = max(largest[0], int(status.split()[0]) * 1024)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
