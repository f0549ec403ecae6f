import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml

from bert4rec import storage
from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.inference import recommend
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender
from bert4rec.report import effects, page
from jobs.report import report_run
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import without_ray
from tests.unit.model.test_network import NUM_ITEMS, make_model
from tests.unit.report.test_page import RUN, read_block

pytestmark = pytest.mark.unit

HISTORIES = random_histories(30, NUM_ITEMS, seed=3, longest=9)


def test_an_effect_by_hand():
    before = {1: [(7, 3.0), (8, 2.0), (9, 1.0)], 2: [(5, 1.0)], 3: [(4, 2.0), (6, 1.0)]}
    after = {1: [(9, 1.0), (7, 3.0), (2, 0.5)], 2: [(5, 1.0)], 3: []}
    # user 1: 8 left, 2 came, 7 moved by 1 and 9 by 2; user 2 as before; user 3: 4 and 6 left
    assert effects._effect("rule", before, after) == effects.Effect("rule", 2, 3, 1, pytest.approx((1 + 2 + 0) / 3))
    assert effects._effect("rule", {1: []}, {1: []}) == effects.Effect("rule", 0, 0, 0, 0.0)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "prepared").mkdir()
    genres = [[token % 3] for token in range(NUM_ITEMS)]
    return PreparedDataset(write_dataset(tmp_path / "prepared" / "d", HISTORIES, NUM_ITEMS, genres=genres))


def test_each_rule_alone_and_all_together(dataset):
    recommender = Recommender(make_model(), dataset.items())
    inference = InferenceConfig(topk=5)
    ranking = Ranking(max_per={"genre": 1}, min_score=-100, diversity=0.5, popularity_discount=0)
    found = effects.effects_of(recommender, dataset, inference, ranking, np.array([0, 3, 29]))
    assert found.num_users == 3
    assert set(found.before) == {1, 4, 30}
    assert [each.rule for each in found.rules] == [
        "inference.max_per",
        "inference.diversity",
        "inference.min_score",
        "all together",
    ]
    caps, _, low, _ = found.rules
    assert caps.num_taken - caps.num_added == 3 * 5 - 3 * 3  # three genres, one item of each
    assert (low.num_users, low.num_taken, low.moved) == (0, 0, 0.0)


def test_the_report_shows_what_rules_changed(dataset, tmp_path, monkeypatch):
    """From the results of the batch job; in a run that was moved, and with a list that was edited since."""
    without_ray(monkeypatch, recommend)
    lists = tmp_path / "list.csv"
    lists.write_text("user,item\n" + "".join(f"{user},{101 + user % 5}\n" for user in range(1, 20)))
    run = tmp_path / "run"
    settings = ["inference.topk=4", f"inference.exclude={lists}", "inference.max_per={genre: 1}"]
    config = load_config(None, settings)
    model = make_model()
    model.catalogue = "test"
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    model.save_pretrained(str(run / "m"))
    (run / "config.yaml").write_text(yaml.safe_dump(load_config().model_dump(mode="json")))
    (run / "identity.json").write_text(json.dumps({"dataset": dataset.manifest.fingerprint}))
    (run / "run.json").write_text(json.dumps(RUN))
    recommend.recommend(config, dataset.path, str(run / "m"), str(run / "recommendations"))
    run = run.rename(tmp_path / "moved")

    text = (report_run(str(run), dataset.path), (run / "report.html").read_text())[1]
    assert "What the rules change" in text
    assert "inference.max_per={&#34;genre&#34;: 1}" in text
    assert "<td>inference.exclude</td>" in text
    assert "<td>all together</td>" in text
    assert "Without the rules" in text
    users = read_block(text, "browser")["users"]
    assert all(len(user["before"]) == 4 and len(user["top"]) <= 3 for user in users)

    lists.write_text("user,item\n1,101\n")
    text = (report_run(str(run), dataset.path), (run / "report.html").read_text())[1]
    assert "What the rules change is not shown: the files of inference.exclude have changed since." in text
    assert "Without the rules" not in text
    storage.remove(str(lists))
    assert "is not shown" in (report_run(str(run), dataset.path), (run / "report.html").read_text())[1]


def test_without_rules_there_is_no_section():
    assert page._rules_section(InferenceConfig().model_dump(), None) == []


def test_every_rule_is_told_of_somewhere():
    told = [key for keys in effects.RULES.values() for key in keys]
    assert sorted([*told, *effects._ELSEWHERE]) == sorted(rule.name for rule in dataclasses.fields(Ranking))
