"""Each rule, and all of them together, beside the slow twin, user by user."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import ItemTable, Ragged, Sequences
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference import ranking as ranking_module
from bert4rec.inference.item_lists import list_of_items, read_list
from bert4rec.inference.ranking import Ranking, score_next, top_k
from bert4rec.inference.recommender import Ranked, Recommender
from tests.helpers.datasets import random_histories
from tests.twins import rules as twin
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

NUM_USERS = 8
YEARS = [None if item % 7 == 0 else 1990 + item % 10 for item in range(NUM_ITEMS)]
LAST_YEARS = [None if user % 5 == 0 else 1992 + user for user in range(NUM_USERS)]
HISTORIES = [*random_histories(NUM_USERS - 1, NUM_ITEMS, seed=2, longest=9).values(), list(range(1, NUM_ITEMS - 1))]
GENRES = [sorted({item % 3, item % 5 + 1, item % 2 * 4}) if item % 11 else [] for item in range(NUM_ITEMS)]
DIRECTORS = [[item // 4] if item % 6 else [] for item in range(NUM_ITEMS)]


def ragged(rows):
    return Ragged(
        np.array([value for row in rows for value in row], np.int64), np.append(0, np.cumsum([len(row) for row in rows]))
    )


ITEMS = ItemTable(
    ids=pa.array([f"film {item}" for item in range(NUM_ITEMS)]),
    count=np.zeros(NUM_ITEMS, np.int64),
    year=np.array([year or 0 for year in YEARS], np.int16),
    has_year=np.array([year is not None for year in YEARS]),
    title=pa.array([f"title {item}" for item in range(NUM_ITEMS)]),
    listed={"genre": (6, ragged(GENRES)), "director": (8, ragged(DIRECTORS)), "writer": (0, ragged([[]] * NUM_ITEMS))},
)
SEQUENCES = Sequences.of(
    pa.array([f"u{user}" for user in range(NUM_USERS)]),
    [np.array(history) for history in HISTORIES],
    pa.array(LAST_YEARS, pa.int16()),
)


@pytest.fixture(scope="module")
def recommender():
    model = make_model()
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    return Recommender(model, ITEMS)


def write_list(path, rows):
    """Rows of items, or of users and items, counted from 0."""
    with_users = bool(rows) and isinstance(rows[0], tuple)
    lines = [f"u{row[0]},film {row[1]}" if with_users else f"film {row}" for row in rows]
    path.write_text("\n".join(["user,item" if with_users else "item", *lines]) + "\n")
    return str(path)


def users_of(recommender, ranking, candidates=(), excluded=()):
    """The twin's users. Lists of users are pairs."""
    scores = score_next(recommender.model, Windows.from_sequences(SEQUENCES), ranking)(0, NUM_ITEMS).tolist()
    users = []
    for user in range(NUM_USERS):
        last = LAST_YEARS[user]
        own = {item for who, item in candidates if who == user}
        users.append(
            twin.User(
                scores=scores[user],
                seen={token - 1 for token in HISTORIES[user]},
                later={item for item in range(NUM_ITEMS) if YEARS[item] and last and YEARS[item] > last},
                candidates=own if any(who == user for who, _ in candidates) else None,
                excluded={item for who, item in excluded if who == user},
            )
        )
    return users


def lists_of(recommender, ranking, k, batch_size=3):
    """What each user gets, [(item, score)]."""
    inference = InferenceConfig(topk=k, batch_size=batch_size)
    rows = [row for batch in recommender.rank(SEQUENCES, inference, ranking) for row in batch.table.to_pylist()]
    found = [[] for _ in range(NUM_USERS)]
    for row in rows:
        found[int(row["user"][1:])].append((int(row["item"][5:]), row["score"]))
        assert row["rank"] == len(found[int(row["user"][1:])])
    return found


def check(recommender, ranking, case, users):
    for user, found in zip(users, lists_of(recommender, ranking, case.k), strict=True):
        assert twin.why_wrong(case, user, [item for item, _ in found]) is None
        written = twin.written_scores(case, user)
        for item, score in found:
            assert score == pytest.approx(written[item], rel=1e-4, abs=1e-5)


ITEM = st.integers(0, NUM_ITEMS - 1)
PAIR = st.tuples(st.integers(0, NUM_USERS - 1), ITEM)
A_LIST = st.one_of(
    st.none(),
    st.lists(ITEM, min_size=1, max_size=NUM_ITEMS, unique=True),
    st.lists(PAIR, min_size=1, max_size=60, unique=True),
)
CAPS = st.dictionaries(st.sampled_from(["genre", "director"]), st.integers(1, 3), max_size=2)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    candidates=A_LIST,
    default=st.sampled_from(["none", "all"]),
    exclude=A_LIST,
    max_per=CAPS,
    diversity=st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0]),
    pool=st.sampled_from([1, 4, 12, 100]),
    min_score=st.sampled_from([None, None, -0.5, 0.02, 1.0]),
    scores=st.sampled_from(["logit", "probability"]),
    k=st.sampled_from([1, 3, 8, NUM_ITEMS]),
    seen_and_future=st.tuples(st.booleans(), st.booleans()),
    discount=st.sampled_from([0.0, 0.4]),
    block_bytes=st.sampled_from([2**21, 4 * 3 * 7]),
)
def test_all_rules_together_equal_the_slow_way(
    recommender, tmp_path_factory, candidates, default, exclude, max_per, diversity, pool, min_score, scores, k,
    seen_and_future, discount, block_bytes,
):  # fmt: skip
    folder = tmp_path_factory.getbasetemp()
    given_lists = {
        name: None if rows is None else read_list(name, (write_list(folder / f"{name}.csv", rows),))
        for name, rows in (("candidates", candidates), ("exclude", exclude))
    }
    ranking = Ranking(
        *seen_and_future, discount, given_lists["candidates"], default, given_lists["exclude"], max_per, diversity,
        pool, min_score, scores,
    )  # fmt: skip
    of_users = {
        name: bool(rows) and isinstance(rows[0], tuple)
        for name, rows in (("candidates", candidates), ("exclude", exclude))
    }
    case = twin.Case(
        k=k,
        exclude_seen=seen_and_future[0],
        exclude_future=seen_and_future[1],
        candidates=None if candidates is None or of_users["candidates"] else set(candidates),
        has_users_candidates=of_users["candidates"],
        candidates_default=default,
        exclude=set() if exclude is None or of_users["exclude"] else set(exclude),
        max_per=max_per,
        values={"genre": GENRES, "director": DIRECTORS},
        diversity=diversity,
        pool=pool,
        vectors=recommender.model.items.embedding.weight[1:-1].tolist(),
        min_score=min_score,
        scores=scores,
    )
    users = users_of(
        recommender,
        ranking,
        candidates if of_users["candidates"] else (),
        exclude if of_users["exclude"] else (),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking_module, "CPU_BLOCK_BYTES", block_bytes)
        check(recommender, ranking, case, users)
