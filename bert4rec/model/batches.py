"""Makes batches from flat histories: truncates, masks, and packs rows by length. Uses only tensor operations.

Shapes: B users, L positions, M queried positions a user, T interactions in all, S positions of a packed batch.
Sequences are padded on the left, so that the last column is always the latest position.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert4rec.config import DataConfig, ModelConfig
from bert4rec.data.dataset import PADDING
from bert4rec.data.windows import Windows
from bert4rec.model.layers import full_size

MAX_PADDING = 0.04
"""Largest share of padding in a group of rows, besides GROUP_TOKENS."""
GROUP_TOKENS = {"cpu": 32, "cuda": 2048}
"""Positions of padding that take about as long as one more group. A GPU waits for the launch of each group."""
STEPS_AHEAD = 2
"""Steps that a thread prepares while a GPU works on another one."""


class Group(NamedTuple):
    """Rows of similar length in a packed batch."""

    rows: int
    """B."""
    length: int
    """L, the length of the longest row."""
    queries: int
    """M, the largest number of queried positions in a row."""
    is_padded: bool
    """Whether a row is shorter than L."""


class Batch(NamedTuple):
    """The model's input: groups of rows laid end to end, each group padded only to its own length (see `pack`)."""

    tokens: Tensor
    """[S] int64: each group's [B, L], flat, and at the end some padding outside all groups (`layers.full_size`)."""
    position: Tensor
    """[S] int64 distance from the end of the row."""
    query: Tensor
    """[Q] int64 places in `tokens` whose hidden states the model computes: each group's [B, M], flat, and some
    padding."""
    labels: Tensor
    """[Q] int64 true token at each `query`; 0 for a query that only fills its row."""
    wanted: Tensor
    """[N] int64 places in `query` that have a label. They are computed here so that nothing waits for a GPU to count
    them."""
    groups: list[Group]
    distinct: tuple[Tensor, Tensor] | None = None
    """[U] int64 the distinct tokens, ascending, and [S] int64 which of them each token is, if `pack` was asked for it.
    """
    times: Tensor | None = None
    """[S] int64 Unix seconds of each token, or None. A masked position has the time of its own item."""

    def rectangles(self, flat: Tensor | None = None) -> list[Tensor]:
        """Each group's part [B, L] of `flat` [S], by default of the tokens."""
        flat = self.tokens if flat is None else flat
        sizes = [group.rows * group.length for group in self.groups]
        parts = torch.split(flat[: sum(sizes)], sizes)
        return [part.view(group.rows, -1) for group, part in zip(self.groups, parts, strict=True)]

    def at_queries(self, flat: Tensor) -> list[Tensor]:
        """Each group's part [B, M] of `flat` [S] at the queries."""
        sizes = [group.rows * group.queries for group in self.groups]
        places = torch.split(self.query[: sum(sizes)], sizes)
        return [flat[own].view(group.rows, -1) for group, own in zip(self.groups, places, strict=True)]


class Step(NamedTuple):
    """One worker's part of a training step."""

    batches: list[Batch]
    num_targets: int
    """Targets of the whole step, over all workers."""
    num_tokens: int
    """Real tokens of the whole step, over all workers."""
    drawn: Tensor
    """State of the epoch's random generator after this step; the same on all workers."""


def last_items(windows: Windows, max_len: int) -> Tensor:
    """[B, L] int64 tokens of each user's last `max_len` items; L is the longest row."""
    return tokens_at(windows, last_places(windows, max_len))


def tokens_at(windows: Windows, places: Tensor) -> Tensor:
    """[B, L] int64 tokens at `places` [B, L] of the windows' items, which are -1 at padding."""
    return windows.items[places.clamp(min=0)].long().masked_fill(places < 0, PADDING)


def times_at(windows: Windows, places: Tensor) -> Tensor | None:
    """[B, L] int64 times at `places` [B, L], 0 at padding; None if the windows have no times."""
    return None if windows.times is None else windows.times[places.clamp(min=0)].masked_fill(places < 0, 0)


