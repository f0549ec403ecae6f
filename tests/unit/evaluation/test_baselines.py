import math

import numpy as np
import pytest

from bert4rec.config import DataConfig
from bert4rec.evaluation import baselines
from bert4rec.inference import item_item
from tests.helpers.datasets import random_histories
from tests.twins import reference
from tests.unit.model.test_batches import windows_of

pytestmark = pytest.mark.unit


def dense(weights):
    return weights if isinstance(weights, np.ndarray) else weights.toarray()


def test_item_knn_by_hand():
    """Item 1 is had by three users, 2 and 3 by two, 4 by one, who has it twice."""
    windows = windows_of([[1, 2, 3], [1, 2], [1, 4, 4], [3]])
    cosine = dense(item_item.item_knn(windows, 5))
    r6, r3 = 1 / math.sqrt(6), 1 / math.sqrt(3)
    expected = [
        [0, 2 * r6, r6, r3, 0],
        [2 * r6, 0, 0.5, 0, 0],
        [r6, 0.5, 0, 0, 0],
        [r3, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(cosine, expected, rtol=1e-6)
    nearest = dense(item_item.item_knn(windows, 5, num_neighbours=1))
    np.testing.assert_allclose(nearest.max(1), [2 * r6, 2 * r6, 0.5, r3, 0], rtol=1e-6)
    assert (nearest > 0).sum(1).tolist() == [1, 1, 1, 1, 0]


def test_ease_by_hand():
    """Two items, had together by one of two users each: the ridge regression of each on the other."""
    windows = windows_of([[1, 2], [1], [2]])
    # item 2 from item 1: sum(x1 x2) / (sum(x1 x1) + l2) = 1 / (2 + 3)
    np.testing.assert_allclose(item_item.ease(windows, 2, l2=3), [[0, 0.2], [0.2, 0]], rtol=1e-6)


@pytest.mark.parametrize("block_bytes", [10**9, 12 * 40 * 7])
def test_item_models_equal_the_slow_way(monkeypatch, block_bytes):
    monkeypatch.setattr(item_item, "_BLOCK_BYTES", block_bytes)
    histories = [[*items, *items[:2]] for items in random_histories(200, 40, seed=3, longest=15).values()]
    windows = windows_of(histories)
    knn = item_item.item_knn(windows, 40, num_neighbours=5)
    np.testing.assert_allclose(dense(knn), reference.item_knn(histories, 40, 5), rtol=1e-5)
    ease = item_item.ease(windows, 40, l2=20)
    np.testing.assert_allclose(ease, reference.ease(histories, 40, 20), rtol=1e-4, atol=1e-6)
    for weights in (knn, ease):
        scores = baselines.from_history(weights, windows)
        expected = [dense(weights)[np.unique(items) - 1].sum(0) for items in histories]
        np.testing.assert_allclose(scores(0, 40), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(scores(7, 19), scores(0, 40)[:, 7:19], rtol=1e-6)


def test_recent_items_by_hand():
    windows = windows_of([[1, 2, 3, 4], [5, 6], [7, 8, 9]])

    def items(data, split, before):
        return baselines.recent_windows(windows, data, split, {k: np.array(v) for k, v in before.items()}).flat()[1]

    # the last two of the first user, one of them held out; the second user has too few; all of the third
    one = DataConfig(min_interactions=3, holdout=1)
    assert items(one, "validation", {"recent_last": [2, 0, 0]}).tolist() == [3, 7, 8]
    assert items(one, "validation", {"recent_last": [4, 2, 3]}).tolist() == []
    before = {"recent_validation": [0, 0, 1], "validation": [1, 1, 1], "recent_test": [1, 0, 3], "test": [3, 2, 3]}
    temporal = DataConfig(split="temporal")
    assert items(temporal, "validation", before).tolist() == [1, 5]
    assert items(temporal, "test", before).tolist() == [2, 3, 5, 6]
