import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from bert4rec.data.dataset import ItemTable, Sequences
from bert4rec.errors import InputError
from bert4rec.evaluation.metrics import RankCounts, hit_rate, mrr, ndcg
from bert4rec.inference.ranking import (
    Exclusions,
    Ranking,
    item_blocks,
    next_item_states,
    rank_among,
    rank_of_target,
    score_next,
    top_k,
)
from tests.helpers.datasets import random_histories
from tests.twins import reference
from tests.unit.model.test_batches import windows_of
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

YEARS = [None if token % 7 == 0 else 1990 + token % 10 for token in range(1, NUM_ITEMS + 1)]


def items_table():
    known = np.array([year is not None for year in YEARS])
    return ItemTable(
        ids=pa.array(range(NUM_ITEMS)),
        count=np.zeros(NUM_ITEMS, np.int64),
        year=np.array([year or 0 for year in YEARS], np.int16),
        has_year=known,
        title=pa.nulls(NUM_ITEMS, pa.string()),
        listed={},
    )


def sequences_with(last_years):
    return Sequences.of(pa.array(range(len(last_years))), [[]] * len(last_years), pa.array(last_years, pa.int16()))


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("exclude_future", [True, False])
@pytest.mark.parametrize("score_bytes", [10**9, 4 * 20 * 7, 1])
def test_top_k_equals_the_slow_way_user_by_user(exclude_seen, exclude_future, score_bytes):
    model = make_model()
    histories = [*random_histories(19, NUM_ITEMS, longest=25).values(), []]  # one user knows nothing yet
    last_years = [None if user % 5 == 0 else 1990 + user % 10 for user in range(len(histories))]
    windows = windows_of(histories)
    exclusions = Exclusions.of(
        windows if exclude_seen else None,
        (items_table(), sequences_with(last_years), torch.arange(20)) if exclude_future else None,
    )
    values, items = top_k(score_next(model, windows), exclusions, 20, NUM_ITEMS, 8, score_bytes)
    for user, history in enumerate(histories):
        expected = reference.recommendations(model, history, 8, YEARS, last_years[user], exclude_seen, exclude_future)
        kept = torch.isfinite(values[user])
        assert (items[user][kept] + 1).tolist() == [token for token, _ in expected]
        np.testing.assert_allclose(values[user][kept], [score for _, score in expected], rtol=1e-4)


def test_scores_are_discounted_by_popularity():
    model = make_model()
    histories = windows_of([[3, 9, 4], [1]])
    plain = score_next(model, histories)(0, NUM_ITEMS).clone()
    with pytest.raises(InputError, match=r"popularity_discount.*earlier version"):
        score_next(model, histories, Ranking(popularity_discount=0.5))
    model.item_counts[:3] = torch.tensor([0, 1, 99])
    taken = (plain - score_next(model, histories, Ranking(popularity_discount=0.5))(0, NUM_ITEMS)).tolist()
    for of_user in taken:
        assert of_user[:4] == pytest.approx([0, 0.346574, 2.302585, 0], abs=1e-5)  # half of log 1, 2 and 100


def test_a_user_who_has_seen_nearly_all_gets_the_rest():
    windows = windows_of([list(range(1, NUM_ITEMS - 1)), list(range(1, NUM_ITEMS + 1))])
    values, items = top_k(score_next(make_model(), windows), Exclusions.of(windows), 2, NUM_ITEMS, 5)
    assert sorted((items[0][torch.isfinite(values[0])] + 1).tolist()) == [NUM_ITEMS - 1, NUM_ITEMS]
    assert not torch.isfinite(values[1]).any()


def test_states_do_not_depend_on_the_company():
    model = make_model()
    histories = list(random_histories(12, NUM_ITEMS).values())
    together = next_item_states(model, windows_of(histories))
    for user, history in enumerate(histories):
        torch.testing.assert_close(together[user : user + 1], next_item_states(model, windows_of([history])))


@pytest.mark.parametrize("score_bytes", [10**9, 4 * 6 * 2])
def test_rank_of_target_equals_the_slow_way(score_bytes):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (6, 11), generator=generator).float()  # many ties
    seen = [[1, 2], [3], [], [5, 6, 7], [11], [4]]
    targets = torch.tensor([3, 4, 5, 5, 1, 2])  # the fourth user's target is a seen item
    got = rank_of_target(
        lambda low, high: scores[:, low:high].clone(), Exclusions.of(windows_of(seen)), targets, 11, score_bytes
    )
    expected = [
        reference.rank(scores[user].tolist(), int(targets[user]) - 1, {token - 1 for token in seen[user]})
        for user in range(6)
    ]
    assert got.tolist() == expected
    assert got[3] == 12


def test_all_scores_equal_means_the_last_rank():
    ranks = rank_of_target(lambda low, high: torch.zeros(2, high - low), Exclusions.of(None), torch.tensor([1, 5]), 5)
    assert ranks.tolist() == [5, 5]


@pytest.mark.parametrize("score_bytes", [10**9, 4 * 4 * 2])
def test_rank_among_by_hand(score_bytes):
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [1, 1, 1, 1, 1], [-torch.inf, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    candidates = torch.tensor([[0, 3], [0, 4], [1, 2], [-1, -1]])  # one above; both equal; no score; nobody else
    ranks = rank_among(lambda low, high: scores[:, low:high], candidates, torch.tensor([3, 3, 1, 1]), 5, score_bytes)
    assert ranks.tolist() == [2, 3, 6, 1]


def test_item_blocks_cover_the_catalogue_within_the_memory():
    blocks = list(item_blocks(10, 100, 4 * 10 * 30))
    assert blocks == [(0, 30), (30, 60), (60, 90), (90, 100)]


def test_metrics_by_hand():
    """Four users with ranks 1, 2, 10 and 30 among 40 items."""
    counts = RankCounts.empty(40)
    counts.add(torch.tensor([1, 10]))
    counts.add(torch.tensor([30, 2]))
    assert [hit_rate(counts, k) for k in (1, 5, 10, 20)] == [0.25, 0.5, 0.75, 0.75]
    assert ndcg(counts, 1) == 0.25
    assert math.isclose(ndcg(counts, 5), (1 + 1 / math.log2(3)) / 4)
    assert math.isclose(ndcg(counts, 10), (1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4)
    assert math.isclose(mrr(counts), (1 + 0.5 + 0.1 + 1 / 30) / 4)
    assert counts.metrics("val_")["val_hr@10"] == 0.75
    assert RankCounts.empty(3).metrics() == {}


def test_a_target_that_cannot_be_recommended_is_a_miss_in_the_smallest_catalogue():
    counts = RankCounts.empty(3)
    counts.add(torch.tensor([4, 1]))
    assert counts.num_users == 2
    assert hit_rate(counts, 20) == ndcg(counts, 20) == mrr(counts) == 0.5


def test_a_cut_off_beyond_the_catalogue_counts_everyone():
    counts = RankCounts.empty(3)
    counts.add(torch.tensor([1, 3]))
    assert hit_rate(counts, 20) == 1
    assert math.isclose(ndcg(counts, 20), (1 + 0.5) / 2)