def last_places(windows: Windows, max_len: int) -> Tensor:
    """[B, L] int64 places in windows.items of each user's last `max_len` items, -1 at padding; L is the longest
    row."""
    length = windows.lengths.clamp(max=max_len)
    width = max(int(length.max()), 1)
    column = torch.arange(width, device=length.device)
    index = windows.end[:, None] - width + column
    return index.masked_fill(column < width - length[:, None], -1)


def weighted_places(windows: Windows, max_len: int, generator: torch.Generator) -> Tensor:
    """[B, L] int64 places. From a history longer than `max_len`, draw that many items without replacement.

    The n-th item of a user has weight n. The items with the smallest Exp(1) / weight win (Efraimidis & Spirakis 2006)
    and keep their order in time.
    """
    places = last_places(windows, max_len)
    is_long = windows.lengths > max_len
    if not is_long.any():
        return places
    long = windows.users(is_long.nonzero().flatten())
    row, flat = long.flat_places()  # [S], S = all items of the long histories
    first = torch.cumsum(long.lengths, 0) - long.lengths
    place = torch.arange(len(row)) - first[row]
    draw = torch.empty(len(row), dtype=torch.float64).exponential_(generator=generator) / (place + 1)
    by_row_then_draw = torch.argsort(row + draw / (1 + draw))  # the fraction lies in [0, 1)
    chosen = by_row_then_draw[place < max_len].sort().values  # max_len of each row, in order of time
    places[is_long] = flat[chosen].view(len(long), max_len)
    return places


def window_places(windows: Windows, max_len: int, generator: torch.Generator) -> Tensor:
    """[B, L] int64 places. From a history longer than `max_len`, take consecutive items from a uniformly drawn
    place."""
    spare = (windows.lengths - max_len).clamp(min=0)
    left_out = (torch.rand(len(windows), generator=generator, dtype=torch.float64) * (spare + 1)).long()
    return last_places(replace(windows, end=windows.end - left_out), max_len)


def mask_items(
    tokens: Tensor, model: ModelConfig, num_items: int, generator: torch.Generator, num_new_items: int = 0
) -> tuple[Tensor, Tensor]:
    """Mask items for the masked-item task (Section 3.6, with replacements as in BERT).

    Each item becomes a target with probability `random_mask_prob`. Of the targets, 80% become [MASK], 10% a random
    item, and 10% stay. Then, with probability `last_item_mask_ratio`, the last item of a sequence also becomes a
    target, replaced by [MASK].

    Parameters
    ----------
    tokens : Tensor
        [B, L] int64, padded on the left, with at least one item per row.
    num_new_items : int
        Number of untrained items, which have the last tokens. Random replacements never use them.

    Returns
    -------
    masked : Tensor
        [B, L] the model's input.
    labels : Tensor
        [B, L] the true token at targets, 0 at other places.
    """
    mask_token = num_items + 1
    target = (torch.rand(tokens.shape, generator=generator) < model.random_mask_prob) & (tokens != PADDING)
    how = torch.rand(tokens.shape, generator=generator)
    random_items = torch.randint(1, num_items - num_new_items + 1, tokens.shape, generator=generator)
    masked = torch.where(target & (how < 0.8), mask_token, tokens)
    masked = torch.where(target & (how >= 0.9), random_items, masked)
    last = torch.rand(len(tokens), generator=generator) < model.last_item_mask_ratio
    target[:, -1] |= last
    masked[:, -1] = torch.where(last, mask_token, masked[:, -1])
    return masked, torch.where(target, tokens, PADDING)


