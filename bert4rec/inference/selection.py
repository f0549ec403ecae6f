"""From a ranking to a list: rules that look at the other items of the list, and at its scores.

Shapes: B users, V items, M ranked items of each user, K items of the list, P of them in the pool, W values of an item.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert4rec.data.dataset import ItemTable
from bert4rec.errors import InputError
from bert4rec.inference.ranking import DEFAULT_SCORE_BYTES, NextScores, Ranking, top_k
from bert4rec.model.average import Model

if TYPE_CHECKING:
    from bert4rec.inference.rules import Offer

_DEPTH = 5
"""With caps, so many times the length of the list is ranked before the capped items are left out by name."""
_NO_VALUE = 0
_NO_CAP = 2**31 - 1

VectorsOf = Callable[[Tensor], Tensor]
"""[B, M] items, counted from 0 -> [B, M, D] vectors of length 1, whose products are cosines."""


@dataclass(frozen=True)
class Selection:
    """How a list is made of the ranked items."""

    diversity: float
    pool: int
    min_score: float | None
    scores: Literal["logit", "probability"]
    values: Tensor | None
    """[V, W] int64 values of all features in `max_per`, counted over the features from 1; 0 for none. None: no caps."""
    caps: Tensor | None
    """[T+1] int64: how many items of a list may have each value."""

    @classmethod
    def of(cls, ranking: Ranking, items: ItemTable, device: torch.device | str = "cpu") -> "Selection":
        """The selection of a ranking.

        Raises
        ------
        InputError
            If the items have no values of a feature in `max_per`.
        """
        rows, values, places, caps = [], [], [], [_NO_CAP]
        for name, cap in ranking.max_per.items():
            size, ragged = items.listed.get(name, (0, None))
            if ragged is None or not size:
                raise InputError(f"inference.max_per: {name}: no item of the data has any")
            length = np.diff(ragged.offsets)
            rows.append(np.repeat(np.arange(len(length)), length))
            values.append(ragged.values + len(caps))
            places.append(np.arange(len(ragged.values)) - np.repeat(ragged.offsets[:-1], length))
            caps += [cap] * size
        table = None
        if rows:
            widths = [int(place.max(initial=-1)) + 1 for place in places]
            begins = np.cumsum([0, *widths[:-1]])
            table = torch.full((len(items.ids), sum(widths)), _NO_VALUE)
            for row, value, place, begin in zip(rows, values, places, begins, strict=True):
                table[torch.from_numpy(row), torch.from_numpy(place + begin)] = torch.from_numpy(value)
        return cls(
            ranking.diversity,
            ranking.diversity_pool,
            ranking.min_score,
            ranking.scores,
            None if table is None else table.to(device),
            None if table is None else torch.tensor(caps, device=device),
        )

    @property
    def reorders(self) -> bool:
        """Whether the list may differ from the first items of the ranking."""
        return self.diversity > 0 or self.values is not None

    def depth(self, k: int) -> int:
        """How many items to rank for a list of `k`."""
        return max(k, self.pool if self.diversity else 0, _DEPTH * k if self.values is not None else 0)


class LogSum:
    """log(sum(exp(score))) of each user, over blocks of scores."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, block: Tensor) -> None:
        """Add a block [B, width]."""
        added = block.logsumexp(1)
        self.value = added if self.value is None else torch.logaddexp(self.value, added)


def list_of(
    values: Tensor, items: Tensor, log_sum: Tensor | None, k: int, selection: Selection, vectors_of: VectorsOf
) -> tuple[Tensor, Tensor]:
    """The list [B, K] of each user, and its scores, -inf behind its end, given all ranked items that it may take.

    Parameters
    ----------
    values, items : Tensor
        [B, M] falling logits and items, counted from 0.
    log_sum : Tensor or None
        [B] `LogSum` of all items that the user may get, for probabilities.
    """
    values = _without_low(values, selection, log_sum)
    picked = pick(values, items, k, selection, vectors_of)
    return _converted(_at(values, picked), selection, log_sum), items.gather(1, picked.clamp(min=0))


