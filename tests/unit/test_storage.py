import os

import numpy as np
import pytest
import torch

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset, Sequences
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.model.average import checkpoint_and_output
from bert4rec.model.batches import last_items
from tests.helpers.datasets import random_histories, random_times, write_dataset

pytestmark = pytest.mark.unit


def test_a_directory_is_whole_only_after_commit(tmp_path):
    path = str(tmp_path / "d")
    storage.write_bytes(f"{path}/a/b", b"1")
    storage.write_bytes(f"{path}/c", b"1")
    assert not storage.is_complete(path)
    storage.commit(path, {"a": 1})
    assert storage.is_complete(path)
    assert storage.read_sealed(f"{path}/manifest.json") == {"a": 1}
    storage.remove_all_but(path, {"manifest.json", "c"})
    assert sorted(os.listdir(path)) == ["c", "manifest.json"]


def test_what_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "d"))
    with pytest.raises(InputError, match="no filesystem"):
        storage.open_store("ftpx://a/b")


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: not valid JSON"):
        storage.read_json(str(tmp_path / "a.json"))
    with pytest.raises(InputError, match="no such file"):
        storage.read_json(str(tmp_path / "b.json"))


def test_fingerprint_ignores_the_order_of_keys():
    assert storage.fingerprint({"a": 1, "b": [2]}) == storage.fingerprint({"b": [2], "a": 1})
    assert storage.fingerprint({"a": 1}) != storage.fingerprint({"a": 2})


def test_dataset_round_trip_and_parts(tmp_path):
    histories = random_histories(1300, 30)
    times = random_times(histories)
    dataset = PreparedDataset(write_dataset(tmp_path / "d", histories, 30, times=times))
    whole = dataset.sequences(with_times=True)
    assert [whole.items[whole.offsets[n] : whole.offsets[n + 1]].tolist() for n in range(len(whole))] == [
        histories[user] for user in sorted(histories)
    ]
    parts = dataset.parts()
    assert [(part.low, part.high) for part in parts] == [(0, 512), (512, 1024), (1024, 1300)]
    read = [dataset.read_part(part) for part in parts]
    assert [user for part in read for user in part.users.to_pylist()] == whole.users.to_pylist()
    assert [item for part in read for item in part.items.tolist()] == whole.items.tolist()
    assert [part.times for part in read] == [None] * 3
    assert whole.times.tolist() == [time for user in sorted(histories) for time in times[user]]
    of_parts = [dataset.read_part(part, with_times=True).times.tolist() for part in parts]
    assert [time for part in of_parts for time in part] == whole.times.tolist()
    assert dataset.time_span() == (whole.times.min(), whole.times.max())
    assert dataset.sequences().times is None
    assert isinstance(read[0], Sequences)
    assert read[1].lengths.tolist() == whole.lengths[512:1024].tolist()


def test_sequences_beyond_the_memory_are_mapped_from_disk(tmp_path):
    histories = {user: [user % 7 + 1] * 300 for user in range(1000)}  # 1.2 MB
    times = {user: list(range(user, user + 300)) for user in histories}
    dataset = PreparedDataset(write_dataset(tmp_path / "d", histories, 7, times=times))
    assert not isinstance(dataset.sequences(memory_mb=2).items, np.memmap)
    assert isinstance(dataset.sequences(memory_mb=2, with_times=True).items, np.memmap)  # 3.6 MB
    inside, outside = dataset.sequences(with_times=True), dataset.sequences(memory_mb=1, with_times=True)
    assert isinstance(outside.items, np.memmap)
    assert isinstance(outside.times, np.memmap)
    assert np.array_equal(inside.times, outside.times)
    assert not isinstance(inside.items, np.memmap)
    assert np.array_equal(inside.items, outside.items)
    windows = Windows.from_sequences(outside).without_last(1)
    assert windows.items.data_ptr() == outside.items.ctypes.data  # no copy
    assert last_items(windows.users(torch.tensor([3, 999])), 2).tolist() == [[4, 4], [6, 6]]


