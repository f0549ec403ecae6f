"""What the rules of a ranking change in the lists of sample users: each rule alone, and all of them."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from bert4rec.config import InferenceConfig
from bert4rec.data.dataset import PreparedDataset, Sequences
from bert4rec.inference.few_users import users_of_dataset
from bert4rec.inference.moment import settled
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import ItemId, Recommender

SAMPLE_USERS = 500
_RULES = {
    "blend": ("blend",),
    "candidates": ("candidates", "candidates_default"),
    "exclude": ("exclude",),
    "max_per": ("max_per",),
    "diversity": ("diversity", "diversity_pool"),
    "min_score": ("min_score", "scores"),
}
"""Rules that change lists, and the keys that belong to each."""

Lists = dict[ItemId, list[tuple[ItemId, float]]]
"""By user: item and score, by rank."""


@dataclass(frozen=True)
class Effect:
    """What a rule alone changes."""

    rule: str
    """Its key, or "all together"."""
    num_users: int
    """Users whose list is another one."""
    num_taken: int
    """Recommendations that are in no list any more."""
    num_added: int
    """Recommendations that came instead."""
    moved: float
    """Mean distance between the places, before and after, of the items that stay."""


@dataclass(frozen=True)
class Effects:
    """What the rules change."""

    num_users: int
    """Users of the sample."""
    rules: list[Effect]
    before: Lists
    """The lists of the sample users without these rules."""


def effects_of(
    recommender: Recommender, dataset: PreparedDataset, inference: InferenceConfig, ranking: Ranking, users: np.ndarray
) -> Effects:
    """Compare the lists of `users`, places in the dataset, with and without each rule.

    Raises
    ------
    InputError
        If a rule cannot be used.
    """
    ids: list[ItemId] = []
    for part in dataset.parts():
        inside = users[(users >= part.low) & (users < part.high)] - part.low
        ids += dataset.read_part(part).users.take(inside).to_pylist() if len(inside) else []
    sequences, default = users_of_dataset(dataset, ids), Ranking()
    at = settled(inference, recommender.model, dataset).at
    sequences = sequences if not isinstance(at, int) else sequences.asked_at(at)
    keys = {key for own in _RULES.values() for key in own}
    usual: dict[str, Any] = {key: getattr(default, key) for key in keys}
    without = replace(ranking, **usual)
    before = _lists(recommender, sequences, inference, without)
    found = []
    for rule, own in _RULES.items():
        if getattr(ranking, rule) != getattr(default, rule):
            kept: dict[str, Any] = {key: getattr(ranking, key) for key in own}
            alone = replace(without, **kept)
            found.append(_effect(f"inference.{rule}", before, _lists(recommender, sequences, inference, alone)))
    if len(found) > 1:
        found.append(_effect("all together", before, _lists(recommender, sequences, inference, ranking)))
    return Effects(len(sequences), found, before)


def has_rules(ranking: Ranking) -> bool:
    """Whether the ranking has a rule that changes lists."""
    return any(
        getattr(ranking, rule.name) != getattr(Ranking(), rule.name) for rule in fields(Ranking) if rule.name in _RULES
    )


def _lists(recommender: Recommender, sequences: Sequences, inference: InferenceConfig, ranking: Ranking) -> Lists:
    lists: Lists = {user: [] for user in sequences.users.to_pylist()}
    for batch in recommender.rank(sequences, inference, ranking):
        for row in batch.table.to_pylist():
            lists[row["user"]].append((row["item"], row["score"]))
    return lists


def _effect(rule: str, before: Lists, after: Lists) -> Effect:
    num_users = num_taken = num_added = 0
    moves = []
    for user, old in before.items():
        was, now = ({item: place for place, (item, _) in enumerate(listed)} for listed in (old, after[user]))
        num_users += list(was) != list(now)
        num_taken += len(was.keys() - now.keys())
        num_added += len(now.keys() - was.keys())
        moves += [abs(now[item] - was[item]) for item in was.keys() & now.keys()]
    return Effect(rule, num_users, num_taken, num_added, float(np.mean(moves)) if moves else 0.0)
