"""Items that a target is ranked among, drawn anew from nothing but a seed, the user and the item.

So they are the same for every model, batch size, number of workers and device. Shapes: B users, V items, C drawn.
"""

import numpy as np
import torch
from torch import Tensor

from bert4rec.data.windows import Windows
from bert4rec.inference.ranking import Exclusions, top_k

_DRAW_BYTES = 16 * 2**20  # for each block's float32; the draws' own numbers take some eight times as much


def draw_negatives(weights: Tensor, own: Windows, user_index: np.ndarray, seed: int, count: int) -> Tensor:
    """Draw items without replacement, each draw with probabilities proportional to the weights of what is left.

    The `count` largest log(weight) + Gumbel noise are such a draw (Yellott 1977; Kool et al. 2019, Section 2.3).

    Parameters
    ----------
    weights : Tensor
        [V] not negative; an item of weight 0 is never drawn.
    own : Windows
        B users' whole histories, of which nothing is drawn.
    user_index : ndarray
        [B] int64, the users' places in the dataset.

    Returns
    -------
    Tensor
        [B, C] int64 items, counted from 0, on the CPU; -1 where a user has fewer than `count` left.
    """
    log_weight = torch.log(weights.double())

    def scores(low: int, high: int) -> Tensor:
        gumbel = -np.log(-np.log(_uniform(seed, user_index, np.arange(low, high))))
        return torch.from_numpy(gumbel) + log_weight[low:high]

    count = min(count, len(weights))
    values, items = top_k(scores, Exclusions.of(own), len(user_index), len(weights), count, _DRAW_BYTES)
    return items.masked_fill(values == -torch.inf, -1)


def _uniform(seed: int, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """[B, V] float64 in (0, 1), a function of seed, user and item alone."""
    key = _mix(_mix(np.array([seed], np.uint64)) + user.astype(np.uint64))  # (B,)
    bits = _mix(key[:, None] + item.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # (B, V)
    uniform: np.ndarray = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    return uniform


def _mix(number: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of `number`."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = number ^ (number >> np.uint64(31))
    return mixed
