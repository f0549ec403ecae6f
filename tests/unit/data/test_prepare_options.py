"""Every option of the prepared dataset has its effect; Ray Data's part runs in this process."""

import pytest

from bert4rec.config import DATASET_KEYS, DataConfig, data_identity, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import prepare
from bert4rec.errors import InputError

pytestmark = pytest.mark.unit

OTHER = {
    "columns": ({"item": "other"}, {}),
    "delimiter": (";", {"columns": {"user": "1", "item": "2"}, "header": False, "data_file": "both.csv"}),
    "header": (False, {"columns": {"user": "1", "item": "2", "time": "3"}, "data_file": "numbers.csv"}),
    "time_unit": ("ms", {}),
    "list_separator": ("&", {}),
    "include_new_items": (True, {}),
    "min_item_interactions": (3, {}),
    "since": (10**9 + 3000, {}),
    "split": ("temporal", {}),
    "split_time": (0.5, {"split": "temporal"}),
    "until": (10**9 + 8000, {}),
}


@pytest.fixture
def data_dir(tmp_path, local_ray_data):
    rows = [f"{user},{item},{10**9 + 1000 * user + item}" for user in range(1, 12) for item in range(1, user + 1)]
    (tmp_path / "train_ratings.csv").write_text(
        "\n".join(["other,user,item,time", *(f"7,{row}" for row in rows)]) + "\n"
    )
    (tmp_path / "both.csv").write_text("1,3;7\n9;7,3\n9;8,7\n")
    (tmp_path / "numbers.csv").write_text("\n".join(["1,2,3", *rows]) + "\n")
    (tmp_path / "titles.tsv").write_text("item\ttitle\n3\tThird\n7\tSeventh\n77\tNew\n")
    (tmp_path / "genres.tsv").write_text("item\tgenre\n7\tA|B&C&D\n")
    return str(tmp_path)


def content(path):
    manifest = PreparedDataset(path).manifest
    return sorted(manifest.sha256.values()), manifest.cutoffs  # the names of the files have the options in them


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


def test_a_part_of_the_log_is_prepared_like_a_file_of_that_part(data_dir, tmp_path):
    """Since is kept, until is not. Items and users that have nothing else disappear."""
    since, until = 10**9 + 3002, 10**9 + 8005
    data = DataConfig(data_dir=data_dir, since=since, until=until, min_item_interactions=2)
    part = prepare(data, str(tmp_path / "part"))
    rows = (tmp_path / "train_ratings.csv").read_text().splitlines()
    kept = [row for row in rows[1:] if since <= int(row.rpartition(",")[2]) < until]
    (tmp_path / "train_ratings.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    whole = prepare(data.model_copy(update={"since": None, "until": None}), str(tmp_path / "whole"))
    assert sorted(part.sha256.values()) == sorted(whole.sha256.values())
    assert part.num_outside == len(rows) - 1 - len(kept) == 38
    assert f"interactions before data.since or from data.until on left out: {part.num_outside}" in part.notes
    of_core = ("num_users", "num_interactions", "num_core_items", "num_core_users", "num_core_interactions", "cutoffs")
    assert part.model_dump(include=set(of_core)) == whole.model_dump(include=set(of_core))
    assert part.num_duplicates == 0


def test_a_part_that_cannot_be_is_one_message(data_dir, tmp_path):
    with pytest.raises(
        InputError, match=r"data\.since=1577836800 .* leave no interaction; the times run from 2001-09-09T02:03:21Z"
    ):
        prepare(DataConfig(data_dir=data_dir, since="2020-01-01"), str(tmp_path / "out"))
    (tmp_path / "train_ratings.csv").write_text("user,item\n1,2\n")
    with pytest.raises(InputError, match=r"no column time, which data\.since and data\.until need"):
        prepare(DataConfig(data_dir=data_dir, until="2020-01-01"), str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"data\.since=1577836800 is not before data\.until=1577836800"):
        load_config(None, ["data.since=2020-01-01", "data.until=2020-01-01"])
