import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows, held_out
from bert4rec.errors import InputError
from bert4rec.evaluation import evaluate
from bert4rec.evaluation.metrics import RankCounts, ndcg
from bert4rec.inference import fit_blend, item_item, recommend
from bert4rec.inference.blend import Blend, stored
from bert4rec.inference.export import ScoringFunction
from bert4rec.inference.ranking import Exclusions, Ranking, rank_of_target, score_next, top_k
from bert4rec.inference.recommender import Recommender, load
from jobs import recommend as few
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import without_ray
from tests.twins import reference
from tests.unit.model.test_batches import windows_of
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(60, NUM_ITEMS, seed=5, longest=9)


def dense(weights):
    return weights if isinstance(weights, np.ndarray) else weights.toarray()


def blend_of(tmp_path, model, histories, weight, num_items=NUM_ITEMS):
    """A blend whose item-item model is fitted to histories, and its weights."""
    fitted = item_item.FITTED[model](windows_of(histories), num_items)
    path = str(tmp_path / f"{model}.safetensors")
    safetensors.torch.save_file(fit_blend.stored_arrays(fitted), path)
    return Blend(model, weight, weight, path=path), dense(fitted)


@pytest.mark.parametrize("model", ["ease", "item-knn"])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_slow_way(tmp_path, model, seed):
    """Over whole catalogues, blocks, some columns and some users; with items that the network cannot score."""
    random = np.random.default_rng(seed)
    histories = [*random_histories(30, NUM_ITEMS - 3, seed, 8).values(), [NUM_ITEMS - 1], [1, 1, 2]]
    weight = float(random.uniform(0.05, 2))
    blend, fitted = blend_of(tmp_path, model, histories[:20], weight)
    network = make_model()
    network.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    if seed % 2:
        network.unrankable[[2, 7]] = True
    ranking = Ranking(popularity_discount=0.4, blend=blend)
    plain = score_next(network, windows_of(histories), replace(ranking, blend=None))(0, NUM_ITEMS).clone()
    expected = torch.tensor(
        [
            reference.blended(own, fitted.tolist(), history, weight)
            for own, history in zip(plain.tolist(), histories, strict=True)
        ]
    )
    scores = score_next(network, windows_of(histories), ranking)
    torch.testing.assert_close(scores(0, NUM_ITEMS), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert torch.equal(scores.with_weight(0.0)(0, NUM_ITEMS), plain)
    torch.testing.assert_close(scores(4, 11), expected[:, 4:11], rtol=1e-4, atol=1e-5)
    columns = torch.tensor([0, 3, 4, 17, 29])
    some = score_next(network, windows_of(histories), ranking, columns)
    torch.testing.assert_close(some(0, 5), expected[:, columns], rtol=1e-4, atol=1e-5)
    users = torch.tensor([1, 5, 31])
    torch.testing.assert_close(some.of_users(users)(1, 4), expected[users][:, columns[1:4]], rtol=1e-4, atol=1e-5)
    none = score_next(network, windows_of(histories), ranking, columns[:0])
    assert none(0, 0).shape == (32, 0)


@pytest.mark.parametrize("model", ["ease", "item-knn"])
def test_a_weight_is_that_of_standardised_scores(tmp_path, model):
    """The order is that of z(network) + w z(item-item model), user by user."""
    blend, fitted = blend_of(tmp_path, model, list(HISTORIES.values()), 0.7)
    network, histories = make_model(), windows_of(list(HISTORIES.values()))
    own = score_next(network, histories)(0, NUM_ITEMS).double().numpy().copy()
    other = np.stack([fitted[np.unique(history) - 1].sum(0) for history in HISTORIES.values()]).astype(float)
    deviation = other.std(1, keepdims=True)
    z = (own - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    z += 0.7 * np.where(deviation > 0, (other - other.mean(1, keepdims=True)) / np.maximum(deviation, 1e-9), 0)
    blended = score_next(network, histories, Ranking(blend=blend))(0, NUM_ITEMS).numpy()
    np.testing.assert_allclose(
        (blended - own.mean(1, keepdims=True)) / own.std(1, keepdims=True), z, rtol=1e-4, atol=1e-4
    )


def test_without_a_blend_nothing_changes():
    assert Ranking.of(load_config(None, ["inference.blend={ease: 0}"]).inference) == Ranking()
    assert "blend" not in Ranking().identity()
    assert Ranking.of(load_config(None, ["inference.blend={ease: 0.06}"]).inference).identity()["blend"] == {
        "ease": 0.06
    }


@pytest.mark.parametrize(
    "value", ["{ease: -1}", "{pop: 1}", "{ease: much}", "{ease: 1, item-knn: 1}", "{ease: .inf}", "3"]
)
def test_what_is_no_blend_is_one_message(value):
    with pytest.raises(InputError, match=r"inference\.blend"):
        load_config(None, [f"inference.blend={value}"])


class Place:
    """A dataset and a model, and the jobs' own functions in this process."""

    def __init__(self, root, monkeypatch):
        without_ray(monkeypatch, recommend, evaluate)
        self.root = root
        self.settings = [f"run.storage_path={root}", "data.data_dir=/d", "inference.formats=[parquet]"]
        self.settings += ["inference.topk=4", f"inference.checkpoint_path={root / 'run' / 'm'}"]
        self.path = load_config(None, self.settings).prepared_path
        (root / "prepared").mkdir()
        self.write(HISTORIES)
        self.checkpoint = str(root / "run" / "m")
        self.save(make_model())

    def write(self, histories):
        shutil.rmtree(self.path, ignore_errors=True)
        write_dataset(self.root / "prepared" / self.path.rpartition("/")[2], histories, NUM_ITEMS)

    def save(self, model, held_out=2):
        model.catalogue, model.held_out = "test", held_out
        model.item_counts[:] = torch.arange(NUM_ITEMS, 0, -1)
        model.save_pretrained(self.checkpoint)
        shutil.copy(f"{self.path}/items.parquet", self.checkpoint)

    def config(self, *more):
        return load_config(None, [*self.settings, *more])

    def fitted(self, *more):
        """The ranking that jobs rank with."""
        config, dataset = self.config(*more), PreparedDataset(self.path)
        model = recommend.read_model(self.checkpoint)
        ranking, notes = fit_blend.settled(Ranking.of(config.inference), config, dataset, self.checkpoint, model)
        return fit_blend.fit(ranking, config, dataset, self.checkpoint), notes


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


AUTO = "inference.blend={ease: auto}"


@pytest.mark.parametrize("holdout", [1, 2])
@pytest.mark.parametrize("exclude_seen", ["true", "false"])
def test_auto_takes_what_ranks_best_on_the_validation(place, capsys, holdout, exclude_seen):
    settings = (f"data.holdout={holdout}", f"evaluation.exclude_seen={exclude_seen}", "inference.batch_size=7")
    ranking, _ = place.fitted(AUTO, *settings)
    config, windows = place.config(*settings), Windows.from_sequences(PreparedDataset(place.path).sequences())
    histories, targets = held_out(windows, config.data, "validation")
    assert len(targets) < len(windows)
    exclusions = Exclusions.of(histories if exclude_seen == "true" else None)
    values = {}
    for weight in fit_blend.GRID:
        scores = score_next(make_model(), histories, replace(ranking, blend=replace(ranking.blend, weight=weight)))
        counts = RankCounts.empty(NUM_ITEMS)
        counts.add(rank_of_target(scores, exclusions, targets, NUM_ITEMS))
        values[weight] = ndcg(counts, 10)
    best = max(values.values())
    assert ranking.blend.weight == min(weight for weight, value in values.items() if value == best)
    chosen = stored(place.checkpoint)["weight"]
    assert chosen["ndcg@10"] == pytest.approx({f"{weight:g}": value for weight, value in values.items()})
    assert f"weight {ranking.blend.weight:g} of ease ranks best" in capsys.readouterr().out
    # the item-item model saw the training items alone
    kept = [own[: -config.data.holdout] for own in HISTORIES.values() if len(own) >= config.data.min_interactions]
    np.testing.assert_allclose(ranking.blend.item_weights(), item_item.ease(windows_of(kept), NUM_ITEMS), atol=1e-6)


def test_many_users_are_an_even_sample(place, monkeypatch):
    monkeypatch.setattr(fit_blend, "MOST_USERS", 20)
    place.fitted(AUTO)
    long = [user for user, own in enumerate(HISTORIES.values()) if len(own) >= 3 and user % 3 == 0]
    assert stored(place.checkpoint)["weight"]["num_users"] == len(long)


def test_what_is_stored_is_used_again_and_what_is_stale_is_not(place, capsys):
    first, _ = place.fitted(AUTO)
    said = capsys.readouterr().out
    assert "fitting ease on 30 items" in said
    assert "beside the model" not in said

    def told(*more):
        ranking, _ = place.fitted(*more)
        return ranking, capsys.readouterr().out

    again, said = told(AUTO)
    assert (again, again.blend.path) == (first, first.blend.path)
    assert (
        said == f"inference.blend: weight {first.blend.weight:g} of ease, which was chosen on the validation before\n"
    )
    given, said = told("inference.blend={ease: 0.25}")
    assert (given.blend.weight, given.blend.path, said) == (0.25, first.blend.path, "")
    assert given.blend.fitted_to != first.blend.fitted_to
    # another discount: another weight, the same item-item model
    other, said = told(AUTO, "inference.popularity_discount=0.3")
    assert "ranks best on the validation" in said
    assert "fitting" not in said
    assert other.blend.path == first.blend.path
    # another model
    place.fitted(AUTO)
    changed = make_model()
    changed.output_bias.data += torch.randn(NUM_ITEMS)
    place.save(changed)
    capsys.readouterr()
    other, said = told(AUTO)
    assert "ranks best on the validation" in said
    assert other.blend.fitted_to != first.blend.fitted_to
    # other data, other training items, a damaged file, another item-item model
    place.write({user: own[::-1] for user, own in HISTORIES.items()})
    other, said = told(AUTO)
    assert "fitting ease on 30 items for inference.blend; what lies beside the model is another, of other data" in said
    assert not storage.exists(first.blend.path)
    _, said = told(AUTO, "data.min_interactions=4")
    assert "fitting ease" in said
    other, _ = told(AUTO)
    with open(other.blend.path, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    _, said = told(AUTO)
    assert "or damaged" in said
    other, said = told("inference.blend={item-knn: 0.1}")
    assert "fitting item-knn" in said


def test_a_large_catalogue_takes_a_sparse_model_and_says_so(place):
    ranking, notes = place.fitted(AUTO, "evaluation.max_baseline_items=29")
    assert notes == [
        "inference.blend takes item-knn instead of ease: 30 items are more than evaluation.max_baseline_items=29"
    ]
    assert set(ranking.blend.tensors()) == {"offsets", "items", "values"}
    assert ranking.identity()["blend"] == {"item-knn": "auto"}


def test_every_way_to_recommend_gives_the_same(place, tmp_path):
    """The batch job, a few users, the Python API, the evaluation's lists and the slow way."""
    config = place.config("inference.blend={ease: 0.8}", "inference.exclude_future=false")
    recommend.recommend(config, place.path, place.checkpoint, str(tmp_path / "all"))
    every = recommend.pq.read_table(tmp_path / "all" / "recommendations.parquet").to_pylist()
    output = tmp_path / "few"
    few.recommend_users(
        load_config(
            None,
            [
                *(*place.settings, "inference.blend={ease: 0.8}", "inference.exclude_future=false"),
                *(f"inference.users={list(HISTORIES)}", f"inference.output_path={output}"),
            ],
        )
    )
    assert recommend.pq.read_table(output / "recommendations.parquet").to_pylist() == every
    alone, ranking = load(place.checkpoint), Ranking.of(config.inference)
    ids = [[100 + token for token in own] for own in HISTORIES.values()]
    frame = alone.recommend_many(ids, 4, ranking=ranking)
    assert frame["item"].tolist() == [row["item"] for row in every]
    np.testing.assert_allclose(frame["score"], [row["score"] for row in every], rtol=1e-4, atol=1e-5)
    one = alone.recommend(ids[3], 4, ranking=ranking)
    assert one["item"].tolist() == [row["item"] for row in every if row["user"] == 4]
    fitted, _ = place.fitted("inference.blend={ease: 0.8}")
    plain = score_next(make_model(), windows_of(list(HISTORIES.values())))(0, NUM_ITEMS).tolist()
    weights, listed = fitted.blend.item_weights().tolist(), []
    for own, scores in zip(HISTORIES.values(), plain, strict=True):
        blended = reference.blended(scores, weights, own, 0.8)
        order = sorted(set(range(1, NUM_ITEMS + 1)) - set(own), key=lambda token: -blended[token - 1])
        listed += [100 + token for token in order[:4]]
    assert listed == [row["item"] for row in every]
    assert listed != [row["item"] for row in _rows(place, "inference.exclude_future=false")]


def _rows(place, *more):
    recommender = Recommender(make_model(), PreparedDataset(place.path).items())
    sequences, config = PreparedDataset(place.path).sequences(), place.config(*more)
    ranking = Ranking.of(config.inference)
    return [r for batch in recommender.rank(sequences, config.inference, ranking) for r in batch.table.to_pylist()]


def test_recommendations_of_another_blend_are_made_again(place, tmp_path, capsys):
    def run(*more):
        config = place.config(*more)
        recommend.recommend(config, place.path, place.checkpoint, str(tmp_path / "out"))
        return "is up to date" in capsys.readouterr().out

    assert [run(), run(), run(AUTO), run(AUTO), run("inference.blend={ease: 0.1}"), run()] == [
        *(False, True, False, True, False, False)
    ]


def test_evaluation_ranks_the_blend_beside_both(place):
    config = place.config("inference.blend={ease: 0.5}", "data.holdout=2", "evaluation.protocols=[all, uniform-100]")
    result = evaluate.evaluate(config, place.path, place.checkpoint)
    assert list(result.protocols["all"]) == ["BERT4Rec", "BERT4Rec+ease", "popularity", "ease"]
    without = evaluate.evaluate(
        place.config("data.holdout=2", "evaluation.protocols=[all, uniform-100]", "evaluation.baselines=[popularity]"),
        place.path,
        place.checkpoint,
    )
    for name in ("BERT4Rec", "popularity"):
        assert result.protocols["all"][name] == without.protocols["all"][name]
    assert result.rules["blend"] == {"model": "ease", "weight": 0.5, "is_chosen": False}
    assert "blend" not in without.rules
    # the figures are those of the slow way
    histories, targets = held_out(Windows.from_sequences(PreparedDataset(place.path).sequences()), config.data, "test")
    fitted, _ = place.fitted("inference.blend={ease: 0.5}", "data.holdout=2")
    scores, counts = score_next(make_model(), histories)(0, NUM_ITEMS).tolist(), RankCounts.empty(NUM_ITEMS)
    weights, (rows, tokens) = fitted.blend.item_weights().tolist(), histories.flat()
    for user, target in enumerate(targets.tolist()):
        own = tokens[rows == user].tolist()
        blended = reference.blended(scores[user], weights, own, 0.5)
        counts.add(torch.tensor([reference.rank(blended, target - 1, {token - 1 for token in own})]))
    assert result.protocols["all"]["BERT4Rec+ease"]["ndcg@10"] == pytest.approx(ndcg(counts, 10))


def test_a_model_that_loses_to_an_item_item_model_says_for_whom():
    def group(num_users, **ndcg):
        return {name.replace("_", "+"): {"num_users": num_users, "ndcg@10": value} for name, value in ndcg.items()}

    groups = {
        "1-9": group(4000, BERT4Rec=0.03, BERT4Rec_ease=0.05, ease=0.04),
        "10-49": group(800, BERT4Rec=0.04, BERT4Rec_ease=0.03, ease=0.02),
        "50-199": group(99, BERT4Rec=0.01, BERT4Rec_ease=0.01, ease=0.2),  # too few to say anything
        "200+": {"BERT4Rec": {"num_users": 0}, "BERT4Rec+ease": {"num_users": 0}, "ease": {"num_users": 0}},
    }
    assert evaluate._notes_on_groups(groups, Ranking()) == [
        "WARNING ease has a higher NDCG@10 than BERT4Rec for users with 1-9 items (4,000 users, 0.0400 against "
        "0.0300); inference.blend={ease: auto} adds its scores"
    ]
    assert evaluate._notes_on_groups(groups, Ranking(blend=Blend("ease", 0.1, 0.1))) == []


def test_a_short_list_of_candidates_keeps_the_order(place):
    """A rule takes items away; the others keep their scores."""
    fitted, _ = place.fitted("inference.blend={ease: 0.8}")
    windows = windows_of(list(HISTORIES.values()))
    whole = score_next(make_model(), windows, fitted)
    columns = torch.tensor([1, 6, 8, 20])
    values, places = top_k(score_next(make_model(), windows, fitted, columns), Exclusions.of(None), len(windows), 4, 4)
    torch.testing.assert_close(values, whole(0, NUM_ITEMS)[:, columns].gather(1, places), rtol=1e-5, atol=1e-5)


def test_what_a_blend_cannot_do_is_one_message(place):
    ranking, _ = place.fitted("inference.blend={ease: 0.8}")
    with pytest.raises(InputError, match=r"inference\.blend: a program has the network alone"):
        ScoringFunction(make_model(), 3, ranking)
    alone, of = load(place.checkpoint), Ranking.of
    with pytest.raises(InputError, match="no weight of ease is chosen"):
        alone.recommend([101], 3, ranking=of(place.config(AUTO).inference))
    with pytest.raises(InputError, match="has no item-knn for"):
        alone.recommend([101], 3, ranking=of(place.config("inference.blend={item-knn: 1}").inference))
    place.fitted(AUTO)
    with pytest.raises(InputError, match="no weight of ease is chosen for this model and discount"):
        alone.recommend([101], 3, ranking=replace(of(place.config(AUTO).inference), popularity_discount=0.5))
    with pytest.raises(InputError, match=r"the validation, which data\.use_full_data does not have"):
        place.fitted(AUTO, "data.use_full_data=true")
    place.save(make_model(), held_out=1)
    with pytest.raises(InputError, match="on the validation, which this model has seen; give a number"):
        place.fitted(AUTO, "data.holdout=2")
    test = ("data.holdout=1", "training.monitor_metric=train_loss", "evaluation.split=test")
    with pytest.raises(InputError, match="would be chosen on the test item"):
        evaluate.evaluate(place.config(AUTO, *test), place.path, place.checkpoint)
