"""The rules of a ranking for one user, one item at a time. Items are counted from 0."""

import math
from dataclasses import dataclass, field


@dataclass
class User:
    """What the rules look at."""

    scores: list[float]
    """Logits of all items."""
    seen: set[int] = field(default_factory=set)
    later: set[int] = field(default_factory=set)
    """Items released later than the user's last interaction."""
    candidates: set[int] | None = None
    """The user's own list; None: no row in it."""
    excluded: set[int] = field(default_factory=set)


@dataclass
class Case:
    """The rules, and what they need to know of the catalogue."""

    k: int
    exclude_seen: bool = True
    exclude_future: bool = True
    candidates: set[int] | None = None
    """The list for all."""
    has_users_candidates: bool = False
    candidates_default: str = "none"
    exclude: set[int] = field(default_factory=set)
    max_per: dict[str, int] = field(default_factory=dict)
    values: dict[str, list[list[int]]] = field(default_factory=dict)
    """By feature: each item's values."""
    diversity: float = 0
    diversity_pool: int = 100
    vectors: list[list[float]] | None = None
    min_score: float | None = None
    scores: str = "logit"


def allowed(case: Case, user: User) -> list[int]:
    """What the user may get, the best score first."""
    kept = []
    for item in range(len(user.scores)):
        if case.exclude_seen and item in user.seen:
            continue
        if case.exclude_future and item in user.later:
            continue
        if case.candidates is not None and item not in case.candidates:
            continue
        if case.has_users_candidates:
            if user.candidates is None and case.candidates_default == "none":
                continue
            if user.candidates is not None and item not in user.candidates:
                continue
        if item in case.exclude or item in user.excluded or user.scores[item] == -math.inf:
            continue
        kept.append(item)
    return sorted(kept, key=lambda item: -user.scores[item])


def written_scores(case: Case, user: User) -> dict[int, float]:
    """The score of each item that the user may get, as it is written."""
    items = allowed(case, user)
    if case.scores == "logit":
        return {item: user.scores[item] for item in items}
    total = sum(math.exp(user.scores[item]) for item in items)
    return {item: math.exp(user.scores[item]) / total for item in items}


def cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def choices(case: Case, user: User, listed: list[int]) -> dict[int, float]:
    """What may come next in a list that begins with `listed`: each item, and how good it is."""
    written = written_scores(case, user)
    ranked = [item for item in written if case.min_score is None or written[item] >= case.min_score]

    def fits(item: int) -> bool:
        for feature, cap in case.max_per.items():
            for value in case.values[feature][item]:
                if sum(value in case.values[feature][other] for other in listed) >= cap:
                    return False
        return item not in listed

    if not case.diversity:
        return {item: user.scores[item] for item in ranked if fits(item)}
    pool = ranked[: case.diversity_pool]
    found = {}
    for item in pool:
        if fits(item):
            best, worst = user.scores[pool[0]], user.scores[pool[-1]]
            relevance = (user.scores[item] - worst) / (best - worst) if best > worst else 0.0
            if listed:
                nearest = max(cosine(case.vectors[item], case.vectors[other]) for other in listed)
                relevance = (1 - case.diversity) * relevance - case.diversity * nearest
            found[item] = relevance
    return found or {item: user.scores[item] for item in ranked[case.diversity_pool :] if fits(item)}


def make_list(case: Case, user: User) -> list[int]:
    """The user's list."""
    listed: list[int] = []
    while len(listed) < case.k and (found := choices(case, user, listed)):
        listed.append(max(found, key=lambda item: found[item]))
    return listed


def why_wrong(case: Case, user: User, listed: list[int], tolerance: float = 1e-5) -> str | None:
    """Why a list is not the user's, or None if it is, but for choices between items that are as good as each other."""
    for place in range(len(listed) + 1):
        found = choices(case, user, listed[:place])
        if place == len(listed):
            return f"ends at {place}, though {sorted(found)} are left" if found and place < case.k else None
        if listed[place] not in found:
            return f"place {place}: {listed[place]} is not allowed"
        if found[listed[place]] < max(found.values()) - tolerance:
            return f"place {place}: {listed[place]} is not the best, {max(found, key=lambda item: found[item])} is"
    return None
