"""From flat histories to batches: hold out, truncate, mask, pack by length. Tensor operations only, on any device.

Shapes: B users, L positions, M queried positions a user, T interactions in all, S positions of a packed batch.
Sequences are padded on the left, so that the last column is always the latest position.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
"""Largest share of padding in a group of rows..."""
GROUP_TOKENS = {"cpu": 32, "cuda": 2048}
"""...besides this many positions: what one more group costs in time, about; a GPU waits for each to be launched."""
STEPS_AHEAD = 2
"""Steps that are made while a GPU works on another one."""


class Group(NamedTuple):
    """Rows of like length in a packed batch."""

    rows: int
    """B."""
    length: int
    """L, of the longest row."""
    queries: int
    """M, of the row with most of them."""
    is_padded: bool
    """Whether a row is shorter than L."""


class Batch(NamedTuple):
    """What the model reads: groups of rows laid end to end, each padded to its own length alone (see `pack`)."""

    tokens: Tensor
    """[S] int64; each group's [B, L], flat, and at the end some padding of no group (`functions.full_size`)."""
    position: Tensor
    """[S] int64 distance from the end of the row."""
    query: Tensor
    """[Q] int64 places in `tokens` whose hidden states are wanted; each group's [B, M], flat, and some more."""
    labels: Tensor
    """[Q] int64 true token at `query`, 0 where it only fills the row."""
    wanted: Tensor
    """[N] int64 places in `query` that have a label: known here, so that nobody has to wait for a GPU to count them."""
    groups: list[Group]

    def rectangles(self) -> list[Tensor]:
        """Each group's tokens [B, L]."""
        sizes = [group.rows * group.length for group in self.groups]
        parts = torch.split(self.tokens[: sum(sizes)], sizes)
        return [part.view(group.rows, -1) for group, part in zip(self.groups, parts, strict=True)]


class Step(NamedTuple):
    """One worker's part of a training step."""

    batches: list[Batch]
    num_targets: int
    """Targets of the whole step, over all workers."""
    num_tokens: int
    """Real tokens of the whole step, over all workers."""


def last_items(windows: Windows, max_len: int) -> Tensor:
    """[B, L] int64 tokens of each user's last `max_len` items, L the longest of them."""
    length = windows.lengths.clamp(max=max_len)
    width = max(int(length.max()), 1)
    column = torch.arange(width, device=length.device)
    index = windows.end[:, None] - width + column
    padding = column < width - length[:, None]
    return windows.items[index.masked_fill(padding, 0)].long().masked_fill(padding, PADDING)


def weighted_items(windows: Windows, max_len: int, generator: torch.Generator) -> Tensor:
    """[B, L] int64 tokens; of a history longer than `max_len`, that many items drawn without replacement.

    The n-th of a user's items is drawn with weight n (Efraimidis & Spirakis 2006: the smallest Exp(1) / weight win);
    the order of time is kept.
    """
    tokens = last_items(windows, max_len)
    is_long = windows.lengths > max_len
    if not is_long.any():
        return tokens
    long = windows.users(is_long.nonzero().flatten())
    row, items = long.flat()  # [S], S = all items of the long histories
    first = torch.cumsum(long.lengths, 0) - long.lengths
    place = torch.arange(len(row)) - first[row]
    draw = torch.empty(len(row), dtype=torch.float64).exponential_(generator=generator) / (place + 1)
    by_row_then_draw = torch.argsort(row + draw / (1 + draw))  # the fraction lies in [0, 1)
    chosen = by_row_then_draw[place < max_len].sort().values  # max_len of each row, in order of time
    tokens[is_long] = items[chosen].long().view(len(long), max_len)
    return tokens


def window_items(windows: Windows, max_len: int, generator: torch.Generator) -> Tensor:
    """[B, L] int64 tokens; of a history longer than `max_len`, that many that follow one another, drawn evenly."""
    spare = (windows.lengths - max_len).clamp(min=0)
    left_out = (torch.rand(len(windows), generator=generator, dtype=torch.float64) * (spare + 1)).long()
    return last_items(Windows(windows.items, windows.start, windows.end - left_out), max_len)