@torch.inference_mode()
def best_list(
    scores: NextScores,
    offer: "Offer",
    k: int,
    selection: Selection,
    vectors_of: VectorsOf,
    score_bytes: int = DEFAULT_SCORE_BYTES,
) -> tuple[Tensor, Tensor]:
    """The list of each user.

    Returns
    -------
    values : Tensor
        [B, K] float32, in the order of the list; -inf behind its end.
    items : Tensor
        [B, K] int64, counted from 0; meaningless where the value is -inf.
    """
    num_users = len(scores.states)
    total = LogSum() if selection.scores == "probability" else None
    depth = max(k, min(selection.depth(k), offer.num_columns))
    values, places = top_k(scores, offer.exclusions, num_users, offer.num_columns, depth, score_bytes, total)
    log_sum = None if total is None or total.value is None else total.value
    goes_on = torch.isfinite(values[:, -1])
    values = _without_low(values, selection, log_sum)
    if selection.reorders:
        picked = pick(values, offer.items(places), k, selection, vectors_of)
        chosen_values, chosen = _at(values, picked), places.gather(1, picked.clamp(min=0))
        goes_on &= torch.isfinite(values[:, -1])
        while selection.values is not None:
            users = (goes_on & (chosen_values[:, -1] == -torch.inf)).nonzero().flatten()
            if not len(users):
                break
            more_values, more, goes_on[users] = _go_on(
                scores.of_users(users),
                offer,
                users,
                (chosen_values[users], chosen[users]),
                selection,
                None if log_sum is None else log_sum[users],
                score_bytes,
            )
            chosen_values[users], chosen[users] = more_values, more
        values, places = chosen_values, chosen
    return _converted(values, selection, log_sum), offer.items(places)


