"""A model with its catalogue, in one process and without Ray.

The workers of the batch job, `jobs.recommend` for a few users, and a notebook all rank with it.
Shapes: N users, B users of a batch, K top-k.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bert4rec import storage
from bert4rec.config import InferenceConfig, moment_of
from bert4rec.data.dataset import ITEMS, ItemTable, Sequences, read_items
from bert4rec.data.ids import find_ids, some_of
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference.blend import read
from bert4rec.inference.item_lists import UserItems, list_of_items
from bert4rec.inference.ranking import Exclusions, Ranking, score_next, score_similar, top_k
from bert4rec.inference.rules import Rules, UserLists
from bert4rec.inference.selection import best_list, item_vectors_of
from bert4rec.model.average import Model, read_model

ItemId = int | str
Moment = int | float | str | datetime | date
"""Unix seconds, or an ISO date or time."""
GivenItems = Collection[ItemId] | Sequence[Collection[ItemId]]
"""Item ids for all histories, or a collection of item ids for each."""
DEFAULT_RULES = Ranking()


class Ranked(NamedTuple):
    """What a batch of users gets."""

    table: pa.Table
    """user, item, rank (from 1), score; by user, then rank."""
    num_users: int
    num_short_users: int
    """Users for whom fewer than topk items remained."""
    num_empty_users: int
    """Users for whom no item remained."""


@dataclass(frozen=True)
class Recommender:
    """Ranks the items of a catalogue for histories, and by their likeness to an item."""

    model: Model
    items: ItemTable
    checkpoint: str | None = None
    """The model directory, if a ranking's blend is to be read from there."""
    _made: list[tuple[Ranking, Rules]] = field(default_factory=list, compare=False, repr=False)
    """The last ranking and its rules, which hold for all parts of the users."""

    def rules(self, ranking: Ranking) -> Rules:
        """The rules of a ranking on this catalogue.

        Raises
        ------
        InputError
            If a rule does not suit the catalogue, or what a blend needs does not lie beside the model.
        """
        if not self._made or self._made[0][0] is not ranking:
            found = ranking
            if ranking.blend is not None and not ranking.blend.path and self.checkpoint is not None:
                found = replace(
                    ranking, blend=read(ranking.blend, self.checkpoint, self.model, ranking.popularity_discount)
                )
            self._made[:] = [(ranking, Rules(found, self.items, self.model.device))]
        return self._made[0][1]

    def rank(
        self, sequences: Sequences, inference: InferenceConfig, ranking: Ranking, lists: UserLists | None = None
    ) -> Iterator[Ranked]:
        """The best items of N users by the rules `ranking`, inference.batch_size users at a time.

        Parameters
        ----------
        lists : UserLists or None
            Of these users. None: read them, where a rule has lists of users.
        """
        windows = Windows.from_sequences(sequences)
        device = self.model.device
        rules = self.rules(ranking)
        lists = rules.lists_of(sequences) if lists is None else lists
        for users in torch.split(torch.arange(len(windows)), inference.batch_size):
            histories = windows.users(users).to(device)
            offer = rules.offer(histories, sequences, users, lists)
            values, items = best_list(
                score_next(self.model, histories, rules.ranking, offer.columns),
                offer,
                inference.topk,
                rules.selection,
                item_vectors_of(self.model),
                inference.score_memory_mb * 2**20,
            )
            found = torch.isfinite(values).cpu()  # (B, K)
            row, place = torch.nonzero(found, as_tuple=True)
            table = pa.table(
                {
                    "user": sequences.users.take(pa.array(users[row].numpy())),
                    "item": self.items.ids.take(pa.array(items.cpu()[found].numpy())),
                    "rank": (place + 1).to(torch.int32).numpy(),
                    "score": values.cpu()[found].numpy(),
                }
            )
            left = found.sum(1)
            yield Ranked(table, len(users), int((left < inference.topk).sum()), int((left == 0).sum()))

    def recommend(
        self,
        history: Sequence[ItemId],
        topk: int = 10,
        *,
        last_year: int | None = None,
        times: Sequence[Moment] | None = None,
        at: Moment | None = None,
        ranking: Ranking = DEFAULT_RULES,
    ) -> pd.DataFrame:
        """The next items of one history.

        Parameters
        ----------
        history
            Item ids as in the data, the latest last; of a long one the model reads the last max_len-1.
        topk
            Rows, at most.
        last_year
            Items released later than this year are left out. Default: the year of `at`.
        times
            When each item of the history was had: Unix seconds, or ISO dates or times (UTC). A model with
            model.time_encoding needs them.
        at
            When the next item is asked for. Default: `BERT4Rec.usual_gap` seconds after the last of `times`.
        ranking
            The rules: `Ranking(exclude_seen=False)` ranks the history's items too. `Ranking.of(config.inference)` are
            those of a config. A blend is that which `jobs.evaluate` or `jobs.recommend` left beside the model.

        Returns
        -------
        DataFrame
            item, title and score, by rank.

        Raises
        ------
        InputError
            If the history is empty, an item is not in the catalogue, there are fewer than topk items, or the times are
            missing, out of order, or later than `at`.
        """
        if not 1 <= topk <= len(self.items.ids):
            raise InputError(f"topk={topk}: expected 1 to {len(self.items.ids)}, the size of the catalogue")
        if len(history) == 0:
            raise InputError("the history is empty; expected at least one item id")
        tokens = self.tokens(history) + 1
        _refuse_users_lists(ranking)
        sequences = self._asked(self._sequences([tokens], None if times is None else [times]), at)
        if last_year is not None:
            year = np.array([last_year], np.int16)
            sequences = replace(sequences, last_year=year, has_last_year=np.ones(1, bool))
        (ranked,) = self.rank(sequences, InferenceConfig(topk=topk), ranking)
        return self._frame(pc.index_in(ranked.table["item"], self.items.ids), "score", ranked.table["score"])

    def recommend_many(
        self,
        histories: Sequence[Sequence[ItemId]],
        topk: int = 10,
        *,
        candidates: GivenItems | None = None,
        exclude: GivenItems | None = None,
        last_years: Sequence[int | None] | None = None,
        times: Sequence[Sequence[Moment]] | None = None,
        at: Moment | None = None,
        ranking: Ranking = DEFAULT_RULES,
        batch_size: int = 512,
    ) -> pd.DataFrame:
        """The next items of many histories, batched on the model's device.

        Parameters
        ----------
        histories
            N lists of item ids as in the data, the latest last.
        topk
            Rows of each history, at most.
        candidates, exclude
            What may be recommended, and what must not be: item ids, or a collection of item ids for each history.
        last_years
            Items released later than these years are left out. Default: the years of `at`.
        times, at
            As of `recommend`: the times of each history, and one moment for all.
        ranking
            All other rules.
        batch_size
            Histories that are scored at once.

        Returns
        -------
        DataFrame
            history (its place, from 0), rank (from 1), item, title and score.

        Raises
        ------
        InputError
            If a history is empty, an item is not in the catalogue, the lengths differ, there are fewer than topk items,
            or the times are missing, out of order, or later than `at`.
        """
        if not 1 <= topk <= len(self.items.ids):
            raise InputError(f"topk={topk}: expected 1 to {len(self.items.ids)}, the size of the catalogue")
        if empty := [place for place, history in enumerate(histories) if len(history) == 0]:
            raise InputError(f"history {empty[0]} is empty; expected at least one item id")
        if last_years is not None and len(last_years) != len(histories):
            raise InputError(f"last_years: {len(last_years)} values for {len(histories)} histories")
        _refuse_users_lists(ranking)
        own: dict[str, UserItems] = {}
        for name, given in (("candidates", candidates), ("exclude", exclude)):
            if given is None:
                continue
            if getattr(ranking, name) is not None:
                raise InputError(f"{name}: given both here and by the ranking; expected one of them")
            ids = [each for each in given if isinstance(each, int | str)]
            if len(ids) == len(given):
                self.tokens(ids)  # raises for those that are not in the catalogue
                ranking = ranking.with_lists({name: list_of_items(name, ids)})
            else:
                own[name] = self._lists(name, list(given), len(histories))
        lengths = [len(history) for history in histories]
        flat = self.tokens([item for history in histories for item in history]) + 1
        sequences = self._asked(self._sequences(np.split(flat, np.cumsum(lengths)[:-1]) if lengths else [], times), at)
        if last_years is not None:
            years = np.array([year or 0 for year in last_years], np.int16)
            sequences = replace(sequences, last_year=years, has_last_year=np.array([y is not None for y in last_years]))
        inference = InferenceConfig(topk=topk, batch_size=batch_size)
        ranked = [batch.table for batch in self.rank(sequences, inference, ranking, UserLists(**own))]
        table = pa.concat_tables(ranked) if ranked else None
        if table is None:
            return pd.DataFrame({"history": [], "rank": [], "item": [], "title": [], "score": []})
        title = self.items.title.take(pc.index_in(table["item"], self.items.ids).combine_chunks())
        columns = {"history": table["user"], "rank": table["rank"], "item": table["item"], "title": title}
        frame: pd.DataFrame = pa.table(columns | {"score": table["score"]}).to_pandas()
        return frame

    def _lists(self, name: str, given: list[Any], num_histories: int) -> UserItems:
        """A list of items for each history."""
        if len(given) != num_histories:
            raise InputError(f"{name}: {len(given)} collections for {num_histories} histories")
        ids = [sorted(set(each), key=str) for each in given]
        row = np.repeat(np.arange(num_histories), [len(each) for each in ids])
        lists = UserItems.of(row, self.tokens([item for each in ids for item in each]), num_histories)
        return lists._replace(has_list=np.ones(num_histories, bool))

    def similar(self, item: ItemId, topk: int = 10) -> pd.DataFrame:
        """The items whose vectors have the largest cosine with that of `item`: item, title and cosine, by rank.

        The vectors are what the network reads for an item: its id embedding, with its metadata where it has been
        trained with them.

        Raises
        ------
        InputError
            If the item is not in the catalogue, or has neither interactions nor metadata.
        """
        index = torch.from_numpy(self.tokens([item])).to(self.model.device)
        if self.model.unrankable[index].any():
            raise InputError(f"item {item!r} has neither interactions nor metadata that this model knows")
        itself = Exclusions(torch.zeros_like(index), index)
        values, items = top_k(score_similar(self.model, index), itself, 1, self.model.num_items, topk)
        found = torch.isfinite(values)
        return self._frame(pa.array(items[found].cpu().numpy()), "cosine", pa.array(values[found].cpu().numpy()))

    def tokens(self, items: Sequence[ItemId]) -> np.ndarray:
        """[S] int64 rows of the catalogue, counted from 0.

        Raises
        ------
        InputError
            For items that are not in it.
        """
        index = find_ids(pa.array([str(item) for item in items], pa.string()), self.items.ids)
        if (index < 0).any():
            unknown = [repr(items[place]) for place in np.flatnonzero(index < 0).tolist()]
            raise InputError(
                f"not in the catalogue: item {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; "
                f"it has {len(self.items.ids):,} items, such as {some_of(self.items.ids)}"
            )
        return index

    def _sequences(self, tokens: list[np.ndarray], times: Sequence[Sequence[Moment]] | None) -> Sequences:
        """N histories [S] int64 tokens, with their times, checked."""
        if times is None and self.model.reads_times:
            raise InputError(
                "this model reads times (model.time_encoding); expected times=, one for each item of the history"
            )
        seconds = None
        if times is not None:
            if len(times) != len(tokens):
                raise InputError(f"times: {len(times)} lists for {len(tokens)} histories")
            seconds = [_checked_times(own, len(history)) for own, history in zip(times, tokens, strict=True)]
        return Sequences.of(pa.array(range(len(tokens)), pa.int64()), tokens, None, seconds)

    def _asked(self, sequences: Sequences, at: Moment | None) -> Sequences:
        """The histories, asked for their next items at `at`, by default the usual time after their last ones."""
        if at is not None:
            return sequences.asked_at(_seconds_of("at", at))
        if sequences.times is None:
            return sequences
        return sequences.asked_at(sequences.times[sequences.offsets[1:] - 1] + self.model.usual_gap)

    def _frame(self, index: pa.Array, name: str, values: pa.Array) -> pd.DataFrame:
        columns = {"item": self.items.ids.take(index), "title": self.items.title.take(index), name: values}
        frame: pd.DataFrame = pa.table(columns).to_pandas()
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="rank")
        return frame


