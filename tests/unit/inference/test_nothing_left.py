"""A filter that leaves most users with nothing is told, and not only to who counts the rows."""

import pytest
import torch

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.inference import recommend
from bert4rec.report import page
from jobs import recommend as job
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import without_ray
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(30, NUM_ITEMS, seed=3, longest=20)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of 30 users, 20 have times of 1970, before all items."""
    without_ray(monkeypatch, recommend)
    settings = [
        f"run.storage_path={tmp_path}",
        f"inference.checkpoint_path={tmp_path / 'run' / 'm'}",
        "data.data_dir=/d",
    ]
    path = load_config(None, settings).prepared_path
    (tmp_path / "prepared").mkdir()
    years = [1970] * 20 + [2020] * 10
    write_dataset(tmp_path / "prepared" / path.rpartition("/")[2], HISTORIES, NUM_ITEMS, [2001] * NUM_ITEMS, years)
    model = make_model()
    model.catalogue = "test"
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    model.save_pretrained(str(tmp_path / "run" / "m"))
    return load_config(None, settings)


def test_recommend_says_it(config, capsys):
    job.recommend_all(config)
    assert "note: WARNING 20 of 30 users get no recommendation: " in capsys.readouterr().out
    job.recommend_all(config)  # what is up to date says it again
    assert "note: WARNING 20 of 30 users" in capsys.readouterr().out
    job.recommend_all(load_config(None, [*_of(config), "inference.exclude_future=false"]))
    assert "WARNING" not in capsys.readouterr().out


def _of(config):
    return [
        f"run.storage_path={config.run.storage_path}",
        f"inference.checkpoint_path={config.inference.checkpoint_path[0]}",
        "data.data_dir=/d",
    ]


@pytest.mark.parametrize(
    ("override", "is_said"), [("inference.topk=10", True), ("inference.exclude_future=false", False)]
)
def test_the_report_says_it(config, override, is_said):
    chosen = load_config(None, [*_of(config), override])
    html = page.render(chosen, PreparedDataset(config.prepared_path), "run", None, None, "none yet")
    assert ("WARNING: the filters leave nothing for 20 of 30 users." in html) == is_said
