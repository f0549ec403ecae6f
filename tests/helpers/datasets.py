"""Writes small prepared datasets directly in their format on disk, for tests that do not need `prepare`."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.data.dataset import InputFile, Manifest
from bert4rec.data.features import FEATURES


def write_dataset(
    path: Path,
    histories: dict[int, list[int]],
    num_items: int,
    years: list[int | None] | None = None,
    last_years: list[int | None] | None = None,
    catalogue: str = "test",
    genres: list[list[int]] | None = None,
    before: dict[str, list[int]] | None = None,
    identity: dict | None = None,
    times: dict[int, list[int]] | None = None,
) -> str:
    """Write histories of tokens by user id, and Unix times of each token. Items have ids 100+token and titles "film
    TOKEN"; cut-offs are 1000, 1001, …"""
    (path / "sequences").mkdir(parents=True)
    users = sorted(histories)
    if times is None and last_years is not None:  # all of a user at the middle of the year
        middles = [int(datetime(year or 1970, 7, 1, tzinfo=UTC).timestamp()) for year in last_years]
        times = {user: [middle] * len(histories[user]) for user, middle in zip(users, middles, strict=True)}
    origin, own_times = None, {}
    if times is not None:
        origin = min(min(own) for own in times.values())
        since = [[time - origin for time in times[user]] for user in users]
        own_times = {"times": pa.array(since, pa.list_(pa.int64()))}
        last_years = last_years or [datetime.fromtimestamp(times[user][-1], UTC).year for user in users]
    sequences = pa.table(
        {
            "user": pa.array(users, pa.int64()),
            "items": pa.array([histories[user] for user in users], pa.list_(pa.int32())),
            "last_year": pa.array(last_years or [None] * len(users), pa.int16()),
            **own_times,
            **{f"before_{name}": pa.array(counts, pa.int32()) for name, counts in (before or {}).items()},
        }
    )
    pq.write_table(sequences, path / "sequences" / "part-00000.parquet")
    tokens = np.arange(1, num_items + 1)
    counts = np.bincount(np.concatenate([histories[user] for user in users]), minlength=num_items + 1)[1:]
    none = [[]] * num_items
    items = pa.table(
        {
            "index": pa.array(tokens, pa.int32()),
            "item": pa.array(tokens + 100, pa.int64()),
            "count": pa.array(counts, pa.int64()),
            "year": pa.array(years or [None] * num_items, pa.int16()),
            "title": pa.array([f"film {token}" for token in tokens]),
            **{
                feature.column: pa.array(none, pa.list_(pa.int32()))
                if feature.is_list
                else pa.nulls(num_items, pa.int32())
                for feature in FEATURES.values()
            },
            "genres": pa.array(genres or none, pa.list_(pa.int32())),
        }
    )
    pq.write_table(items, path / "items.parquet")
    files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*.parquet")}
    manifest = Manifest(
        identity=identity or {},
        num_users=len(users),
        num_items=num_items,
        num_interactions=int(counts.sum()),
        num_duplicates=0,
        cutoffs={name: 1000 + place for place, name in enumerate(before or {})},
        time_origin=origin,
        catalogue=catalogue,
        vocabularies={
            **{name: [] for name in FEATURES},
            "genre": [f"genre {value}" for value in sorted({value for values in genres or none for value in values})],
        },
        notes=[],
        inputs=[InputFile(name="train_ratings.csv", size=1, sha256=storage.fingerprint([histories, catalogue]))],
        files=files,
        sha256={name: storage.sha256(str(path / name)) for name in files},
    )
    storage.commit(str(path), manifest.model_dump())
    return str(path)


def random_histories(num_users: int, num_items: int, seed: int = 0, longest: int = 12) -> dict[int, list[int]]:
    """Random histories of 1..longest items, without repetitions within a user."""
    rng = np.random.default_rng(seed)
    return {
        user: (rng.permutation(num_items)[: rng.integers(1, longest + 1)] + 1).tolist()
        for user in range(1, num_users + 1)
    }


def random_times(histories: dict[int, list[int]], seed: int = 0) -> dict[int, list[int]]:
    """Rising Unix times of each item: some items at once, others years apart."""
    rng = np.random.default_rng(seed)
    return {
        user: (1_000_000_000 + np.cumsum((2 ** rng.uniform(0, 26, len(items))).astype(np.int64) - 1)).tolist()
        for user, items in histories.items()
    }
