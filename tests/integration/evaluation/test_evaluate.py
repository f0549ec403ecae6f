import math
import shutil
from typing import get_args

import numpy as np
import pytest
import torch

from bert4rec.config import Protocol, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.evaluation.evaluate import evaluate
from bert4rec.inference import fit_blend
from bert4rec.inference.blend import stored
from bert4rec.inference.ranking import Ranking
from bert4rec.training.train import train
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import without_ray
from tests.twins import reference
from tests.unit.model.test_network import make_model

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

PROTOCOLS = get_args(Protocol)
BASELINES = ("popularity", "popularity-7-days", "item-knn", "ease")
ALL = [f"evaluation.protocols=[{','.join(PROTOCOLS)}]", f"evaluation.baselines=[{','.join(BASELINES)}]"]

NUM_ITEMS = 120  # of which users have up to 28, so that some have fewer than 100 left to draw, and some more
HISTORIES = random_histories(600, NUM_ITEMS, seed=5, longest=28)  # two parts
for _user in range(1, 600, 9):
    HISTORIES[_user].append(HISTORIES[_user][0])  # these repeat an item


def random_before():
    """Of each user, sorted counts before: a week before the validation cut-off, that, a week before the test, that."""
    rng = np.random.default_rng(1)
    names = ("recent_validation", "validation", "recent_test", "test")
    drawn = [sorted(rng.integers(0, len(items) + 1, 4).tolist()) for items in HISTORIES.values()]
    columns = dict(zip(names, (list(column) for column in zip(*drawn, strict=True)), strict=True))
    return columns | {"recent_last": [max(len(items) - 5, 0) for items in HISTORIES.values()]}


BEFORE = random_before()


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", HISTORIES, NUM_ITEMS, before=BEFORE)


@pytest.fixture(scope="module")
def model():
    model = make_model(NUM_ITEMS)
    model.catalogue, model.held_out = "test", 2
    model.item_counts += torch.tensor(counted(last_item_but_one().training))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = str(tmp_path_factory.mktemp("model") / "m")
    model.save_pretrained(path)
    return path


class Case:
    """What a split means, user by user."""

    def __init__(self, training, recent, users):
        self.training, self.recent = training, recent
        self.users = users
        """(index, history, target) of each user who has a target."""


def last_item_but_one():
    users = [(n, items) for n, items in enumerate(HISTORIES.values()) if len(items) >= 4]
    recent = [items[BEFORE["recent_last"][n] : len(items) - 2] for n, items in users]
    return Case([items[:-2] for _, items in users], recent, [(n, items[:-2], items[-2]) for n, items in users])


def last_item():
    case = last_item_but_one()
    users = [(n, items) for n, items in enumerate(HISTORIES.values()) if len(items) >= 4]
    return Case(case.training, case.recent, [(n, items[:-1], items[-1]) for n, items in users])


def after_the_test_cut_off():
    training, recent, users = [], [], []
    for n, items in enumerate(HISTORIES.values()):
        known, cut = BEFORE["validation"][n], BEFORE["test"][n]
        if known >= 4:
            training.append(items[:known])
        recent.append(items[BEFORE["recent_test"][n] : cut])
        if cut >= 4 and len(items) > cut:
            users.append((n, items[:cut], items[cut]))
    return Case(training, recent, users)


def counted(histories):
    return [sum(items.count(token) for items in histories) for token in range(1, NUM_ITEMS + 1)]


def expected_ranks(case, model, seed, discount):
    """{(protocol, system): rank of each user}, and {system: each user's first ten}."""
    popularity = counted(case.training)
    weights = {
        "item-knn": np.array(reference.item_knn(case.training, NUM_ITEMS, 100)),
        "ease": reference.ease(case.training, NUM_ITEMS, 500).numpy(),
    }
    ranks = {(protocol, system): [] for protocol in PROTOCOLS for system in ("BERT4Rec", *BASELINES)}
    best = {system: [] for system in ("BERT4Rec", *BASELINES)}
    histories = list(HISTORIES.values())
    for user, history, target in case.users:
        tokens = [*history[-(model.config.max_len - 1) :], NUM_ITEMS + 1]
        scores = {
            "BERT4Rec": reference.discounted(model, reference.logits(model, tokens)[-1].tolist(), discount),
            "popularity": popularity,
            "popularity-7-days": counted(case.recent),
        }
        scores |= {name: sum(weights[name][token - 1] for token in sorted(set(history))).tolist() for name in weights}
        own, seen = set(histories[user]), {token - 1 for token in history}
        drawn = {
            "popularity-100": reference.negatives(popularity, own, user, seed, 100),
            "popularity-100-of-all": set(reference.negatives(popularity, {target}, user, seed, 100)) - seen,
            "uniform-100": reference.negatives([1] * NUM_ITEMS, own, user, seed, 100),
            "uniform-100-of-all": set(reference.negatives([1] * NUM_ITEMS, {target}, user, seed, 100)) - seen,
        }
        for system, values in scores.items():
            ranks["all", system].append(reference.rank(values, target - 1, seen))
            ranks["all-with-seen", system].append(reference.rank(values, target - 1, set()))
            for protocol, items in drawn.items():
                others = set(range(NUM_ITEMS)) - {*items, target - 1}
                ranks[protocol, system].append(reference.rank(values, target - 1, others))
            order = sorted(set(range(NUM_ITEMS)) - seen, key=lambda item: -values[item])
            best[system].append(order[:10])
    return ranks, best


