import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml

from bert4rec import api, cli
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.training import auto
from tests.helpers.commands import ROOT
from tests.helpers.datasets import random_histories, random_times, write_dataset

pytestmark = pytest.mark.unit

DATA_SETS_OWN = {"data.data_dir", "data.holdout", "data.min_item_interactions"}
"""Keys of the configs that say which data and which split they are for."""


@pytest.mark.parametrize("fitted", auto.FITTED_ON, ids=lambda each: each.data)
def test_the_rule_gives_the_best_known_settings(fitted):
    content = yaml.safe_load((ROOT / "configs" / fitted.config).read_text())
    best = {f"{group}.{key}": value for group, keys in content.items() for key, value in keys.items()}
    found = auto.settings_of(auto.choose(fitted.facts))
    found.pop("inference.blend", None)  # which the configs leave out, so that they rank as they did
    assert found == {key: value for key, value in best.items() if key not in DATA_SETS_OWN}
    assert (ROOT / "docs" / "results" / fitted.page.partition("#")[0]).exists()


def test_a_blend_is_for_data_that_are_validated_and_not_huge():
    short = next(each.facts for each in auto.FITTED_ON if "Toys" in each.data)
    assert auto.settings_of(auto.choose(short))["inference.blend"] == {"ease": "auto"}
    assert "inference.blend" not in auto.settings_of(auto.choose(short._replace(has_validation=False)))
    long = short._replace(median=30, interactions=400_000)
    assert "inference.blend" in auto.settings_of(auto.choose(long))
    assert "inference.blend" not in auto.settings_of(auto.choose(long._replace(items=200_000)))


@pytest.mark.parametrize("items", [100, 300_000])
def test_every_choice_is_a_config(items):
    for interactions, median, longest, repeats, has_times in itertools.product(
        (100, 60_000, 400_000, 6_000_000, 60_000_000), (3, 19, 20, 500), (40, 70, 600), (0.0, 0.9), (False, True)
    ):
        facts = auto.Facts(1000, items, interactions, median, longest, repeats, has_times)
        rules = auto.choose(facts)
        assert sum("model.num_layers" in rule.settings for rule in rules) == 1
        settings = auto.settings_of(rules)
        config = load_config(None, [f"{key}={auto._written(value)}" for key, value in settings.items()])
        assert (config.training.loss == "sampled-softmax") == (items > 200_000)
        assert config.evaluation.exclude_seen == config.inference.exclude_seen == (repeats < 0.5)
        assert config.model.max_len >= min(longest, 50)
        is_long = median >= 20 and interactions >= 300_000
        assert (config.model.time_encoding != "none") == (is_long and has_times)


def test_facts_are_those_of_the_data(tmp_path, monkeypatch):
    """Three users by hand: 4, 2 and 3 items, of whom the second and the third end with an item that they had before."""
    histories = {1: [1, 2, 3, 4], 2: [5, 5], 3: [1, 2, 1]}
    times = {user: [10**9 + place for place in range(len(own))] for user, own in histories.items()}
    path = write_dataset(tmp_path / "d", histories, 5, times=times, genres=[[0]] * 5)
    expected = auto.Facts(3, 5, 9, 3, float(np.percentile([4, 2, 3], 95)), 2 / 3, True, ("genre",))
    assert auto.facts_of(PreparedDataset(path)) == expected
    assert auto.facts_of(PreparedDataset(path), use_full_data=True) == expected._replace(has_validation=False)
    assert str(expected).startswith("3 users, 5 items, 9 interactions (3 of the median user), with times, 67% of the")
    many = write_dataset(tmp_path / "many", random_histories(1500, 30), 30)
    assert len(PreparedDataset(many).parts()) == 3
    monkeypatch.setattr(auto, "MOST_USERS", 750)  # every second part
    kept = [len(own) for user, own in random_histories(1500, 30).items() if user <= 512 or user > 1024]
    assert auto.facts_of(PreparedDataset(many)).median == np.median(kept)


def test_overrides_stand_and_reasons_are_kept(tmp_path):
    dataset = PreparedDataset(write_dataset(tmp_path / "d", random_histories(60, 30), 30))
    overrides = ["model.hidden_units=8", "data.seed=3", "training.lr=0.5"]
    config, lines = auto.config_for(dataset, overrides)
    assert (config.model.hidden_units, config.data.seed, config.training.lr) == (8, 3, 0.5)
    assert (config.training.num_epochs, config.data.batch_size) == (24, 16)
    assert config.inference.blend == {"ease": "auto"}
    chosen, blend = config.run.chosen.values()
    assert blend.startswith("inference.blend={ease: auto}: ")
    assert "training.num_epochs=24" in chosen
    assert "hidden_units" not in chosen  # was given
    assert lines[0].startswith("--config auto found 60 users, 30 items,")
    assert chosen in lines[1]
    # the run's config.yaml gives the same config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("prepares", [False, True])
def test_jobs_choose_for_the_prepared_data(tmp_path, monkeypatch, capsys, prepares):
    overrides = [f"run.storage_path={tmp_path}", "data.data_dir=/d"]
    calls = []

    def prepare(config):
        calls.append(config)
        histories = random_histories(60, 30)
        if not calls[1:]:
            write_dataset(Path(config.prepared_path), histories, 30, times=random_times(histories))

    monkeypatch.setattr(api, "prepare", prepare)
    plain = cli._load("auto", overrides)
    assert plain == load_config(None, overrides)
    for _ in range(2):
        assert cli._chosen(plain, overrides, prepares).training.num_epochs == 24
    assert len(calls) == (2 if prepares else 1)
    assert "--config auto found 60 users" in capsys.readouterr().out


def test_the_page_has_the_rule():
    page = (ROOT / "docs" / "training.md").read_text()
    assert "| data | settings | why |" in page
    assert auto.with_rule(page) == page, "run `make docs`"
    assert auto.with_rule(page.replace("short histories: ", "")) == page
