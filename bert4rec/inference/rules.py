"""The rules of a `Ranking` on a catalogue: what the users of a batch may get, and how a list is made of it.

Shapes: B users of a batch, V items, A items that somebody of the batch may get.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bert4rec.data.dataset import ItemTable, Sequences
from bert4rec.data.windows import Windows
from bert4rec.inference.item_lists import ItemList, UserItems
from bert4rec.inference.ranking import Exclusions, Only, Ranking
from bert4rec.inference.selection import Selection


class UserLists(NamedTuple):
    """The lists of N users, where each has one of its own."""

    candidates: UserItems | None = None
    exclude: UserItems | None = None

    def take(self, users: Tensor) -> "UserLists":
        """Those of `users` [B]."""
        index = users.numpy()
        return UserLists(*(None if given is None else given.take(index) for given in self))


@dataclass(frozen=True)
class Offer:
    """What a batch of users may get."""

    columns: Tensor | None
    """[A] int64, ascending: the items that are scored. None: all."""
    num_columns: int
    exclusions: Exclusions
    """Items are counted by their place in `columns`."""

    def items(self, places: Tensor) -> Tensor:
        """The items, counted from 0, at places in `columns`."""
        return places if self.columns is None or not len(self.columns) else self.columns[places]


class Rules:
    """A ranking's rules on a catalogue. A process that ranks makes them once.

    Raises
    ------
    InputError
        If a list has no item of the catalogue, or the items have no values of a feature in `max_per`.
    """

    def __init__(self, ranking: Ranking, items: ItemTable, device: torch.device | str = "cpu") -> None:
        self.ranking, self.items, self.device = ranking, items, device
        self.notes: list[str] = []
        """Lines for the user on items of lists that are not in the catalogue."""
        self.selection = Selection.of(ranking, items, device)
        self._candidates = self._places(ranking.candidates)
        excluded = self._places(ranking.exclude)
        self.forbidden: Tensor | None = None
        """[V] bool: items that no user may get, by a list for all. None: there is no such list."""
        if self._candidates is not None or excluded is not None:
            self.forbidden = torch.full((len(items.ids),), self._candidates is not None, device=device)
            if self._candidates is not None:
                self.forbidden[self._candidates] = False
            if excluded is not None:
                self.forbidden[excluded] = True

    def _places(self, given: ItemList | None) -> Tensor | None:
        """Places in the catalogue of a list for all users; None for another list, or none."""
        if given is None or not given.is_for_all:
            return None
        places, note = given.places(self.items)
        self.notes += [note] if note else []
        return torch.from_numpy(places).to(self.device)

    def lists_of(self, sequences: Sequences) -> UserLists:
        """Read the lists of these users, where a rule has lists of users."""
        given = (self.ranking.candidates, self.ranking.exclude)
        return UserLists(
            *(None if each is None or each.is_for_all else each.of_users(sequences.users, self.items) for each in given)
        )

    def offer(
        self, histories: Windows, sequences: Sequences, users: Tensor, lists: UserLists, only_some: bool = True
    ) -> Offer:
        """What the users [B] of `sequences` may get.

        Parameters
        ----------
        histories : Windows
            Theirs, on the device.
        lists : UserLists
            Of all users of `sequences`.
        only_some : bool
            Score only the items that somebody may get. False: score all items, and exclude those that nobody may get.
        """
        num_items = len(self.items.ids)
        exclusions = self.ranking.exclusions(histories, self.items, sequences, users)
        own, columns = lists.take(users), self._candidates
        if own.exclude is not None:
            exclusions = exclusions.and_pairs(*self._pairs(own.exclude))
        if own.candidates is not None:
            has_list = torch.from_numpy(own.candidates.has_list)
            if self.ranking.candidates_default == "none":
                has_list = torch.ones_like(has_list)
            row, item = self._pairs(own.candidates)
            exclusions = replace(exclusions, only=Only(row, item, has_list.to(self.device)))
            if has_list.all():
                columns = torch.unique(item)
        if not only_some or columns is None:
            return Offer(None, num_items, replace(exclusions, forbidden=self.forbidden))
        if self.forbidden is not None:
            columns = columns[~self.forbidden[columns]]
        return Offer(columns, len(columns), exclusions.within(columns))

    def _pairs(self, given: UserItems) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(given.row).to(self.device), torch.from_numpy(given.item).to(self.device)
