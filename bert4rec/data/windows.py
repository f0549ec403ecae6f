"""Windows: parts of users' histories as ranges of one flat array. Defines what each split sees and holds out.

Shapes: N users, T interactions in all, V items.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bert4rec.config import DataConfig, QueryTime
from bert4rec.data.dataset import Sequences


@dataclass(frozen=True)
class Windows:
    """A part of each user's history, as ranges of one flat array: user n has items[start[n]:end[n]]."""

    items: Tensor
    """[T] int32."""
    start: Tensor
    """[N] int64."""
    end: Tensor
    """[N] int64."""
    times: Tensor | None = None
    """[T] int64 Unix seconds of each item; None where nobody reads them."""
    asked: Tensor | None = None
    """[N] int64 Unix seconds at which each user's next item is asked for, where times are read."""

    @classmethod
    def from_sequences(cls, sequences: Sequences, device: torch.device | str = "cpu") -> Self:
        """Windows that cover whole histories."""
        offsets = torch.from_numpy(sequences.offsets)
        items, times, asked = (_tensor(each, device) for each in (sequences.items, sequences.times, sequences.asked))
        assert items is not None
        return cls(items, offsets[:-1].to(device), offsets[1:].to(device), times, asked)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> Tensor:
        """[N] int64."""
        return self.end - self.start

    def users(self, index: Tensor) -> "Windows":
        """Keep only the users in `index`."""
        asked = None if self.asked is None else self.asked[index]
        return Windows(self.items, self.start[index], self.end[index], self.times, asked)

    def to(self, device: torch.device) -> "Windows":
        """Move to `device`. If this needs a copy, leave out items that no window covers."""
        if self.items.device == device:
            return self
        ends = torch.cumsum(self.lengths, 0)
        place = self.flat_places()[1]
        times = None if self.times is None else self.times[place].to(device)
        asked = None if self.asked is None else self.asked.to(device)
        items = self.items[place].to(device)
        return Windows(items, (ends - self.lengths).to(device), ends.to(device), times, asked)

    def flat(self) -> tuple[Tensor, Tensor]:
        """[S] int64 row and [S] int32 item of each interaction of all windows, in order."""
        row, place = self.flat_places()
        return row, self.items[place]

    def flat_places(self) -> tuple[Tensor, Tensor]:
        """[S] int64 row and [S] int64 place in `items` of each interaction of all windows, in order."""
        lengths = self.lengths
        row = torch.repeat_interleave(torch.arange(len(self), device=lengths.device), lengths)
        shift = self.start - (torch.cumsum(lengths, 0) - lengths)
        return row, shift[row] + torch.arange(len(row), device=row.device)

    def without_last(self, count: int) -> "Windows":
        """All but each user's last `count` items."""
        return replace(self, end=torch.maximum(self.end - count, self.start))


def _tensor(values: np.ndarray | None, device: torch.device | str) -> Tensor | None:
    if values is None:
        return None
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)  # Arrow's is read-only


_MOST_GAPS = 10_000_000

Before = Mapping[str, np.ndarray]
"""By name of a cut-off of the prepared dataset: [N] interactions of each user before it (`Sequences.before`)."""


def training_windows(windows: Windows, data: DataConfig, before: Before | None = None) -> Windows:
    """The interactions that training may see, of users with at least data.min_interactions.

    Leave-one-out: all but the held-out items. Temporal split: all before the validation cut-off, of users who have at
    least data.min_interactions before it.
    """
    if data.split == "leave-one-out" or data.use_full_data:
        kept = windows.users(torch.nonzero(windows.lengths >= data.min_interactions).flatten())
        return kept if data.use_full_data else kept.without_last(data.holdout)
    known = windows_before(windows, "validation", before)
    return known.users(torch.nonzero(known.lengths >= data.min_interactions).flatten())


def held_out_users(windows: Windows, data: DataConfig, split: str, before: Before | None = None) -> Tensor:
    """[N] indices of the users who have a target in `split`, "validation" or "test".

    Leave-one-out: users with at least data.min_interactions. Temporal split: users with at least that many before the
    cut-off of `split` and another interaction after it, which for "validation" must be before the test cut-off.
    """
    if data.split == "leave-one-out":
        return torch.nonzero(windows.lengths >= data.min_interactions).flatten()
    known = windows_before(windows, split, before).lengths
    until = windows_before(windows, "test", before).lengths if split == "validation" else windows.lengths
    return torch.nonzero((known >= data.min_interactions) & (until > known)).flatten()


def held_out(
    windows: Windows,
    data: DataConfig,
    split: str,
    before: Before | None = None,
    query_time: QueryTime = "last",
    usual_gap: int = 0,
) -> tuple[Windows, Tensor]:
    """Histories and targets of `held_out_users`.

    Parameters
    ----------
    query_time
        When the target is asked for, if the windows have times: at its own time, or `usual_gap` seconds after the item
        before it.

    Returns
    -------
    histories : Windows
        The items before the target. For "test" they include the validation item.
    targets : Tensor
        [N] int64 tokens. Leave-one-out: the last item, or for "validation" with holdout 2 the last item but one.
        Temporal split: the first item after the cut-off.
    """
    users = held_out_users(windows, data, split, before)
    if data.split == "temporal":
        histories = windows_before(windows, split, before).users(users)
    else:
        histories = windows.users(users).without_last(data.holdout if split == "validation" else 1)
    if histories.times is not None:
        times, end = histories.times, histories.end
        asked = times[end] if query_time == "target" else times[end - 1] + usual_gap
        histories = replace(histories, asked=asked)
    return histories, histories.items[histories.end].long()


def windows_before(windows: Windows, cutoff: str, before: Before | None) -> Windows:
    """Each history up to a cut-off of the prepared dataset."""
    assert before is not None, "a temporal split needs the interactions before its cut-offs"
    return replace(windows, end=windows.start + torch.tensor(before[cutoff], dtype=torch.int64))


def usual_gap(windows: Windows) -> int:
    """Median seconds between two items of a history that follow one another, but not in the same second; of many
    histories, of an even sample."""
    assert windows.times is not None
    num_items = int(windows.lengths.sum())
    sample = windows.users(torch.arange(0, len(windows), 1 + num_items // _MOST_GAPS))
    row, place = sample.flat_places()
    gaps = windows.times[place].diff()[row.diff() == 0]
    gaps = gaps[gaps > 0]
    return int(gaps.median()) if len(gaps) else 0


def item_counts(windows: Windows, num_items: int) -> Tensor:
    """[V] int64 how often each item occurs in the windows."""
    counts = torch.zeros(num_items + 1, dtype=torch.int64)
    for users in torch.split(torch.arange(len(windows)), 65_536):  # all windows at once may not fit into memory
        counts += torch.bincount(windows.users(users).flat()[1], minlength=num_items + 1)
    return counts[1:]
