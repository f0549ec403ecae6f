"""What the model is measured against: popularity, and item-item models (`inference/item_item.py`).

Shapes: B users, V items.
"""

from dataclasses import replace

import scipy.sparse
import torch
from torch import Tensor

from bert4rec.config import DataConfig
from bert4rec.data.windows import Before, Windows, training_windows, windows_before
from bert4rec.inference.item_item import ItemWeights, user_item
from bert4rec.inference.ranking import Scorer


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
    users = user_item(histories, weights.shape[0])

    def scores(low: int, high: int) -> Tensor:
        product = users @ weights[:, low:high]
        return torch.from_numpy(product.toarray() if scipy.sparse.issparse(product) else product)

    return scores
