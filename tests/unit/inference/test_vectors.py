import contextlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference import vectors
from bert4rec.inference.ranking import Ranking, score_next
from bert4rec.inference.recommender import Recommender
from bert4rec.model.network import BERT4Rec
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import map_parts
from tests.helpers.trainer import Quiet
from tests.unit.model.test_network import make_model

pytestmark = pytest.mark.unit

NUM_USERS, NUM_ITEMS, LONGEST, K = 600, 150, 20, 10  # two parts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    histories = random_histories(NUM_USERS, NUM_ITEMS, seed=4, longest=LONGEST)
    return PreparedDataset(write_dataset(tmp_path_factory.mktemp("data") / "d", histories, NUM_ITEMS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "m")
    model = make_model(NUM_ITEMS)
    model.catalogue = "test"
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    model.save_pretrained(path)
    return path


@pytest.fixture
def export(dataset, checkpoint, tmp_path, monkeypatch):
    """Vectors of items and of users, each with their ids."""
    monkeypatch.setattr(vectors, "map_parts", map_parts)
    monkeypatch.setattr(vectors, "begin", lambda config, meanwhile=(): None)
    monkeypatch.setattr(vectors, "for_scoring", lambda config: (False, 1))
    monkeypatch.setattr(vectors, "Progress", lambda *arguments: contextlib.nullcontext(Quiet()))

    def exported(*overrides):
        config = load_config(None, ["inference.batch_size=100", *overrides])
        notes = vectors.export_vectors(config, dataset, checkpoint, str(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet", "users.parquet"]
        found = []
        for name in ("item", "user"):
            table = pq.read_table(tmp_path / f"{name}s.parquet")
            flat = table["vector"].combine_chunks().flatten().to_numpy()
            found += [table[name].to_numpy(), flat.reshape(len(table), -1)]
        return config, notes, found

    return exported


def test_inner_products_are_the_scores(export, dataset, checkpoint):
    _, notes, (items, of_items, users, of_users) = export("inference.popularity_discount=0.5")
    assert notes == []
    assert items.tolist() == [100 + token for token in range(1, NUM_ITEMS + 1)]
    sequences = dataset.sequences()
    assert users.tolist() == sequences.users.to_pylist()
    model = BERT4Rec.from_pretrained(checkpoint)
    scores = score_next(model, Windows.from_sequences(sequences), Ranking(popularity_discount=0.5))(0, NUM_ITEMS)
    np.testing.assert_allclose(of_users @ of_items.T, scores, rtol=1e-4, atol=1e-5)


def test_what_nobody_may_get_has_no_vector(export, tmp_path):
    lists = tmp_path.parent / f"{tmp_path.name}.csv"
    lists.write_text("item\n" + "".join(f"{item}\n" for item in [101, 250, 150, 999]))
    _, notes, (items, of_items, _, _) = export(f"inference.exclude={lists}")
    assert set(range(101, 251)) - set(items.tolist()) == {101, 250, 150}
    assert len(of_items) == NUM_ITEMS - 3
    assert "1 of 4 items are not in the catalogue, such as '999'" in notes[0]
    assert notes[1].endswith("have no vector: 3")
    with pytest.raises(InputError, match="leave no item"):
        export(f"inference.exclude={lists}", f"inference.candidates={lists}")


def ranked_by(index, of_users, items, seen):
    """Lists of K items from an index, without those that each user has seen."""
    _, places = index.search(of_users, K + LONGEST)
    return [
        [item for item in items[of_user].tolist() if item not in own][:K]
        for of_user, own in zip(places, seen, strict=True)
    ]


@pytest.mark.parametrize("rules", [(), ("inference.popularity_discount=0.7", "inference.candidates=LIST")])
def test_an_exact_index_gives_our_lists(export, dataset, checkpoint, tmp_path, rules):
    faiss = pytest.importorskip("faiss")
    lists = tmp_path.parent / f"{tmp_path.name}.csv"
    lists.write_text("item\n" + "".join(f"{item}\n" for item in range(101, 201)))
    config, _, (items, of_items, users, of_users) = export(*(rule.replace("LIST", str(lists)) for rule in rules))
    recommender = Recommender(BERT4Rec.from_pretrained(checkpoint), dataset.items())
    sequences = dataset.sequences()
    ours = {user: [] for user in users.tolist()}
    for batch in recommender.rank(sequences, config.inference, Ranking.of(config.inference)):
        for row in batch.table.to_pylist():
            ours[row["user"]].append(row["item"])
    seen = [{100 + token for token in each} for each in np.split(sequences.items, sequences.offsets[1:-1])]
    exact = faiss.IndexFlatIP(of_items.shape[1])
    exact.add(of_items)
    assert ranked_by(exact, of_users, items, seen) == list(ours.values())

    graph = faiss.IndexHNSWFlat(of_items.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = 200, 128
    graph.add(of_items)
    found = ranked_by(graph, of_users, items, seen)
    recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, ours.values(), strict=True)])
    print(f"recall@{K} of HNSW: {recall:.4f}")
    assert recall > 0.9