def _checked_times(times: Sequence[Moment], count: int) -> np.ndarray:
    """[count] int64 Unix seconds."""
    if len(times) != count:
        raise InputError(f"times: {len(times)} for a history of {count} items; expected one for each")
    seconds = np.array([_seconds_of("times", time) for time in times], np.int64)
    if (np.diff(seconds) < 0).any():
        place = int(np.flatnonzero(np.diff(seconds) < 0)[0])
        raise InputError(f"times: {times[place]} stands before {times[place + 1]}; expected the latest last")
    return seconds


def _seconds_of(name: str, value: Moment) -> int:
    try:
        return moment_of(value)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def _refuse_users_lists(ranking: Ranking) -> None:
    """A history belongs to no user, who could have a row in a file."""
    for given in ranking.item_lists:
        if not given.is_for_all:
            raise InputError(
                f"{given.source}: has a list for each user, and a history has no user; give the items themselves: "
                "recommend_many(histories, candidates=…, exclude=…)"
            )


def load(checkpoint: str, device: str = "cpu") -> Recommender:
    """The model of a model directory, with its catalogue.

    Raises
    ------
    InputError
        If it is no whole model directory.
    """
    checkpoint = storage.absolute(checkpoint)
    model = read_model(checkpoint).to(device)
    path = storage.join(checkpoint, ITEMS)
    if not storage.exists(path):
        raise InputError(
            f"{checkpoint}: {ITEMS} is missing, which has the ids and titles of the model's items; "
            "copy it from the prepared dataset that the model was trained on"
        )
    items = read_items(path)
    if len(items.ids) != model.num_items:
        raise InputError(f"{path}: has {len(items.ids):,} items, the model {model.num_items:,}; the copy is damaged")
    return Recommender(model, items, checkpoint)


def device_for(accelerator: str) -> str:
    """The device that training.accelerator stands for on this machine.

    Raises
    ------
    InputError
        If there is no GPU where one is asked for.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("training.accelerator=gpu: this machine has no GPU that torch can use")
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
