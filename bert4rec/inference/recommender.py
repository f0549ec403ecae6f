"""A model with its catalogue, in one process and without Ray.

The workers of the batch job, `jobs.recommend` for a few users, and a notebook all rank with it.
Shapes: N users, B users of a batch, K top-k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bert4rec import storage
from bert4rec.config import InferenceConfig
from bert4rec.data.dataset import ITEMS, ItemTable, Sequences, read_items
from bert4rec.data.ids import find_ids, some_of
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference.ranking import Exclusions, Ranking, score_next, score_similar, top_k
from bert4rec.model.network import BERT4Rec

ItemId = int | str
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

    model: BERT4Rec
    items: ItemTable

    def rank(self, sequences: Sequences, inference: InferenceConfig, ranking: Ranking) -> Iterator[Ranked]:
        """The best items of N users by the rules `ranking`, inference.batch_size users at a time."""
        windows = Windows.from_sequences(sequences)
        device = self.model.output_bias.device
        for users in torch.split(torch.arange(len(windows)), inference.batch_size):
            histories = windows.users(users).to(device)
            values, items = top_k(
                score_next(self.model, histories, ranking),
                ranking.exclusions(histories, self.items, sequences, users),
                len(users),
                self.model.num_items,
                inference.topk,
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
            Year of the last interaction: items released later are left out.
        ranking
            The rules: `Ranking(exclude_seen=False)` ranks the history's items too.

        Returns
        -------
        DataFrame
            item, title and score, by rank.

        Raises
        ------
        InputError
            If the history is empty, an item is not in the catalogue, or there are fewer than topk items.
        """
        if not 1 <= topk <= len(self.items.ids):
            raise InputError(f"topk={topk}: expected 1 to {len(self.items.ids)}, the size of the catalogue")
        if len(history) == 0:
            raise InputError("the history is empty; expected at least one item id")
        tokens = self.tokens(history) + 1
        sequences = Sequences.of(pa.array([0]), [tokens], pa.array([last_year], pa.int16()))
        (ranked,) = self.rank(sequences, InferenceConfig(topk=topk), ranking)
        return self._frame(pc.index_in(ranked.table["item"], self.items.ids), "score", ranked.table["score"])

    def similar(self, item: ItemId, topk: int = 10) -> pd.DataFrame:
        """The items whose vectors have the largest cosine with that of `item`: item, title and cosine, by rank.

        The vectors are what the network reads for an item: its id embedding, with its metadata where it has been
        trained with them.

        Raises
        ------
        InputError
            If the item is not in the catalogue, or has neither interactions nor metadata.
        """
        index = torch.from_numpy(self.tokens([item])).to(self.model.output_bias.device)
        if self.model.get_buffer("unrankable")[index].any():
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

    def _frame(self, index: pa.Array, name: str, values: pa.Array) -> pd.DataFrame:
        columns = {"item": self.items.ids.take(index), "title": self.items.title.take(index), name: values}
        frame: pd.DataFrame = pa.table(columns).to_pandas()
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="rank")
        return frame


def load(checkpoint: str, device: str = "cpu") -> Recommender:
    """The model of a model directory, with its catalogue.

    Raises
    ------
    InputError
        If it is no whole model directory.
    """
    checkpoint = storage.absolute(checkpoint)
    model = BERT4Rec.from_pretrained(checkpoint).to(device)
    path = storage.join(checkpoint, ITEMS)
    if not storage.exists(path):
        raise InputError(
            f"{checkpoint}: {ITEMS} is missing, which has the ids and titles of the model's items; "
            "copy it from the prepared dataset that the model was trained on"
        )
    items = read_items(path)
    if len(items.ids) != model.num_items:
        raise InputError(f"{path}: has {len(items.ids):,} items, the model {model.num_items:,}; the copy is damaged")
    return Recommender(model, items)


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
