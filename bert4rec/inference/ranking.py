"""The one path from histories to a ranking: validation, evaluation and recommendation all go through here.

Scores are made and ranked on blocks of items, so that [B, V] need never be held whole.
Shapes: B users, V items, K top-k, S seen items of all B users.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert4rec.config import InferenceConfig
from bert4rec.data.dataset import ItemTable, PreparedDataset, Sequences
from bert4rec.data.features import FEATURES
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference.blend import Added, Blend, places_in
from bert4rec.inference.item_lists import ItemList, read_list
from bert4rec.model.average import Average, Model, read_model
from bert4rec.model.batches import ask_next, by_length, pack
from bert4rec.model.layers import product

Scorer = Callable[[int, int], Tensor]
"""scores(low, high) -> [B, high-low] of items low..high-1, counted from 0 (item i is token i+1).

The caller may change the block, and is done with it before the next call, which may write into the same memory."""

DEFAULT_SCORE_BYTES = 256 * 2**20
CPU_BLOCK_BYTES = 2 * 2**20
"""Of the scores that are made before they are looked at: what a CPU's caches hold is read again at no cost."""
PASS_TOKENS = 16_384
"""Tokens in one forward pass of scoring."""


@dataclass(frozen=True)
class Ranking:
    """The rules of a ranking, each a key of `inference` of the same name.

    What changes all scores of an item belongs into `output_weights`; what a user may not get belongs into `Rules` of
    `rules.py`, and what depends on the other items of a list into its `Selection`. The batch job, a few users and
    evaluation take a rule from there; exported programs make exclusions of their own. docs/architecture.md lists the
    steps.
    """

    exclude_seen: bool = True
    exclude_future: bool = True
    popularity_discount: float = 0.0
    candidates: ItemList | None = None
    candidates_default: Literal["none", "all"] = "none"
    exclude: ItemList | None = None
    max_per: Mapping[str, int] = field(default_factory=dict)
    diversity: float = 0.0
    diversity_pool: int = 100
    min_score: float | None = None
    scores: Literal["logit", "probability"] = "logit"
    blend: Blend | None = None

    @classmethod
    def of(cls, inference: InferenceConfig) -> Self:
        """The config's rules. A rule that is read from a file is read here, once.

        Raises
        ------
        InputError
            If a list cannot be used, or `max_per` names a feature that does not exist.
        """
        for name in inference.max_per:
            if name not in FEATURES:
                raise InputError(f"inference.max_per: no feature {name!r}; expected one of {', '.join(FEATURES)}")
        read = {
            key: read_list(f"inference.{key}", paths)
            for key in ("candidates", "exclude")
            if (paths := getattr(inference, key)) is not None
        }
        made: dict[str, Any] = read | {"blend": Blend.of(inference.blend)}
        return cls(**{rule.name: getattr(inference, rule.name) for rule in fields(cls)} | made)

    @property
    def item_lists(self) -> list[ItemList]:
        """The lists that are set."""
        return [given for given in (self.candidates, self.exclude) if given is not None]

    def with_lists(self, lists: Mapping[str, ItemList]) -> "Ranking":
        """The ranking with other lists, by their keys."""
        changed: dict[str, Any] = dict(lists)
        return replace(self, **changed)

    @property
    def looks_at_items(self) -> bool:
        """Whether a rule depends on what the catalogue has: any that `_WITHOUT_ITEMS` does not name."""
        default = Ranking()
        names = {rule.name for rule in fields(self)} - _WITHOUT_ITEMS
        return any(getattr(self, name) != getattr(default, name) for name in names)

    @property
    def changes_lists(self) -> bool:
        """Whether a list may differ from the first items of the ranking."""
        return bool(self.diversity > 0 or self.max_per or self.min_score is not None)

    def identity(self) -> dict[str, Any]:
        """What tells apart the results of two rankings, for JSON. Of a list it is the content.

        Rules that came after the first version are left out at their defaults, so that earlier results stay valid.
        """
        first, default = ("exclude_seen", "exclude_future", "popularity_discount"), Ranking()
        values = {rule.name: getattr(self, rule.name) for rule in fields(self)}
        return {
            name: value.digest if isinstance(value, ItemList) else value.identity() if name == "blend" else value
            for name, value in values.items()
            if name in first or value != getattr(default, name)
        }

    def output_weights(self, model: Model) -> tuple[Tensor, Tensor]:
        """Weights [V, D] and bias [V]: a state's product with them gives the scores of all items."""
        return model.output_weights(self.popularity_discount)

    def exclusions(self, histories: Windows, items: ItemTable, sequences: Sequences, users: Tensor) -> "Exclusions":
        """What may not be ranked for the users [B] of `sequences`; `histories` are theirs, on the model's device."""
        return Exclusions.of(
            histories if self.exclude_seen else None,
            (items, sequences, users) if self.exclude_future else None,
            histories.items.device,
        )


