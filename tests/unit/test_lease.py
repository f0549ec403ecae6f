"""Who holds a directory: on a local disk, and on a store that cannot create a file only once."""

import json
import os
import signal
import threading
import time

import fsspec
import pyarrow.fs as pafs
import pytest

from bert4rec import lease, storage
from bert4rec.errors import InputError
from tests.helpers.leases import assert_taken_over_from_a_killed_holder

pytestmark = pytest.mark.unit

PATIENCE = 0.6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 0.05)
    monkeypatch.setattr(lease, "PATIENCE", PATIENCE)
    monkeypatch.setattr(lease, "SETTLING", 0.04)


@pytest.fixture(params=["disk", "store"])
def directory(request, tmp_path, monkeypatch):
    """On a disk, and on a store in memory that pyarrow uses as it uses object stores."""
    if request.param == "disk":
        return str(tmp_path / "run")
    store = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
    monkeypatch.setattr(storage, "open_store", lambda path: (store, path.removeprefix("mem:/")))
    return f"mem:/{tmp_path}/run"


def holder(directory, **changes):
    """What a job wrote that ran on another machine."""
    content = {"id": "x", "host": "there", "machine": "there", "pid": 7, "started": "1", "since": "noon", "renewals": 3}
    storage.write_json(f"{directory}/{lease.HOLDER}", content | changes)


def holds(directory):
    return storage.read_json(f"{directory}/{lease.HOLDER}")


def test_a_second_job_is_told_who_holds_it(directory):
    with lease.held(directory):
        mine = holds(directory)
        with pytest.raises(InputError) as told, lease.held(directory):
            pass
        assert str(told.value) == (
            f"{directory}: in use by another job (host {os.uname().nodename}, pid {os.getpid()}, since {mine['since']})"
        )
        assert holds(directory)["id"] == mine["id"]
        with lease.held(directory, "other.json"):
            pass
    assert not storage.exists(f"{directory}/{lease.HOLDER}")
    with lease.held(directory):
        pass


def test_only_one_of_many_holds_it_at_a_time(directory):
    inside, most, times, errors = [], [], [], []

    def work():
        for _ in range(4):
            try:
                with lease.held(directory):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.02)
                    inside.pop()
                    times.append(1)
            except InputError as error:
                errors.append(str(error))
                time.sleep(0.03)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(times) + len(errors) == 24
    assert all("in use by another job" in error for error in errors)


def test_a_killed_holder_needs_nobody_to_clean_up(tmp_path):
    assert_taken_over_from_a_killed_holder(str(tmp_path / "run"))


def test_a_process_that_got_a_dead_holders_id_is_not_the_holder(directory):
    holder(directory, machine=lease._machine(), pid=os.getpid(), started="1")
    with lease.held(directory):
        pass


def test_a_holder_elsewhere_is_dead_once_it_gives_no_sign(directory, capsys):
    holder(directory)
    began = time.monotonic()
    with lease.held(directory):
        assert time.monotonic() - began > PATIENCE
        assert holds(directory)["pid"] == os.getpid()
    assert "waiting for a sign of life of another job (host there, pid 7, since noon)" in capsys.readouterr().out


def test_a_holder_elsewhere_that_gives_a_sign_is_alive(directory):
    holder(directory)
    sign = threading.Timer(0.1, holder, [directory], {"renewals": 4})
    sign.start()
    with pytest.raises(InputError, match="in use by another job"), lease.held(directory):
        pass
    sign.join()
    assert holds(directory)["renewals"] == 4


def test_a_file_that_was_never_whole_holds_nothing(directory):
    storage.write_bytes(f"{directory}/{lease.HOLDER}", b'{"id": ')
    with lease.held(directory):
        assert holds(directory)["pid"] == os.getpid()


def test_a_slow_writer_finds_that_its_look_was_outdated(directory, monkeypatch):
    """It saw a dead holder, was held up, and wrote over the file of a job that had taken over meanwhile."""
    with lease.held(directory):
        mine = holds(directory)
        real, looks = lease._is_dead, []

        def dead_at_first(*arguments):
            looks.append(1)
            return len(looks) == 1 or real(*arguments)

        def slow(path, content, write=storage.write_json):
            time.sleep(0.1 if content["id"] != mine["id"] else 0)
            write(path, content)

        monkeypatch.setattr(lease, "_is_dead", dead_at_first)
        monkeypatch.setattr(storage, "write_json", slow)
        with pytest.raises(InputError, match="in use by another job"), lease.held(directory):
            pass
        assert len(looks) == 2
        assert holds(directory)["id"] == mine["id"]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_job_that_slept_too_long_ends_when_another_has_it(directory, handler, monkeypatch):
    """Also one that a shell script started with &, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, handler)

    def sleep_too_long():
        now = lease._clock()
        monkeypatch.setattr(lease, "_clock", lambda: now + 1000)
        holder(directory)
        time.sleep(60)

    with (
        pytest.raises(InputError, match=r"took it over \(host there, .* did not run for 1000 s"),
        lease.held(directory),
    ):
        sleep_too_long()
    assert signal.signal(signal.SIGINT, before) is handler
    assert holds(directory)["id"] == "x"


def test_a_thread_may_hold_it_where_ctrl_c_is_ignored(directory):
    """Only the main thread may change what a signal does."""
    held = []

    def hold():
        with lease.held(directory):
            held.append(holds(directory)["pid"])

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert held == [os.getpid()]


def test_ctrl_c_gives_it_back(directory):
    with pytest.raises(KeyboardInterrupt), lease.held(directory):
        raise KeyboardInterrupt
    assert not storage.exists(f"{directory}/{lease.HOLDER}")


def test_the_file_is_for_people_too(tmp_path):
    with lease.held(str(tmp_path)):
        content = json.loads((tmp_path / lease.HOLDER).read_text())
    assert content["since"].endswith(" UTC")
    assert content["started"] != ""