def _go_on(
    scores: NextScores,
    offer: "Offer",
    users: Tensor,
    begun: tuple[Tensor, Tensor],
    selection: Selection,
    log_sum: Tensor | None,
    score_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists [B', K] continued with the best items that no cap forbids; and whether there may be more of them."""
    values, places = begun
    k = values.shape[1]
    row, column = torch.isfinite(values).nonzero(as_tuple=True)
    assert selection.values is not None and selection.caps is not None  # noqa: PT018
    counts = torch.zeros(len(users), len(selection.caps), dtype=torch.int32, device=values.device)
    own = selection.values[offer.items(places[row, column])]  # (S, W)
    counts.index_put_((row[:, None].expand_as(own), own), torch.ones_like(own, dtype=torch.int32), accumulate=True)
    is_full = counts >= selection.caps  # (B', T+1)
    table = selection.values

    def uncapped(low: int, high: int) -> Tensor:
        inside = offer.items(torch.arange(low, high, device=values.device))
        return scores(low, high).masked_fill_(is_full[:, table[inside]].any(-1), -torch.inf)

    exclusions = offer.exclusions.of_users(users).and_pairs(row, places[row, column])
    more_values, more = top_k(uncapped, exclusions, len(users), offer.num_columns, k, score_bytes)
    more_values = _without_low(more_values, selection, log_sum)
    both_values, both = torch.cat([values, more_values], dim=1), torch.cat([places, more], dim=1)
    # What was chosen before comes first, whatever its scores are, and fits under the caps again.
    picked = _pick_in_order(both_values, offer.items(both), k, selection)
    return _at(both_values, picked), both.gather(1, picked.clamp(min=0)), torch.isfinite(more_values[:, -1])


def pick(values: Tensor, items: Tensor, k: int, selection: Selection, vectors_of: VectorsOf) -> Tensor:
    """[B, K] places among the ranked items [B, M] that a list takes, in its order; -1 behind its end.

    One item after the other: of the first `pool` items that the caps still allow, the one of largest (1 - d) r - d c.
    r is its score, scaled to 0..1 over the pool; c the largest cosine of its vector with those of the items before it
    (maximal marginal relevance, Carbonell and Goldstein 1998). Behind the pool, the best score.
    """
    if not selection.diversity:
        return _pick_in_order(values, items, k, selection)
    size = min(selection.pool, values.shape[1])
    head = values[:, :size]
    lowest = head.masked_fill(head == -torch.inf, torch.inf).amin(1, keepdim=True)
    width = head[:, :1] - lowest
    relevance = torch.where(width > 0, (head - lowest) / width, torch.zeros_like(head))
    vectors = vectors_of(items[:, :size])  # (B, P, D)
    objective = relevance
    nearest = torch.full_like(head, -torch.inf)
    free, shared = values > -torch.inf, _Shared(items, selection)
    every = torch.arange(values.shape[1], device=values.device)
    places = []
    for _ in range(k):
        allowed = shared.allowed(free)
        in_pool = allowed[:, :size]
        place = objective.masked_fill(~in_pool, -torch.inf).argmax(1)
        if values.shape[1] > size:
            behind = allowed[:, size:].to(torch.int32).argmax(1) + size
            place = torch.where(in_pool.any(1), place, behind)
        found = allowed.gather(1, place[:, None])
        places.append(torch.where(found[:, 0], place, -1))
        free = free & (every != place[:, None])
        shared.add(place, found)
        chosen = vectors.gather(1, place.clamp(max=size - 1)[:, None, None].expand(-1, 1, vectors.shape[2]))
        nearest = torch.maximum(nearest, (vectors * chosen).sum(2))
        objective = (1 - selection.diversity) * relevance - selection.diversity * nearest
    return torch.stack(places, dim=1)


def _pick_in_order(values: Tensor, items: Tensor, k: int, selection: Selection) -> Tensor:
    """`pick` without diversity: the first items that the caps allow."""
    free, shared = values > -torch.inf, _Shared(items, selection)
    every = torch.arange(values.shape[1], device=values.device)
    places = []
    for _ in range(k):
        allowed = shared.allowed(free)
        place = allowed.to(torch.int32).argmax(1)  # the first
        found = allowed.gather(1, place[:, None])
        places.append(torch.where(found[:, 0], place, -1))
        free = free & (every != place[:, None])
        shared.add(place, found)
    return torch.stack(places, dim=1)


class _Shared:
    """How many items of each list share each value of each ranked item."""

    def __init__(self, items: Tensor, selection: Selection) -> None:
        self.values = None if selection.values is None else selection.values[items]  # (B, M, W)
        if self.values is not None and selection.caps is not None:
            self.caps = selection.caps[self.values]
            self.count = torch.zeros_like(self.values)

    def allowed(self, free: Tensor) -> Tensor:
        """[B, M] bool: which of the `free` items the caps allow."""
        return free if self.values is None else free & (self.count < self.caps).all(2)

    def add(self, place: Tensor, found: Tensor) -> None:
        """Take the items at `place` [B] into the lists, where `found` [B, 1]."""
        if self.values is None:
            return
        added = self.values.gather(1, place[:, None, None].expand(-1, 1, self.values.shape[2]))  # (B, 1, W)
        for number in range(added.shape[2]):
            same = (self.values == added[:, :, number : number + 1]) & (self.values != _NO_VALUE)
            self.count = self.count + (same & found[:, :, None])


def _at(values: Tensor, picked: Tensor) -> Tensor:
    return values.gather(1, picked.clamp(min=0)).masked_fill(picked < 0, -torch.inf)


def _without_low(values: Tensor, selection: Selection, log_sum: Tensor | None) -> Tensor:
    """Set logits [B, M] to -inf whose score is below min_score."""
    if selection.min_score is None:
        return values
    return values.masked_fill(_converted(values, selection, log_sum) < selection.min_score, -torch.inf)


def _converted(values: Tensor, selection: Selection, log_sum: Tensor | None) -> Tensor:
    """The scores that are written, of logits [B, M]; -inf stays."""
    match selection.scores:
        case "logit":
            return values
        case "probability":
            if log_sum is None:
                return values  # nobody may get anything
            return torch.exp(values - log_sum[:, None]).masked_fill(values == -torch.inf, -torch.inf)
        case _:
            assert_never(selection.scores)


def item_vectors_of(model: Model) -> VectorsOf:
    """The vectors that the network reads for items, divided by their lengths; a vector of zeros stays."""
    return lambda items: F.normalize(model.items(items + 1), dim=-1)