def mean(values):
    return sum(values) / len(values)


def ndcg10(ranks):
    return mean([1 / math.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])


@pytest.mark.parametrize(
    ("options", "make_case"),
    [
        (["evaluation.split=validation"], last_item_but_one),
        ([], last_item),
        (["inference.popularity_discount=0.4"], last_item),
        (["data.split=temporal", "data.min_interactions=4"], after_the_test_cut_off),
    ],
)
def test_every_protocol_and_system_equals_the_slow_way(
    dataset_path, checkpoint, model, tmp_path, options, make_case, request
):
    """On Ray Data's actors for one case, in this process for the others."""
    if options:
        request.getfixturevalue("local_parts")
    settings = ["data.min_interactions=4", "data.holdout=2", "evaluation.seed=9", *ALL, *options]
    if "data.split=temporal" in options:
        model.trained_before = PreparedDataset(dataset_path).manifest.cutoffs["validation"]
        checkpoint = str(tmp_path / "m")
        model.save_pretrained(checkpoint)
        model.trained_before = None
    case = make_case()
    config = load_config(None, [*settings, "inference.batch_size=77"])
    got = evaluate(config, dataset_path, checkpoint)
    assert got.popularity_discount == config.inference.popularity_discount
    if not options:
        request.getfixturevalue("local_parts")
        assert got == evaluate(config, dataset_path, checkpoint)  # to the last digit

    ranks, best = expected_ranks(case, model, 9, got.popularity_discount)
    lengths = [len(history) for _, history, _ in case.users]
    popularity = counted(case.training)
    falling = sorted(range(NUM_ITEMS), key=lambda item: -popularity[item])
    middle = {i: sum(popularity[j] for j in falling[:n]) + popularity[i] / 2 for n, i in enumerate(falling)}
    thirds = [min(int(3 * middle[target - 1] / sum(popularity)), 2) for _, _, target in case.users]
    assert got.num_users == len(case.users)
    for (protocol, system), expected in ranks.items():
        metrics = got.protocols[protocol][system]
        assert metrics["hr@5"] == pytest.approx(mean([rank <= 5 for rank in expected])), (protocol, system)
        assert metrics["mrr"] == pytest.approx(mean([1 / rank if rank <= NUM_ITEMS else 0 for rank in expected]))
        assert metrics["ndcg@10"] == pytest.approx(ndcg10(expected))
        for name, low, high in (("1-9", 1, 10), ("10-49", 10, 50)):
            of_group = [rank for rank, length in zip(expected, lengths, strict=True) if low <= length < high]
            found = got.by_history_length[protocol][name][system]
            assert found == pytest.approx(
                {
                    "num_users": len(of_group),
                    "hr@10": mean([rank <= 10 for rank in of_group]),
                    "ndcg@10": ndcg10(of_group),
                }
            )
        for place, name in enumerate(("head", "mid", "tail")):
            of_group = [rank for rank, third in zip(expected, thirds, strict=True) if third == place]
            assert got.by_target_popularity[protocol][name][system]["num_users"] == len(of_group)
            assert got.by_target_popularity[protocol][name][system]["ndcg@10"] == pytest.approx(ndcg10(of_group))
        assert got.by_history_length[protocol]["200+"][system] == {"num_users": 0}
    for system in ("BERT4Rec", "ease"):  # the others have ties, which any ten may break
        recommended = [item for items in best[system] for item in items]
        assert got.beyond_accuracy[system]["coverage"] == len(set(recommended)) / NUM_ITEMS
        information = [-math.log2(max(popularity[item], 1) / sum(popularity)) for item in recommended]
        assert got.beyond_accuracy[system]["novelty"] == pytest.approx(mean(information))
    assert any("uniform-100: " in note and "fewer than 100 items left to draw" in note for note in got.notes)


def test_a_blend_on_ray_is_that_of_one_process(dataset_path, checkpoint, tmp_path, monkeypatch):
    """The fit, and the choice of the weight by two workers."""
    config, found = load_config(None, ["data.holdout=2", "inference.blend={item-knn: auto}"]), []
    for name in ("ray", "here"):
        if name == "here":
            without_ray(monkeypatch)
        model = str(shutil.copytree(checkpoint, tmp_path / name))
        fit_blend.fit(Ranking.of(config.inference), config, PreparedDataset(dataset_path), model)
        found.append(stored(model))
    assert found[0] == found[1]
    assert found[0]["weight"]["num_users"] > 0


