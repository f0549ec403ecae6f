import numpy as np
import pytest
import torch

from bert4rec.evaluation.negatives import draw_negatives
from tests.twins import reference
from tests.unit.model.test_batches import windows_of

pytestmark = pytest.mark.unit


def no_history(num_users):
    return windows_of([[]] * num_users)


def test_draws_equal_the_slow_way():
    weights = torch.tensor([5, 0, 1, 30, 2, 2, 9, 1])
    own = [[4], [], [1, 7, 3], [1, 3, 4, 5, 6, 7, 8]]
    users = np.array([3, 0, 17, 2**40])
    drawn = draw_negatives(weights, windows_of(own), users, seed=7, count=5)
    expected = [
        reference.negatives(weights.tolist(), set(items), int(user), 7, 5)
        for items, user in zip(own, users, strict=True)
    ]
    assert [[item for item in row if item >= 0] for row in drawn.tolist()] == expected
    assert (drawn[2] >= 0).sum() == 4  # five of the eight are left, one of which has no weight
    assert (drawn[3] == -1).all()  # only the item without weight is left


def test_a_users_draw_depends_on_seed_and_user_alone():
    weights = torch.arange(1, 301)
    together = draw_negatives(weights, no_history(40), np.arange(40), seed=1, count=20)
    alone = draw_negatives(weights, no_history(1), np.array([33]), seed=1, count=20)
    assert torch.equal(together[33:34], alone)
    assert len({tuple(sorted(row)) for row in together.tolist()}) == 40
    assert not torch.equal(together, draw_negatives(weights, no_history(40), np.arange(40), seed=2, count=20))
    assert all(len(set(row)) == 20 for row in together.tolist())


@pytest.mark.parametrize("block_bytes", [10**9, 4 * 100 * 2])
def test_blocks_of_items_change_nothing(monkeypatch, block_bytes):
    weights = torch.arange(1, 31)
    whole = draw_negatives(weights, no_history(100), np.arange(100), seed=0, count=10)
    monkeypatch.setattr("bert4rec.evaluation.negatives._DRAW_BYTES", block_bytes)
    assert torch.equal(draw_negatives(weights, no_history(100), np.arange(100), seed=0, count=10), whole)


def test_probabilities_by_hand():
    """Two of three items of weights 5, 3, 2, one after the other: the first draw, and the pairs."""
    count = 60_000
    drawn = draw_negatives(torch.tensor([5, 3, 2]), no_history(count), np.arange(count), seed=0, count=2)
    first = torch.bincount(drawn[:, 0], minlength=3) / count
    np.testing.assert_allclose(first, [0.5, 0.3, 0.2], atol=0.008)  # four standard errors
    pair = torch.bincount(3 - drawn.sum(1), minlength=3) / count  # by the item that is left over
    left_over = [0.3 * 2 / 7 + 0.2 * 3 / 8, 0.5 * 2 / 5 + 0.2 * 5 / 8, 0.5 * 3 / 5 + 0.3 * 5 / 7]
    np.testing.assert_allclose(pair, left_over, atol=0.008)


def test_equal_weights_are_drawn_equally():
    count = 50_000
    drawn = draw_negatives(torch.ones(10), windows_of([[3]] * count), np.arange(count), seed=5, count=3)
    share = torch.bincount(drawn.flatten(), minlength=10) / count
    assert share[2] == 0
    np.testing.assert_allclose(share[[0, 1, *range(3, 10)]], 3 / 9, atol=0.009)
