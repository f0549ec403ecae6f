import gzip
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference.few_users import choose_users, users_of_dataset, users_of_file
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender, load
from tests.helpers.datasets import random_histories, write_dataset
from tests.twins import reference
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(40, NUM_ITEMS, seed=3, longest=20)
YEARS = [None if token % 7 == 0 else 1990 + token % 10 for token in range(1, NUM_ITEMS + 1)]
LAST_YEARS = [None if user % 5 == 0 else 1990 + user % 10 for user in range(40)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = write_dataset(tmp_path_factory.mktemp("data") / "d", HISTORIES, NUM_ITEMS, YEARS, LAST_YEARS)
    return PreparedDataset(path)


@pytest.fixture(scope="module")
def recommender(dataset):
    model = make_model()
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    return Recommender(model, dataset.items())


@pytest.mark.parametrize("batch_size", [7, 512])
def test_every_user_of_any_batch_gets_what_the_slow_way_gives(dataset, recommender, batch_size):
    inference = load_config(None, [f"inference.batch_size={batch_size}", "inference.topk=9"]).inference
    rows = [
        row for batch in recommender.rank(dataset.sequences(), inference, Ranking()) for row in batch.table.to_pylist()
    ]
    expected = []
    for index, user in enumerate(sorted(HISTORIES)):
        best = reference.recommendations(recommender.model, HISTORIES[user], 9, YEARS, LAST_YEARS[index])
        expected += [(user, 100 + token, rank) for rank, (token, _) in enumerate(best, start=1)]
    assert [(row["user"], row["item"], row["rank"]) for row in rows] == expected


@pytest.mark.parametrize("discount", [0, 0.7])
def test_one_history_gets_what_the_slow_way_gives(recommender, discount):
    for history, last_year, exclude_seen in ([3, 9, 4], None, True), ([5, 1], 1994, True), (HISTORIES[7], 1990, False):
        best = reference.recommendations(
            recommender.model, history, 6, YEARS, last_year, exclude_seen, popularity_discount=discount
        )
        got = recommender.recommend(
            [100 + token for token in history],
            topk=6,
            last_year=last_year,
            ranking=Ranking(exclude_seen=exclude_seen, popularity_discount=discount),
        )
        assert got["item"].tolist() == [100 + token for token, _ in best]
        assert got["title"].tolist() == [f"film {token}" for token, _ in best]
        assert got["score"].tolist() == pytest.approx([score for _, score in best], rel=1e-4, abs=1e-5)
        assert got.index.tolist() == list(range(1, len(best) + 1))


def test_similar_items_are_those_of_largest_cosine(recommender):
    vectors = recommender.model.items.embedding.weight.detach()[1:-1].double().numpy()
    cosine = {
        token: float(row @ vectors[4] / np.linalg.norm(row) / np.linalg.norm(vectors[4]))
        for token, row in enumerate(vectors, start=1)
        if token != 5
    }
    expected = sorted(cosine, key=cosine.get, reverse=True)[:8]
    got = recommender.similar("105", topk=8)
    assert got["item"].tolist() == [100 + token for token in expected]
    assert got["cosine"].tolist() == pytest.approx([cosine[token] for token in expected], abs=1e-5)


def test_a_new_item_without_metadata_is_like_nothing(dataset):
    model = make_model()
    model.unrankable[-1] = True
    recommender = Recommender(model, dataset.items())
    assert 130 not in recommender.similar(101, topk=NUM_ITEMS)["item"].tolist()
    with pytest.raises(InputError, match="item 130 has neither interactions nor metadata"):
        recommender.similar(130)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.recommend([101, 999, "x"]), r"not in the catalogue: item 999, 'x'; it has 30 items, such as 101"),
        (lambda r: r.similar(1), "not in the catalogue: item 1;"),
        (lambda r: r.recommend([]), "the history is empty"),
        (lambda r: r.recommend([101], topk=31), "topk=31: expected 1 to 30"),
    ],
)
def test_what_cannot_be_ranked_is_one_message(recommender, call, message):
    with pytest.raises(InputError, match=message):
        call(recommender)


