"""A dataset that is replaced while others read it; Ray Data's part runs in this process."""

import os
import sys

import pytest

from bert4rec import lease, storage
from bert4rec.config import DataConfig
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import prepare
from bert4rec.errors import InputError
from tests.helpers.datasets import write_dataset

pytestmark = pytest.mark.unit


@pytest.fixture
def version(tmp_path, local_ray_data, monkeypatch):
    """Writes the dataset anew from input of `num_users` users."""
    monkeypatch.setattr(sys.modules[prepare.__module__], "RANGE_ROWS", 20)
    monkeypatch.setattr(sys.modules[prepare.__module__], "_SHARD_ROWS", 1)

    def write(num_users):
        rows = [f"{user},{item}" for user in range(1, num_users + 1) for item in range(1, user + 1)]
        (tmp_path / "train_ratings.csv").write_text("\n".join(["user,item", *rows]) + "\n")
        return prepare(DataConfig(data_dir=str(tmp_path)), str(tmp_path / "out"))

    return write


def test_a_replaced_dataset_is_read_whole_or_told(tmp_path, version, monkeypatch):
    path = str(tmp_path / "out")
    old = version(9)
    early, late = PreparedDataset(path), PreparedDataset(path)
    seen, commit = [], storage.commit

    def read_then_commit(*arguments):  # all new files are there, and the old dataset is as it was
        seen.append((PreparedDataset(path, verify=True).manifest, early.sequences().users.to_pylist()))
        commit(*arguments)
        seen.append((PreparedDataset(path, verify=True).manifest, early.sequences().users.to_pylist()))

    monkeypatch.setattr(storage, "commit", read_then_commit)
    new = version(12)
    assert seen == [(old, list(range(1, 10))), (new, list(range(1, 10)))]
    assert PreparedDataset(path, verify=True).sequences().users.to_pylist() == list(range(1, 13))

    for reading in (late.sequences, late.items, lambda: late.read_part(late.parts()[0])):
        with pytest.raises(InputError, match="another job has replaced or deleted the dataset; run the same command"):
            reading()
    with pytest.raises(InputError, match=f"another job has replaced this dataset .fingerprint {new.fingerprint}; this"):
        PreparedDataset(path, fingerprint=old.fingerprint)
    PreparedDataset(path, fingerprint=new.fingerprint)


def test_what_is_removed_between_manifest_and_files_is_looked_for_again(tmp_path, version, monkeypatch):
    path, check = str(tmp_path / "out"), PreparedDataset._check_files
    version(9)
    looks, newer = [], []

    def replaced_before(dataset, verify):
        looks.append(1)
        if len(looks) == 1:
            newer.append(version(12))
        check(dataset, verify)

    monkeypatch.setattr(PreparedDataset, "_check_files", replaced_before)
    assert PreparedDataset(path).manifest == newer[0]


def test_what_another_version_left_is_removed(tmp_path, version):
    """One whose manifest names files without a folder."""
    earlier = write_dataset(tmp_path / "out", {1: [1, 2]}, 2)
    assert PreparedDataset(earlier, verify=True).sequences().items.tolist() == [1, 2]
    new = version(9)
    folders = {name.partition("/")[0] for name in new.files}
    assert set(os.listdir(earlier)) == {"manifest.json", *folders}
    assert len(folders) == 1


def test_two_prepares_at_once(tmp_path, version):
    with lease.held(str(tmp_path / "out")), pytest.raises(InputError, match="out: in use by another job"):
        version(9)
    assert os.listdir(tmp_path / "out") == []
