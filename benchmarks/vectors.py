"""Lists of an index of exported vectors beside those of the batch job: `python -m benchmarks.vectors EXPORT RESULTS`.

EXPORT is a directory of `jobs.export export.formats=[vectors]`, RESULTS one of `jobs.recommend` with
inference.exclude_seen=false inference.exclude_future=false, both of the same model. Needs faiss.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.common import add_record, publish

SEARCHES = (16, 64, 256)
"""efSearch: how many items HNSW keeps in mind."""


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(description="Equality with an exact index, and recall of HNSW.")
    parser.add_argument("export", type=Path)
    parser.add_argument("results", type=Path)
    add_record(parser)
    args = parser.parse_args()
    items, of_items = _read(args.export / "items.parquet", "item")
    users, of_users = _read(args.export / "users.parquet", "user")
    table = pq.read_table(args.results / "recommendations.parquet")
    lists: dict[Any, list[Any]] = {user: [] for user in users.tolist()}
    for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
        lists[user].append(item)
    k = max(len(listed) for listed in lists.values())
    exact = faiss.IndexFlatIP(of_items.shape[1])
    exact.add(of_items)
    indexes: dict[str, Any] = {"exact (IndexFlatIP)": exact}
    for search in SEARCHES:
        graph = faiss.IndexHNSWFlat(of_items.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = 200, search
        graph.add(of_items)
        indexes[f"HNSW, 32 neighbours, efSearch {search}"] = graph
    rows = []
    for name, index in indexes.items():
        found = items[index.search(of_users, k)[1]]
        pairs = list(zip(found.tolist(), lists.values(), strict=True))
        equal = sum(mine == theirs for mine, theirs in pairs)
        recall = np.mean([len(set(mine) & set(theirs)) / len(theirs) for mine, theirs in pairs])
        rows.append(
            {
                "index": name,
                "equal lists": f"{equal:,} of {len(pairs):,}",
                f"recall@{k}": f"{recall:.4f}",
            }
        )
    notes = [f"{len(users):,} users, {len(items):,} items, vectors of {of_items.shape[1]} numbers; lists of {k}."]
    publish("vectors", notes, rows, args.record)


def _read(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path)
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    return table[name].to_numpy(), flat.reshape(len(table), -1)


if __name__ == "__main__":
    main()