def test_a_model_directory_stands_alone(dataset, recommender, tmp_path):
    recommender.model.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"items\.parquet is missing"):
        load(str(tmp_path))
    shutil.copy(f"{dataset.path}/items.parquet", tmp_path)
    expected = recommender.recommend([101, 102, 103], topk=4)
    assert load(str(tmp_path)).recommend([101, 102, 103], topk=4).equals(expected)
    pq.write_table(pq.read_table(tmp_path / "items.parquet").slice(1), tmp_path / "items.parquet")
    with pytest.raises(InputError, match="has 29 items, the model 30"):
        load(str(tmp_path))


def as_lists(sequences):
    items = np.split(sequences.items, sequences.offsets[1:-1])
    years = np.where(sequences.has_last_year, sequences.last_year, -1).tolist()
    return list(zip(sequences.users.to_pylist(), [history.tolist() for history in items], years, strict=True))


def test_chosen_users_come_in_the_order_asked_for(dataset):
    expected = [
        (user, HISTORIES[user], -1 if LAST_YEARS[user - 1] is None else LAST_YEARS[user - 1]) for user in (31, 2, 17)
    ]
    assert as_lists(users_of_dataset(dataset, [31, "2", 17, 2])) == expected
    assert as_lists(choose_users(dataset.sequences(), [31, 2, 17], "here")) == expected
    unknown = r"not in the data, which have 40 users, such as 1, 2, 3: 77, 'x', 10{20}; .*_file"
    with pytest.raises(InputError, match=unknown):
        users_of_dataset(dataset, [1, 77, "x", 10**20])


FILE = """user,item,time
b,103,60
a,101,31536000
b,900,131536000
a,102,0
b,101,10
b,101,10
c,901,5
"""


@pytest.mark.parametrize("form", ["csv", "gz", "parquet"])
def test_new_users_are_sorted_and_counted(dataset, tmp_path, form):
    """Of b a duplicate and an unknown item, the latest, go; of c nothing is left."""
    path = tmp_path / f"new.{'csv.gz' if form == 'gz' else form}"
    if form == "parquet":
        lines = [line.split(",") for line in FILE.splitlines()[1:]]
        columns = {"user": [a for a, _, _ in lines], "item": [int(b) for _, b, _ in lines]}
        pq.write_table(pa.table(columns | {"time": [int(c) for _, _, c in lines]}), path)
    else:
        path.write_bytes(gzip.compress(FILE.encode()) if form == "gz" else FILE.encode())
    sequences, notes = users_of_file(str(path), dataset.items())
    assert as_lists(sequences) == [("a", [2, 1], 1971), ("b", [1, 3], 1974)]
    assert notes == [
        "exact duplicates of an interaction dropped: 1",
        "interactions with items that the model does not know left out: 2, of 2 items, such as '900', '901'",
        "users without any item that the model knows; they get no recommendations: 1",
    ]


def test_without_times_the_order_of_rows_counts(dataset, tmp_path):
    (tmp_path / "new.csv").write_text("item,user\n105,12\n101,7\n103,12\n105,12\n")
    sequences, notes = users_of_file(str(tmp_path / "new.csv"), dataset.items())
    assert as_lists(sequences) == [(7, [1], -1), (12, [5, 3, 5], -1)]
    assert notes == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,item\n1,900\n2,901\n", "none of its 2 interactions is with an item of the catalogue.*30 items.*'900'"),
        ("user,item\n", "no data rows"),
        ("user,film\n1,2\n", "no column item"),
        ("user,item,time\n1,101,5\n1,102,x\n1,,3\n", "line 3: time is 'x'"),
        (None, r"new\.csv: no such file; the directory holds nothing"),
    ],
)
def test_a_file_of_new_users_that_cannot_be_used_is_one_message(dataset, tmp_path, content, message):
    if content is not None:
        (tmp_path / "new.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        users_of_file(str(tmp_path / "new.csv"), dataset.items())


def test_the_same_history_gets_the_same_from_a_file(dataset, recommender, tmp_path):
    user = 12
    rows = "".join(f"new,{100 + token}\n" for token in HISTORIES[user])
    (tmp_path / "new.csv").write_text("user,item\n" + rows)
    inference, ranking = load_config().inference, Ranking(exclude_future=False)
    of_file = users_of_file(str(tmp_path / "new.csv"), dataset.items()).sequences
    (new,), (known,) = (
        list(recommender.rank(sequences, inference, ranking))
        for sequences in (of_file, users_of_dataset(dataset, [user]))
    )
    assert new.table.drop_columns(["user"]).equals(known.table.drop_columns(["user"]))
    assert torch.isfinite(torch.tensor(new.table["score"].to_pylist())).all()
