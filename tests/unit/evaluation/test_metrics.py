import math

import pytest
import torch

from bert4rec.evaluation import metrics

pytestmark = pytest.mark.unit

RECOMMENDED = torch.tensor([6, 2, 0, 2, 0])
POPULARITY = torch.tensor([8, 4, 4, 0, 16])


def test_coverage_by_hand():
    assert metrics.coverage(RECOMMENDED) == 0.6


def test_gini_by_hand():
    """Ascending 0, 0, 2, 2, 6: (0 + 0 + 0 + 2 * 2 + 4 * 6) / (5 * 10)."""
    assert metrics.gini(RECOMMENDED) == pytest.approx(28 / 50)
    assert metrics.gini(torch.full((7,), 3)) == pytest.approx(0)
    assert metrics.gini(torch.tensor([0, 0, 0, 9])) == pytest.approx(0.75)


def test_popularity_rank_by_hand():
    """Places 2, 3.5, 3.5, 5, 1."""
    assert metrics.mean_popularity_rank(RECOMMENDED, POPULARITY) == pytest.approx((6 * 2 + 2 * 3.5 + 2 * 5) / 10)


def test_novelty_by_hand():
    """Shares of the 32 interactions: a quarter, an eighth, and 1/32 for the item without any."""
    assert metrics.novelty(RECOMMENDED, POPULARITY) == pytest.approx((6 * 2 + 2 * 3 + 2 * 5) / 10)


def test_popularity_lift_by_hand():
    recommended = (6 * 8 + 2 * 4) / 10
    usual = (8 * 8 + 4 * 4 + 4 * 4 + 16 * 16) / 32
    assert metrics.popularity_lift(RECOMMENDED, POPULARITY) == pytest.approx(recommended / usual - 1)
    assert metrics.popularity_lift(POPULARITY, POPULARITY) == pytest.approx(0)


def test_thirds_of_the_interactions_by_hand():
    """Falling: 16 (its middle at 8 of 32), 8 (at 20), 4 (at 26), 4 (at 30), 0 (at 32)."""
    assert metrics.popularity_thirds(POPULARITY).tolist() == [1, 2, 2, 2, 0]
    assert metrics.popularity_thirds(torch.ones(9)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_no_nan_where_all_is_one_item():
    one = torch.tensor([4, 0])
    assert (metrics.coverage(one), metrics.gini(one)) == (0.5, 0.5)
    assert math.isclose(metrics.novelty(one, one), 0)