def test_a_damaged_dataset_is_refused(tmp_path):
    path = write_dataset(tmp_path / "d", {1: [1, 2, 3]}, 3)
    with open(tmp_path / "d" / "items.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"items\.parquet: has \d+ bytes, expected \d+"):
        PreparedDataset(path)
    whole = (tmp_path / "d" / "items.parquet").read_bytes()[:-1]
    (tmp_path / "d" / "items.parquet").write_bytes(whole)
    PreparedDataset(path, verify=True)
    for name in ("items.parquet", "sequences/part-00000.parquet"):
        content = (tmp_path / "d" / name).read_bytes()
        position = len(content) // 2
        (tmp_path / "d" / name).write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        with pytest.raises(InputError, match=rf"{name}: its content is not what was written \(SHA-256\)"):
            PreparedDataset(path, verify=True)
        (tmp_path / "d" / name).write_bytes(content)
    PreparedDataset(path, verify=True)
    (tmp_path / "d" / "items.parquet").unlink()
    with pytest.raises(InputError, match=r"items\.parquet: is missing"):
        PreparedDataset(path)
    (tmp_path / "d" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no prepared dataset.*jobs\.prepare"):
        PreparedDataset(path)


def test_an_altered_manifest_is_named(tmp_path):
    path = write_dataset(tmp_path / "d", {1: [1, 2, 3]}, 3)
    manifest = tmp_path / "d" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_users": 1', '"num_users": 2'))
    with pytest.raises(InputError, match=r"manifest\.json: was altered or is damaged"):
        PreparedDataset(path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sequences/../../secret", "s3://b/a", "..", "a//b", "a\\..\\b"]
)
def test_a_manifest_never_leads_out_of_its_folder(tmp_path, name):
    """Even one whose checksum is right."""
    path = write_dataset(tmp_path / "d", {1: [1, 2, 3]}, 3)
    (tmp_path / "secret").write_text("secret")
    manifest = storage.read_sealed(f"{path}/manifest.json")
    storage.commit(path, manifest | {"files": manifest["files"] | {name: 6}})
    with pytest.raises(InputError, match="which is not in this directory"):
        PreparedDataset(path)
    run = tmp_path / "runs" / "r"
    storage.write_json(str(run / "run.json"), {"best_checkpoint": name})
    with pytest.raises(InputError, match="which is not in this directory"):
        checkpoint_and_output(load_config(None, [f"run.storage_path={tmp_path}/runs", "run.name=r"]))


# Object stores that do not answer for a while

BUSY = "AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."


def test_a_store_that_is_busy_is_asked_again_but_not_for_ever(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    @storage.patient
    def read(name, error, times):
        """Fail so many times."""
        asked.append(now[0])
        if len(asked) <= times:
            raise OSError(error)
        return f"content of {name}"

    assert read("a", BUSY, times=3) == "content of a"
    assert asked == pytest.approx([0, 0.1, 0.3, 0.7])
    asked.clear()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        read("a", BUSY, times=1000)
    assert 25 < asked[-1] - asked[0] <= 30
    asked.clear()
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        read("a", "AWS Error ACCESS_DENIED during GetObject operation", times=1000)
    assert len(asked) == 1


def test_a_listing_that_lags_is_waited_for_and_one_that_never_comes_is_told(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    (tmp_path / "stale").touch()
    monkeypatch.setattr(storage, "_SECONDS_TO_LIST", 1.0)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: (tmp_path / "stale").rename(tmp_path / "b"))
    storage.wait_until_listed(str(tmp_path), ["a", "b"])
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match=r"shows other files than were written \(b, c\); its listing lags, or another"):
        storage.wait_until_listed(str(tmp_path), ["a", "c"])


def test_a_file_that_was_replaced_while_it_was_read_is_read_again(monkeypatch):
    """On an object store, the first read has the length of the old file and the content of the new one."""
    content = [b'{"renewals": 1', b'{"renewals": 10}']
    monkeypatch.setattr(storage, "read_bytes", lambda path: content.pop(0))
    assert storage.read_json("s3://bucket/holder.json") == {"renewals": 10}
    content[:] = [b'{"renewals": 1', b'{"renewals": 1']
    with pytest.raises(InputError, match="not valid JSON"):
        storage.read_json("s3://bucket/holder.json")