@pytest.mark.usefixtures("local_parts")
def test_a_result_names_what_was_measured(dataset_path, checkpoint):
    got = evaluate(load_config(None, ["data.holdout=2", "evaluation.exclude_seen=false"]), dataset_path, checkpoint)
    assert list(got.protocols) == ["all-with-seen"]
    assert list(got.protocols["all-with-seen"]) == ["BERT4Rec", "popularity"]
    assert got.fingerprint == PreparedDataset(dataset_path).manifest.fingerprint
    assert (got.split, got.data["holdout"], got.data["split"], got.data["cutoffs"]) == ("test", 2, "leave-one-out", {})
    assert got.beyond_accuracy["popularity"]["coverage"] == 10 / NUM_ITEMS  # the same ten for all, as they may be seen


@pytest.mark.usefixtures("local_parts")
def test_baselines_that_cannot_be_had_are_named(tmp_path, checkpoint):
    path = write_dataset(tmp_path / "d", HISTORIES, NUM_ITEMS)
    config = load_config(None, ["data.holdout=2", *ALL, "evaluation.max_baseline_items=119"])
    got = evaluate(config, path, checkpoint)
    assert list(got.protocols["all"]) == ["BERT4Rec", "popularity", "item-knn"]
    assert got.notes[:2] == [
        "baseline popularity-7-days left out: the data has no column time",
        "baseline ease left out: 120 items are more than evaluation.max_baseline_items=119",
    ]


def test_a_model_that_knows_the_future_is_refused(dataset_path, checkpoint, model, tmp_path):
    temporal = load_config(None, ["data.split=temporal"])
    with pytest.raises(InputError, match=r"trained on interactions at any time.*test cut-off 1003"):
        evaluate(temporal, dataset_path, checkpoint)
    model.trained_before, model.held_out = 1004, 0
    model.save_pretrained(str(tmp_path / "m"))
    model.trained_before, model.held_out = None, 2
    with pytest.raises(InputError, match=r"trained on interactions until 1004"):
        evaluate(temporal, dataset_path, str(tmp_path / "m"))
    with pytest.raises(InputError, match=r"last 0 items of each user held out"):
        evaluate(load_config(None, ["data.holdout=2"]), dataset_path, str(tmp_path / "m"))


@pytest.mark.usefixtures("local_training", "local_parts")
def test_a_model_trained_on_a_temporal_split_is_validated_as_it_is_evaluated(dataset_path, tmp_path):
    options = [
        "data.split=temporal",
        "evaluation.split=validation",
        "model.hidden_units=8",
        "model.num_heads=2",
        "model.max_len=8",
        "training.num_epochs=1",
        f"run.storage_path={tmp_path}",
        f"data.data_dir={tmp_path}/none",
    ]
    config = load_config(None, options)
    trained = train(config, dataset_path)
    got = evaluate(config, dataset_path, trained.best_checkpoint)
    for name, value in got.protocols["all"]["BERT4Rec"].items():
        assert trained.best_metrics[f"val_{name}"] == pytest.approx(value)
    before = [BEFORE["validation"], BEFORE["test"]]
    assert got.num_users == sum(low >= 3 and high > low for low, high in zip(*before, strict=True))
    nobody = load_config(None, [*options, "data.min_interactions=30", f"run.storage_path={tmp_path / 'other'}"])
    with pytest.raises(InputError, match=r"none of 600 users has data\.min_interactions=30"):
        train(nobody, dataset_path)


@pytest.mark.usefixtures("local_training", "local_parts")
def test_validation_in_training_obeys_the_lists_of_users(dataset_path, tmp_path):
    rng = np.random.default_rng(2)
    rows = [f"{user},{item}\n" for user in HISTORIES for item in 101 + rng.permutation(NUM_ITEMS)[:60]]
    (tmp_path / "lists.csv").write_text("user,item\n" + "".join(rows))
    small = ["model.hidden_units=8", "model.num_heads=2", "model.max_len=8", "training.num_epochs=1", "data.holdout=2"]
    paths = [f"run.storage_path={tmp_path}", f"data.data_dir={tmp_path}/none"]
    lists = ["evaluation.candidates=true", f"inference.candidates={tmp_path}/lists.csv"]
    config = load_config(None, [*small, *paths, *lists, "evaluation.split=validation"])
    trained = train(config, dataset_path)
    got = evaluate(config, dataset_path, trained.best_checkpoint)
    assert got.num_excluded_targets > got.num_users / 4
    for name, value in got.protocols["all"]["BERT4Rec"].items():
        assert trained.best_metrics[f"val_{name}"] == pytest.approx(value)
