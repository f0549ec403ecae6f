"""Short histories whose best possible ranking is known: `python -m benchmarks.short_histories DIR`.

40,000 users with about 9 of 54,000 items each. Items are 6,000 series of 9 parts in 60 genres. A user has two genres;
each next item is, with probability 0.5, the next part of the series just read, else any part of a series not yet begun,
of either genre with equal chance and, in it, by a popularity that falls as 1/rank. Writes train_ratings.csv, and prints
what a reader of these rules reaches who knows each user's genres: the ceiling for any model.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

NUM_GENRES, SERIES, PARTS = 60, 100, 9
GO_ON = 0.5
POPULARITY = 1 / np.arange(1, SERIES + 1)
DAY = 86_400


def ceiling_rank(series: int, part: int, begun: np.ndarray, target: tuple[int, int]) -> int:
    """Rank, from 1, of the true next item among all by its true probability; of equal ones the earlier part is first.

    Parameters
    ----------
    series, part : int
        What the user read last; series [0, 2 SERIES) are those of the two genres.
    begun : ndarray
        [2, SERIES] bool.
    target : (int, int)
        Series and part of the next item.
    """
    go_on = GO_ON if part + 1 < PARTS else 0.0
    weights = np.where(begun, 0.0, POPULARITY)
    new = ((1 - go_on) / 2 * weights / weights.sum(1, keepdims=True)).ravel() / PARTS  # [2 SERIES], of any part
    if target == (series, part + 1):
        return 1 + PARTS * int((new > go_on).sum())
    own = new[target[0]]
    return 1 + PARTS * int((new > own).sum()) + target[1] + int(go_on > own)


def read_on(length: int, random: np.random.Generator) -> tuple[list[tuple[int, int]], int]:
    """A user's (series, part) in order, and `ceiling_rank` of the last one."""
    # By weight without replacement: in the order of Exp(1) / weight (Efraimidis and Spirakis 2006).
    order = np.argsort(random.exponential(size=(2, SERIES)) / POPULARITY, axis=1)
    begun = np.zeros((2, SERIES), bool)
    rank = 0
    history: list[tuple[int, int]] = []
    for step in range(length):
        series, part = history[-1] if history else (0, PARTS - 1)
        if part + 1 < PARTS and random.random() < GO_ON:
            following = (series, part + 1)
        else:
            genre = int(random.integers(2))
            following = (genre * SERIES + int(order[genre, begun[genre].sum()]), int(random.integers(PARTS)))
        if step == length - 1 and history:
            rank = ceiling_rank(series, part, begun, following)
        begun[divmod(following[0], SERIES)] = True
        history.append(following)
    return history, rank


def short_histories(num_users: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Columns user, item, time; and [num_users] the ceiling's rank of each user's last item."""
    random = np.random.default_rng(seed)
    item_ids = random.permutation(NUM_GENRES * SERIES * PARTS) + 1
    rows, ranks = [], np.empty(num_users, np.int64)
    for user in range(num_users):
        genres = random.choice(NUM_GENRES, 2, replace=False)
        history, ranks[user] = read_on(4 + int(random.exponential(5.5)), random)
        time = 1_500_000_000 + int(random.integers(300 * DAY))
        for series, part in history:
            genre, number = divmod(series, SERIES)
            rows.append((user + 1, item_ids[(genres[genre] * SERIES + number) * PARTS + part], time))
            time += 1 + int(random.integers(7 * DAY))
    return pd.DataFrame(rows, columns=["user", "item", "time"]), ranks


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a dataset of short histories.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    ratings, ranks = short_histories(args.users, args.seed)
    args.directory.mkdir(parents=True, exist_ok=True)
    ratings.to_csv(args.directory / "train_ratings.csv", index=False)
    found = ranks <= 10
    ndcg = np.where(found, 1 / np.log2(1 + ranks), 0).mean()
    print(f"{len(ratings):,} interactions, {ratings['item'].nunique():,} items, {len(ratings) / args.users:.1f} a user")
    print(f"ceiling, last items: HR@10 {found.mean():.4f}, NDCG@10 {ndcg:.4f}")


if __name__ == "__main__":
    main()
