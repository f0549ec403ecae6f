"""Item-item models: they need no training loop, and score an item by what each item of a history adds to it.

Shapes: B users, V items.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import scipy.linalg.lapack
import scipy.sparse

from bert4rec.config import ItemModel
from bert4rec.data.windows import Windows

NUM_NEIGHBOURS = 100
"""Of each item in item-knn."""
EASE_L2 = 500.0
"""Ridge penalty of ease, that of the paper on MovieLens-20M."""
_BLOCK_BYTES = 256 * 2**20

ItemWeights: TypeAlias = np.ndarray | scipy.sparse.csc_array
"""[V, V] float32; row i is what an item i in the history adds to the scores of all items."""


def item_knn(training: Windows, num_items: int, num_neighbours: int = NUM_NEIGHBOURS) -> scipy.sparse.csc_array:
    """The cosine of two items' sets of users, of each item's nearest neighbours (Deshpande & Karypis 2004)."""
    users = user_item(training, num_items)
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
    users = user_item(training, num_items)
    gram = np.zeros((num_items, num_items), order="F")
    for low, together in _co_occurrences(users):
        row, column = together.tocoo().coords
        gram[column, low + row] = together.data  # symmetric
    gram[np.diag_indices(num_items)] += l2
    factor, _ = scipy.linalg.lapack.dpotrf(gram, lower=1, clean=0, overwrite_a=1)
    inverse, _ = scipy.linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    for low in range(num_items):  # only the lower half is computed
        inverse[low, low + 1 :] = inverse[low + 1 :, low]
    diagonal = np.diag(inverse).copy()
    inverse /= -diagonal
    inverse[np.diag_indices(num_items)] = 0
    return np.ascontiguousarray(inverse, dtype=np.float32)


def user_item(windows: Windows, num_items: int) -> scipy.sparse.csr_array:
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
    # An item shares users with no more items than its users have in all.
    most = np.minimum(by_item @ np.diff(users.indptr).astype(np.float64), num_items)
    total = np.append(0, np.cumsum(12 * most))
    low = 0
    while low < num_items:
        high = max(low + 1, int(np.searchsorted(total, total[low] + _BLOCK_BYTES, "right")) - 1)
        yield low, by_item[low:high] @ users
        low = high


FITTED: dict[ItemModel, Callable[[Windows, int], ItemWeights]] = {"item-knn": item_knn, "ease": ease}
"""By name, how to fit a model to training windows of V items."""
PARAMETERS: dict[ItemModel, dict[str, float]] = {
    "item-knn": {"neighbours": NUM_NEIGHBOURS},
    "ease": {"l2": EASE_L2},
}
"""What its weights depend on besides the data."""