_WITHOUT_ITEMS = {
    *("exclude_seen", "exclude_future", "popularity_discount", "candidates_default", "diversity", "diversity_pool"),
    *("min_score", "scores", "blend"),
}
"""Rules that suit every catalogue, and the blend, which `load_for` and its fit check."""
NO_RULES = Ranking(exclude_seen=False, exclude_future=False)


@dataclass(frozen=True)
class Exclusions:
    """Items that must not be ranked for some of B users."""

    seen_row: Tensor
    """[S] int64 user of each item that is seen, or excluded by a list."""
    seen_item: Tensor
    """[S] int64 that item, counted from 0."""
    release_year: Tensor | None = None
    """[V] int32 year of release, the smallest integer where unknown (never in the future)."""
    last_year: Tensor | None = None
    """[B] int32 year of the last interaction, the largest integer where unknown (nothing is in its future)."""
    forbidden: Tensor | None = None
    """[V] bool: items that no user may get."""
    only: "Only | None" = None
    """Users who may get nothing but the items of their lists."""

    @classmethod
    def of(
        cls,
        seen: Windows | None,
        future_of: tuple[ItemTable, Sequences, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Exclusions":
        """Exclude what the windows `seen` hold, and items released in a later year than the last interaction.

        Parameters
        ----------
        seen : Windows or None
            B windows; none leaves seen items in.
        future_of : tuple or None
            The catalogue, users, and [B] indices of the batch's users among them; none leaves later releases in.
        """
        row = item = torch.empty(0, dtype=torch.int64, device=device)
        if seen is not None:
            row, tokens = seen.flat()
            item = tokens.long() - 1
        if future_of is None:
            return cls(row, item)
        items, sequences, users = future_of
        limits = np.iinfo(np.int32)
        release = np.where(items.has_year, items.year.astype(np.int32), limits.min)
        last = np.where(sequences.has_last_year, sequences.last_year.astype(np.int32), limits.max)[users.numpy()]
        return cls(row, item, torch.from_numpy(release).to(device), torch.from_numpy(last).to(device))

    def split(self, blocks: list[tuple[int, int]]) -> "list[Exclusions]":
        """Those of each block of items, counted from where it begins; the blocks follow one another."""
        seen = _split_pairs(self.seen_row, self.seen_item, blocks)
        only = [None] * len(blocks) if self.only is None else self.only.split(blocks)
        return [
            Exclusions(
                *pairs,
                None if self.release_year is None else self.release_year[low:high],
                self.last_year,
                None if self.forbidden is None else self.forbidden[low:high],
                listed,
            )
            for (low, high), pairs, listed in zip(blocks, seen, only, strict=True)
        ]

    def apply(self, scores: Tensor) -> Tensor:
        """Set them to -inf in a block [B, width] of scores, in place."""
        if self.only is not None:
            self.only.apply(scores)
        scores[self.seen_row, self.seen_item] = -torch.inf
        if self.release_year is not None and self.last_year is not None:
            scores.masked_fill_(self.release_year > self.last_year[:, None], -torch.inf)
        if self.forbidden is not None:
            scores.masked_fill_(self.forbidden, -torch.inf)
        return scores

    def has(self, items: Tensor) -> Tensor:
        """[B] bool: whether each user's item in `items` [B], counted from 0, is excluded for that user."""
        excluded = torch.zeros(len(items), dtype=torch.bool, device=items.device)
        if self.only is not None:
            excluded = self.only.has_list.clone()
            excluded[self.only.row[self.only.item == items[self.only.row]]] = False
        excluded[self.seen_row[self.seen_item == items[self.seen_row]]] = True
        if self.release_year is not None and self.last_year is not None:
            excluded |= self.release_year[items] > self.last_year
        return excluded if self.forbidden is None else excluded | self.forbidden[items]

    def and_pairs(self, row: Tensor, item: Tensor) -> "Exclusions":
        """Exclude more items [S] of users [S]."""
        return replace(self, seen_row=torch.cat([self.seen_row, row]), seen_item=torch.cat([self.seen_item, item]))

    def within(self, columns: Tensor) -> "Exclusions":
        """The same where only the items in `columns` [A], ascending, are ranked, and counted by their place there."""
        return Exclusions(
            *_places(columns, self.seen_row, self.seen_item),
            None if self.release_year is None else self.release_year[columns],
            self.last_year,
            None if self.forbidden is None else self.forbidden[columns],
            None if self.only is None else self.only.within(columns),
        )

    def of_users(self, users: Tensor) -> "Exclusions":
        """Those of the users in `users` [B'], ascending."""
        return Exclusions(
            *_rows(users, self.seen_row, self.seen_item),
            self.release_year,
            None if self.last_year is None else self.last_year[users],
            self.forbidden,
            None if self.only is None else self.only.of_users(users),
        )


@dataclass(frozen=True)
class Only:
    """Users who may get nothing but the items of their lists."""

    row: Tensor
    """[S] int64 user of each item of a list."""
    item: Tensor
    """[S] int64 that item, counted from 0."""
    has_list: Tensor
    """[B] bool: whose choice is restricted."""

    def split(self, blocks: list[tuple[int, int]]) -> "list[Only]":
        """Those of each block of items."""
        return [Only(row, item, self.has_list) for row, item in _split_pairs(self.row, self.item, blocks)]

    def within(self, columns: Tensor) -> "Only":
        """As `Exclusions.within`."""
        return Only(*_places(columns, self.row, self.item), self.has_list)

    def of_users(self, users: Tensor) -> "Only":
        """As `Exclusions.of_users`."""
        return Only(*_rows(users, self.row, self.item), self.has_list[users])

    def apply(self, scores: Tensor) -> None:
        """Set all but the lists to -inf in a block [B, width] of scores, in place."""
        kept = scores[self.row, self.item]
        scores.masked_fill_(self.has_list[:, None], -torch.inf)
        scores[self.row, self.item] = kept


def _split_pairs(row: Tensor, item: Tensor, blocks: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a user and an item, by block of items, the items counted from where the block begins."""
    if not blocks:  # no item may be ranked
        return []
    if len(blocks) > 1:
        item, order = item.sort()
        row = row[order]
    begins = torch.tensor([low for low, _ in blocks[1:]], dtype=torch.int64, device=item.device)
    places = [0, *torch.searchsorted(item, begins).tolist(), len(item)]
    return [
        (row[begin:end], item[begin:end] - low)
        for (low, _), begin, end in zip(blocks, places[:-1], places[1:], strict=True)
    ]


def _places(ascending: Tensor, row: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs whose item is in `ascending`, with the item's place there."""
    inside, place = places_in(ascending, item)
    return row[inside], place


def _rows(ascending: Tensor, row: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs whose user is in `ascending`, with the user's place there."""
    item, row = _places(ascending, item, row)
    return row, item


def load_for(dataset: PreparedDataset, checkpoint: str, ranking: Ranking) -> Model:
    """The model of `checkpoint`, if it was trained on this dataset's catalogue and can be scored by the rules.

    Raises
    ------
    InputError
        If not, or if it is damaged.
    """
    model = read_model(checkpoint)
    model.discounted_bias(ranking.popularity_discount)  # raises where there can be none
    if model.catalogue != dataset.manifest.catalogue:
        raise InputError(
            f"{checkpoint}: this model was trained on another catalogue (fingerprint {model.catalogue}, "
            f"{model.num_items} items) than {dataset.path} (fingerprint {dataset.manifest.catalogue}, "
            f"{dataset.num_items} items); train on this dataset, or name a checkpoint that was"
        )
    if model.reads_times:
        dataset.time_span()  # raises where there are no times
    return model


@torch.inference_mode()
def next_item_states(model: Model, histories: Windows) -> Tensor:
    """[B, D] projected states that `output_weights` turn into scores of each history's next item: at a [MASK] behind
    it (Section 3.6), or with causal attention at its last item. Those of an average are side by side."""
    if isinstance(model, Average):
        return torch.cat([next_item_states(network, histories) for network in model.networks], dim=1)
    states = torch.empty(len(histories), model.config.hidden_units, device=model.device)
    for rows in by_length((histories.lengths + 1).clamp(max=model.config.max_len), PASS_TOKENS):
        tokens, times = ask_next(histories.users(rows), model.config, model.num_items)
        states[rows] = model.project(model.encode(pack(tokens, None, tokens.device, times=times))).float()
    return states


class NextScores:
    """Scores of items as the next one of each history: the product of states [B, D] and weights [V, D].

    With `columns` [A], only these items have scores, and A takes the place of V. `added` is added to the product.
    """

    def __init__(
        self, states: Tensor, weights: Tensor, bias: Tensor, columns: Tensor | None = None, added: Added | None = None
    ) -> None:
        self.states, self.weights, self.bias, self.columns, self.added = states, weights, bias, columns, added
        self._block: Tensor | None = None

    def __call__(self, low: int, high: int) -> Tensor:
        """[B, high-low], in memory that the next call uses again."""
        if self.columns is None:
            weights, bias = self.weights[low:high], self.bias[low:high]
        else:  # index_select copies rows several times as fast as an index does
            at = self.columns[low:high]
            weights, bias = self.weights.index_select(0, at), self.bias.index_select(0, at)
        # Into the same memory each time: for few hidden units, fresh pages cost as much as the product.
        used = self._block if self._block is not None and self._block.shape[1] == high - low else None
        self._block = product(self.states, weights, bias, out=used)
        if self.added is not None:
            self.added.add_to(self._block, low, high)
        return self._block

    def of_users(self, users: Tensor) -> "NextScores":
        """Those of the users in `users` [B']."""
        added = None if self.added is None else self.added.of_users(users)
        return NextScores(self.states[users], self.weights, self.bias, self.columns, added)

    def with_weight(self, weight: float) -> "NextScores":
        """The same with another weight of what is added."""
        assert self.added is not None
        return NextScores(self.states, self.weights, self.bias, self.columns, replace(self.added, weight=weight))


@torch.inference_mode()
def score_next(
    model: Model, histories: Windows, ranking: Ranking = NO_RULES, columns: Tensor | None = None
) -> NextScores:
    """Scores of items, or only of those in `columns` [A], as the next one of each history, by those rules that are the
    same for all users, and with `ranking.blend`, which was read or fitted."""
    weights, bias = (tensor.detach() for tensor in ranking.output_weights(model))
    states, added = next_item_states(model, histories), None
    if ranking.blend is not None:
        network = model, ranking.popularity_discount
        added = ranking.blend.added(network, histories, states, (weights, bias), columns)
    return NextScores(states, weights, bias, columns, added)


def masked(scores: Scorer, exclusions: Exclusions) -> Scorer:
    """The same scores, -inf where an item is excluded."""

    def allowed(low: int, high: int) -> Tensor:
        block = scores(low, high)
        return exclusions.within(torch.arange(low, high, device=block.device)).apply(block)

    return allowed


@torch.inference_mode()
def score_similar(model: Model, items: Tensor) -> Scorer:
    """Cosine of the input vectors of `items` [B], counted from 0, with those of all items."""
    own = F.normalize(model.items(items + 1), dim=1)
    # A new item without any metadata has nothing to be compared by.
    unknown = model.unrankable

    @torch.inference_mode()
    def scores(low: int, high: int) -> Tensor:
        vectors = model.items(torch.arange(low + 1, high + 1, device=own.device))
        return F.linear(own, F.normalize(vectors, dim=1)).masked_fill(unknown[low:high], -torch.inf)

    return scores


def item_blocks(num_users: int, num_items: int, score_bytes: int) -> list[tuple[int, int]]:
    """Ranges of items such that a float32 block of `num_users` rows takes at most `score_bytes`."""
    width = max(1, score_bytes // (4 * max(num_users, 1)))
    return [(low, min(low + width, num_items)) for low in range(0, num_items, width)]


@torch.inference_mode()
def top_k(
    scores: Scorer,
    exclusions: Exclusions,
    num_users: int,
    num_items: int,
    k: int,
    score_bytes: int = DEFAULT_SCORE_BYTES,
    watch: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The best items of each user.

    Parameters
    ----------
    watch
        Called with each block of scores [B, width], -inf where an item is excluded.

    Returns
    -------
    values : Tensor
        [B, K] float32, falling; -inf where fewer than K items remain.
    items : Tensor
        [B, K] int64, counted from 0; meaningless where the value is -inf.
    """
    device = exclusions.seen_row.device
    if device.type == "cpu":
        score_bytes = min(score_bytes, CPU_BLOCK_BYTES)
    items = torch.zeros((num_users, k), dtype=torch.int64, device=device)
    values = torch.full((num_users, k), -torch.inf, device=device)
    blocks = item_blocks(num_users, num_items, score_bytes)
    for (low, high), excluded in zip(blocks, exclusions.split(blocks), strict=True):
        block = excluded.apply(scores(low, high))
        if watch is not None:
            watch(block)
        if low == 0:
            values = block.new_full((num_users, k), -torch.inf)
        better = (block.amax(1) > values[:, -1]).nonzero().flatten()  # soon that is true of few users
        of_better = block if len(better) == num_users else block.index_select(0, better)
        best = of_better.topk(min(k, high - low), dim=1)
        both = torch.cat([values[better], best.values], dim=1)
        values[better], order = both.topk(k, dim=1)
        items[better] = torch.cat([items[better], best.indices + low], dim=1).gather(1, order)
    return values, items


@torch.inference_mode()
def rank_of_target(
    scores: Scorer,
    exclusions: Exclusions,
    targets: Tensor,
    num_items: int,
    score_bytes: int = DEFAULT_SCORE_BYTES,
    over_shards: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """[B] int64 rank, from 1, of each target token [B]; items of equal score rank before it.

    A target that is itself excluded gets rank V+1: it cannot be recommended, whatever the cut-off.

    Parameters
    ----------
    over_shards : callable
        Sums up over workers, of whom each has a shard of the items. Scores, exclusions, targets and V are then those of
        the shard, and a target of another shard is 0.
    """
    index = (targets - 1)[:, None]
    blocks = item_blocks(len(targets), num_items, score_bytes)
    parts = exclusions.split(blocks)
    kept: Tensor | None = None
    target_score = torch.full(index.shape, -torch.inf if over_shards is None else 0.0, device=index.device)
    for (low, high), excluded in zip(blocks, parts, strict=True):
        block = excluded.apply(scores(low, high))  # the target's score comes of the product that it is compared with
        inside = (index >= low) & (index < high)
        own = block.gather(1, (index - low).clamp(0, high - low - 1))
        target_score = torch.where(inside, own, target_score)
        kept = block if len(blocks) == 1 else None
    if over_shards is not None:
        target_score = over_shards(target_score)
    rank = torch.zeros(len(targets), dtype=torch.int64, device=index.device)
    for (low, high), excluded in zip(blocks, parts, strict=True):
        block = excluded.apply(scores(low, high)) if kept is None else kept
        rank += (block >= target_score).sum(1)  # the target itself is among them: ranks start at 1
    is_excluded = target_score[:, 0] == -torch.inf
    rank = torch.where(is_excluded, num_items, rank)
    return (rank if over_shards is None else over_shards(rank)) + is_excluded


@torch.inference_mode()
def rank_among(
    scores: Scorer, candidates: Tensor, targets: Tensor, num_items: int, score_bytes: int = DEFAULT_SCORE_BYTES
) -> Tensor:
    """[B] int64 rank, from 1, of each target token [B] among itself and its candidates; equal scores rank before it.

    Parameters
    ----------
    candidates : Tensor
        [B, C] int64 items, counted from 0, without the target; -1 for none.
    """
    wanted = torch.cat([(targets - 1)[:, None], candidates], dim=1)  # (B, 1+C)
    found = torch.full(wanted.shape, -torch.inf, device=wanted.device)
    for low, high in item_blocks(len(targets), num_items, score_bytes):
        block = scores(low, high)
        inside = (wanted >= low) & (wanted < high)
        found = torch.where(inside, block.gather(1, (wanted - low).clamp(0, high - low - 1)), found)
    rank = ((found >= found[:, :1]) & (wanted >= 0)).sum(1)  # the target itself is among them
    return torch.where(found[:, 0] == -torch.inf, num_items + 1, rank)