def next_items(items: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """[B, L] the model's input and labels of the next-item task (SASRec, arXiv 1808.09781): each item is the target at
    the one before it, the first at a [MASK]."""
    return begin_with_mask(items[:, :-1], num_items), items


def begin_with_mask(items: Tensor, num_items: int) -> Tensor:
    """[B, L+1] tokens: [MASK], then the items [B, L], padded on the left."""
    first = (items == PADDING).sum(1, keepdim=True)
    return F.pad(items, (1, 0), value=PADDING).scatter(1, first, num_items + 1)


def ask_next(windows: Windows, model: ModelConfig, num_items: int) -> tuple[Tensor, Tensor | None]:
    """The model's input to predict the next item at its last place.

    Returns
    -------
    tokens : Tensor
        [B, L] int64: the last max_len-1 items and [MASK], which comes last, or first where attention is causal.
    times : Tensor or None
        [B, L] int64 Unix seconds: `Batch.times`, at the last place `windows.asked`; None if the windows do not say when
        they ask.
    """
    places = last_places(windows, model.max_len - 1)
    items, times = tokens_at(windows, places), times_at(windows, places)
    match model.attention:
        case "bidirectional":
            tokens = F.pad(items, (0, 1), value=num_items + 1)
        case "causal":
            tokens = begin_with_mask(items, num_items)
        case _:
            assert_never(model.attention)
    if times is None or windows.asked is None:
        return tokens, None
    return tokens, torch.cat([times, windows.asked[:, None]], dim=1)


def by_length(lengths: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Yield indices of rows, longest first, in parts of about equal numbers of tokens: `max_tokens` and a row at
    most."""
    order = torch.argsort(lengths, descending=True, stable=True)
    until = torch.cumsum(lengths[order].clamp(min=1), 0)
    total = int(until[-1]) if len(until) else 0
    part = (until - 1) * -(-total // max_tokens) // max(total, 1)
    yield from torch.split(order, torch.unique_consecutive(part, return_counts=True)[1].tolist())


def pack(
    tokens: Tensor,
    labels: Tensor | None,
    device: torch.device,
    finds_distinct: bool = False,
    times: Tensor | None = None,
) -> Batch:
    """Lay rows end to end in groups of similar length, so that layers do almost no work for padding.

    Only attention needs rectangles. A row is therefore padded only to the longest row of its group, and a group ends
    where its padding would take more time than another group.

    Parameters
    ----------
    tokens : Tensor
        [B, L] int64, padded on the left, longest row first, with at least one token per row.
    labels : Tensor or None
        [B, L] true token at targets, 0 at other places. With None, the last position of each row is queried.
    finds_distinct : bool
        Whether to find the distinct tokens of the batch. On a GPU, the model would have to wait for their number.
    times : Tensor or None
        [B, L] int64 Unix seconds of each token.
    """
    lengths = (tokens != PADDING).sum(1).tolist()
    assert lengths == sorted(lengths, reverse=True)
    groups, parts, begin, offset = [], [], 0, 0
    for end in _group_ends(np.asarray(lengths), GROUP_TOKENS[device.type]):
        rows, length = end - begin, lengths[begin]
        inner = tokens[begin:end, -length:]
        position = torch.arange(length - 1, -1, -1, device=tokens.device).expand_as(inner)
        if labels is None:
            query = torch.full((rows, 1), length - 1, device=tokens.device)
            answers = torch.ones_like(query)
        else:
            own = labels[begin:end, -length:]
            most = max(1, int((own != PADDING).sum(1).max()))
            query = torch.argsort((own == PADDING).to(torch.uint8), dim=1, stable=True)[:, :most]
            answers = own.gather(1, query)
        query = query + (offset + length * torch.arange(rows, device=tokens.device))[:, None]
        moments = [] if times is None else [times[begin:end, -length:]]
        parts.append([part.reshape(-1) for part in (inner, position, query, answers, *moments)])
        groups.append(Group(rows, length, query.shape[1], lengths[end - 1] < length))
        begin, offset = end, offset + inner.numel()
    flat = [torch.cat(part) for part in zip(*parts, strict=True)]
    wanted = torch.arange(len(flat[3]), device=tokens.device) if labels is None else torch.nonzero(flat[3]).flatten()
    flat = [F.pad(part, (0, full_size(len(part), device.type) - len(part))) for part in flat]
    distinct = torch.unique(flat[0], return_inverse=True) if finds_distinct else ()
    tensors = [*flat[:4], wanted, *distinct, *flat[4:]]
    if device.type == "cuda" and tokens.device.type == "cpu":
        tensors = [
            part.pin_memory() for part in tensors
        ]  # otherwise each copy waits until the GPU has done all its work
    tensors = [part.to(device, non_blocking=True) for part in tensors]
    found = (tensors[5], tensors[6]) if finds_distinct else None
    own_times = None if times is None else tensors[-1]
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], groups, found, own_times)


def _group_ends(lengths: np.ndarray, group_tokens: int) -> Iterator[int]:
    """Yield the end of each group of rows; the longest rows come first."""
    begin = 0
    while begin < len(lengths):
        area = lengths[begin] * np.arange(1, len(lengths) - begin + 1)
        too_much = area - np.cumsum(lengths[begin:]) > MAX_PADDING * area + group_tokens
        begin = begin + int(too_much.argmax()) if too_much.any() else len(lengths)
        yield begin


def iter_steps(
    windows: Windows,
    data: DataConfig,
    model: ModelConfig,
    num_items: int,
    epoch: int,
    rank: int,
    world_size: int,
    max_tokens: int,
    device: torch.device,
    num_new_items: int = 0,
    after: tuple[int, Tensor] | None = None,
) -> Iterator[Step]:
    """Yield this worker's part of every step of an epoch.

    Every worker draws the same users and masks for the whole step, then takes its share of the rows. The targets are
    therefore the same for any number of workers, and with dropout 0 so are the gradients. The users of a step are a
    uniform draw; only within the step are they sorted by length.

    Parameters
    ----------
    max_tokens : int
        Most tokens in one forward pass.
    after : (int, Tensor)
        Go on after that many steps, with the `Step.drawn` of the last one.
    """
    generator = torch.Generator().manual_seed(data.seed * 1_000_003 + epoch)
    parts = torch.split(torch.randperm(len(windows), generator=generator), data.batch_size)
    num_done = 0
    if after is not None:
        num_done, drawn = after
        generator.set_state(drawn)
    for users in parts[num_done:]:
        chosen = windows.users(users)
        match data.sampling_strategy:
            case "recent":
                places = last_places(chosen, model.max_len)
            case "weighted":
                places = weighted_places(chosen, model.max_len, generator)
            case "window":
                places = window_places(chosen, model.max_len, generator)
            case _:
                assert_never(data.sampling_strategy)
        tokens, times = tokens_at(chosen, places), times_at(chosen, places)
        match model.attention:
            case "bidirectional":
                masked, labels = mask_items(tokens, model, num_items, generator, num_new_items)
            case "causal":
                masked, labels = next_items(tokens, num_items)
            case _:
                assert_never(model.attention)
        lengths = (tokens != PADDING).sum(1)
        rows = torch.argsort(lengths, descending=True, stable=True)[rank::world_size]
        batches = [
            pack(masked[part], labels[part], device, model.uses_metadata, None if times is None else times[part])
            for part in (rows[chosen] for chosen in by_length(lengths[rows], max_tokens))
        ]
        if not batches:  # fewer users than workers: DDP still needs a forward pass, so make one without targets
            length = int(lengths[0])
            none, own_times = torch.zeros_like(labels[:1, -length:]), None if times is None else times[:1, -length:]
            batches = [pack(masked[:1, -length:], none, device, model.uses_metadata, own_times)]
        yield Step(batches, int((labels != PADDING).sum()), int(lengths.sum()), generator.get_state())


def steps_ahead(steps: Iterator[Step], start: Callable[[], object] = lambda: None) -> Iterator[Step]:
    """Yield the same steps. A thread, which first calls `start`, prepares the next `STEPS_AHEAD` of them."""
    with ThreadPoolExecutor(1, initializer=start) as thread:
        coming = deque(thread.submit(next, steps, None) for _ in range(STEPS_AHEAD))
        while (step := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, steps, None))
            yield step