def mask_items(
    tokens: Tensor, model: ModelConfig, num_items: int, generator: torch.Generator, num_new_items: int = 0
) -> tuple[Tensor, Tensor]:
    """The masked-item task (Section 3.6; replacement as in BERT).

    Each item becomes a target with `random_mask_prob`: 80% are replaced by [MASK], 10% by a random item, 10% stay.
    Then, with `last_item_mask_ratio`, the last item of the sequence is made a target and replaced by [MASK].

    Parameters
    ----------
    tokens : Tensor
        [B, L] int64, padded on the left, at least one item a row.
    num_new_items : int
        Items, the last ones, that no random replacement may bring in, as they are not trained.

    Returns
    -------
    masked : Tensor
        [B, L] the model's input.
    labels : Tensor
        [B, L] the true token at targets, 0 elsewhere.
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


def append_mask(windows: Windows, max_len: int, num_items: int) -> Tensor:
    """[B, L] the last max_len-1 items and [MASK] behind them: what the model reads to predict the next item."""
    items = last_items(windows, max_len - 1)
    return torch.cat([items, items.new_full((len(items), 1), num_items + 1)], dim=1)


def by_length(lengths: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Indices of rows, longest first, in parts of about as many tokens each, `max_tokens` (and a row more) at most."""
    order = torch.argsort(lengths, descending=True, stable=True)
    until = torch.cumsum(lengths[order].clamp(min=1), 0)
    total = int(until[-1]) if len(until) else 0
    part = (until - 1) * -(-total // max_tokens) // max(total, 1)
    yield from torch.split(order, torch.unique_consecutive(part, return_counts=True)[1].tolist())


def pack(tokens: Tensor, labels: Tensor | None, device: torch.device) -> Batch:
    """Lay rows end to end in groups of like length, so that work is done almost only where there is a token.

    Attention wants rectangles, all other layers do not care: a row is padded to the longest of its group alone, and a
    group ends where its padding would cost more than another group does.

    Parameters
    ----------
    tokens : Tensor
        [B, L] int64, padded on the left, longest row first, at least one token a row.
    labels : Tensor or None
        [B, L] true token at targets, 0 elsewhere; None asks for the last position of each row.
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
        parts.append([part.reshape(-1) for part in (inner, position, query, answers)])
        groups.append(Group(rows, length, query.shape[1], lengths[end - 1] < length))
        begin, offset = end, offset + inner.numel()
    flat = [torch.cat(part) for part in zip(*parts, strict=True)]
    wanted = torch.arange(len(flat[3]), device=tokens.device) if labels is None else torch.nonzero(flat[3]).flatten()
    flat = [F.pad(part, (0, full_size(len(part), device.type) - len(part))) for part in flat]
    tensors = [*flat, wanted]
    if device.type == "cuda" and tokens.device.type == "cpu":
        tensors = [part.pin_memory() for part in tensors]  # else each copy waits for all that the GPU has to do
    tensors = [part.to(device, non_blocking=True) for part in tensors]
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], groups)


def _group_ends(lengths: np.ndarray, group_tokens: int) -> Iterator[int]:
    """Where groups of rows, longest first, end."""
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
) -> Iterator[Step]:
    """This worker's part of every step of an epoch.

    Every worker draws the same users and masks for the whole step and takes its share of the rows, so the targets, and
    with dropout 0 the gradients, are the same for any number of workers. A step's users are a fair draw; they are
    sorted by length only within the step.

    Parameters
    ----------
    max_tokens : int
        Tokens in one forward pass.
    """
    generator = torch.Generator().manual_seed(data.seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(windows), generator=generator)
    for users in torch.split(shuffled, data.batch_size):
        chosen = windows.users(users)
        match data.sampling_strategy:
            case "recent":
                tokens = last_items(chosen, model.max_len)
            case "weighted":
                tokens = weighted_items(chosen, model.max_len, generator)
            case "window":
                tokens = window_items(chosen, model.max_len, generator)
            case _:
                assert_never(data.sampling_strategy)
        masked, labels = mask_items(tokens, model, num_items, generator, num_new_items)
        lengths = (tokens != PADDING).sum(1)
        rows = torch.argsort(lengths, descending=True, stable=True)[rank::world_size]
        batches = [
            pack(masked[rows[part]], labels[rows[part]], device) for part in by_length(lengths[rows], max_tokens)
        ]
        if not batches:  # fewer users than workers: DDP still needs a pass, one without targets
            length = int(lengths[0])
            batches = [pack(masked[:1, -length:], torch.zeros_like(labels[:1, -length:]), device)]
        yield Step(batches, int((labels != PADDING).sum()), int(lengths.sum()))


def steps_ahead(steps: Iterator[Step], start: Callable[[], object] = lambda: None) -> Iterator[Step]:
    """The same steps, the next `STEPS_AHEAD` of them made in a thread that calls `start` first."""
    with ThreadPoolExecutor(1, initializer=start) as thread:
        coming = deque(thread.submit(next, steps, None) for _ in range(STEPS_AHEAD))
        while (step := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, steps, None))
            yield step
