"""Every option of the prepared dataset has its effect; Ray's tasks run in this process."""

import sys

import pytest

from bert4rec.config import DATASET_KEYS, DataConfig, data_identity
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import prepare
from tests.helpers.in_process import LocalRay

pytestmark = pytest.mark.unit

OTHER = {
    "columns": ({"item": "other"}, {}),
    "delimiter": (";", {"columns": {"user": "1", "item": "2"}, "header": False, "data_file": "both.csv"}),
    "header": (False, {"columns": {"user": "1", "item": "2", "time": "3"}, "data_file": "numbers.csv"}),
    "time_unit": ("ms", {}),
    "list_separator": ("&", {}),
    "include_new_items": (True, {}),
    "min_item_interactions": (3, {}),
    "split": ("temporal", {}),
    "split_time": (0.5, {"split": "temporal"}),
}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[prepare.__module__], "ray", LocalRay())
    rows = [f"{user},{item},{10**9 + 1000 * user + item}" for user in range(1, 12) for item in range(1, user + 1)]
    (tmp_path / "train_ratings.csv").write_text(
        "\n".join(["user,item,time,other", *(f"{row},7" for row in rows)]) + "\n"
    )
    (tmp_path / "both.csv").write_text("1,3;7\n9;7,3\n9;8,7\n")
    (tmp_path / "numbers.csv").write_text("\n".join(["1,2,3", *rows]) + "\n")
    (tmp_path / "titles.tsv").write_text("item\ttitle\n3\tThird\n7\tSeventh\n77\tNew\n")
    (tmp_path / "genres.tsv").write_text("item\tgenre\n7\tA|B&C&D\n")
    return str(tmp_path)


def content(path):
    manifest = PreparedDataset(path).manifest
    return manifest.sha256, manifest.cutoffs


def test_every_option_is_here():
    assert set(OTHER) == set(DATASET_KEYS)


@pytest.mark.parametrize("key", DATASET_KEYS)
def test_an_option_changes_the_dataset_and_its_fingerprint(key, data_dir, tmp_path):
    value, beside = OTHER[key]
    base, other = DataConfig(data_dir=data_dir, **beside), DataConfig(data_dir=data_dir, **beside, **{key: value})
    first, second = (prepare(data, str(tmp_path / f"out-{number}")) for number, data in enumerate((base, other)))
    assert content(str(tmp_path / "out-0")) != content(str(tmp_path / "out-1"))
    assert first.fingerprint != second.fingerprint
    assert second.identity == data_identity(other)


@pytest.mark.parametrize("key", DATASET_KEYS)
def test_the_same_options_are_up_to_date_and_others_are_not(key, data_dir, tmp_path):
    value, beside = OTHER[key]
    base, other = DataConfig(data_dir=data_dir, **beside), DataConfig(data_dir=data_dir, **beside, **{key: value})
    lines = []
    for data in (base, base, other, other):
        said = []
        prepare(data, str(tmp_path / "out"), said.append)
        lines.append(said[0].startswith("up to date"))
    assert lines == [False, True, False, True]
