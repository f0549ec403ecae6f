"""What the model is measured against: popularity, and item-item models that need no training loop.

Shapes: B users, V items.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import scipy.linalg.lapack
import scipy.sparse
import torch
from torch import Tensor

from bert4rec.config import DataConfig
from bert4rec.data.windows import Before, Windows, training_windows, windows_before
from bert4rec.inference.ranking import Scorer

NUM_NEIGHBOURS = 100
"""Of each item in item-knn."""
EASE_L2 = 500.0
"""Ridge penalty of ease, that of the paper on MovieLens-20M."""
_BLOCK_BYTES = 256 * 2**20

ItemWeights: TypeAlias = np.ndarray | scipy.sparse.csc_array
"""[V, V] float32; row i is what an item i in the history adds to the scores of all items."""


def recent_windows(windows: Windows, data: DataConfig, split: str, before: Before) -> Windows:
    """The seven days before the cut-off of `split`; without one, training's part of the last seven days of the data."""
    if data.split == "temporal":
        begin, end = (windows_before(windows, name, before) for name in (f"recent_{split}", split))
        return replace(end, start=begin.end)
    kept = torch.nonzero(windows.lengths >= data.min_interactions).flatten()
    begin, end = windows_before(windows, "recent_last", before).users(kept), training_windows(windows, data)
    return replace(end, start=torch.minimum(begin.end, end.end))


def same_for_all(scores: Tensor, num_users: int) -> Scorer:
    """Every user's scores are `scores` [V]."""
    return lambda low, high: scores[low:high].repeat(num_users, 1)


def from_history(weights: ItemWeights, histories: Windows) -> Scorer:
    """Each user's scores are the sum of the weights of the items in the history, each once."""
    users = _user_item(histories, weights.shape[0])

    def scores(low: int, high: int) -> Tensor:
        product = users @ weights[:, low:high]
        return torch.from_numpy(product.toarray() if scipy.sparse.issparse(product) else product)

    return scores


def item_knn(training: Windows, num_items: int, num_neighbours: int = NUM_NEIGHBOURS) -> scipy.sparse.csc_array:
    """The cosine of two items' sets of users, of each item's nearest neighbours (Deshpande & Karypis 2004)."""
    users = _user_item(training, num_items)
    count = np.maximum(users.sum(axis=0), 1).astype(np.float32)
    blocks = []
    for low, together in _co_occurrences(users):
        block = together.tocoo()
        row, column = block.coords
        cosine = block.data / np.sqrt(count[low + row] * count[column])
        other = low + row != column
        row, column, cosine = row[other], column[other], cosine[other]
        nearest = np.lexsort((column, -cosine, row))
        place = np.arange(len(row)) - np.searchsorted(row[nearest], row[nearest])
        nearest = nearest[place < num_neighbours]
        shape = (together.shape[0], num_items)
        blocks.append(scipy.sparse.csr_array((cosine[nearest], (row[nearest], column[nearest])), shape=shape))
    return scipy.sparse.vstack(blocks, format="csc")


def ease(training: Windows, num_items: int, l2: float = EASE_L2) -> np.ndarray:
    """The linear model of all items' users from all others', in closed form (Steck 2019, arXiv 1905.03375).

    [V, V] float32. Takes 12 bytes, and V / 2 multiplications, an entry.
    """
    users = _user_item(training, num_items)
    gram = np.empty((num_items, num_items), order="F")
    for low, together in _co_occurrences(users):
        gram[:, low : low + together.shape[0]] = together.toarray().T  # symmetric
    gram[np.diag_indices(num_items)] += l2
    factor, _ = scipy.linalg.lapack.dpotrf(gram, lower=1, clean=0, overwrite_a=1)
    inverse, _ = scipy.linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    for low in range(num_items):  # only the lower half is computed
        inverse[low, low + 1 :] = inverse[low + 1 :, low]
    diagonal = np.diag(inverse).copy()
    inverse /= -diagonal
    inverse[np.diag_indices(num_items)] = 0
    return np.ascontiguousarray(inverse, dtype=np.float32)


def _user_item(windows: Windows, num_items: int) -> scipy.sparse.csr_array:
    """[B, V] float32, 1 where the item is in the user's window."""
    lengths = windows.lengths.numpy()
    items = windows.flat()[1].numpy() - 1
    offsets = np.append(0, np.cumsum(lengths))
    matrix = scipy.sparse.csr_array((np.ones(len(items), np.float32), items, offsets), shape=(len(lengths), num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _co_occurrences(users: scipy.sparse.csr_array) -> Iterator[tuple[int, scipy.sparse.csr_array]]:
    """First item, and users [width, V] that each item of a block shares with each item of all."""
    by_item = users.T.tocsr()
    num_items = by_item.shape[0]
    width = max(1, _BLOCK_BYTES // (12 * num_items))
    for low in range(0, num_items, width):
        yield low, by_item[low : low + width] @ users
