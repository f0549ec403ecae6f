"""What a training takes of a cluster, for clusters and control groups that are made up here."""

import os
import socket
import sys
import time
from concurrent import futures
from types import SimpleNamespace

import grpc
import pytest
import ray
from ray._private.utils import validate_socket_filepath

from bert4rec.cluster import resources
from bert4rec.config import load_config
from bert4rec.errors import InputError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("nodes", "overrides", "expected"),
    [
        ([(2, 0)], [], (False, 2, 1)),  # a worker a core
        ([(2, 0)], ["data.batch_size=15"], (False, 1, 2)),  # each has 8 users or more
        ([(16, 0)], ["data.batch_size=32"], (False, 4, 4)),
        ([(4, 0), (4, 0)], [], (False, 8, 1)),
        ([(8, 0)], ["training.cpus_per_worker=3"], (False, 2, 3)),
        ([(8, 0)], ["training.num_workers=1"], (False, 1, 8)),
        ([(8, 2)], [], (True, 2, 4)),  # a worker a GPU
        ([(8, 2), (8, 2)], ["training.num_workers=3"], (True, 3, 4)),
        ([(8, 2)], ["training.num_workers=3"], (False, 3, 2)),  # not enough GPUs for all
        ([(8, 2)], ["training.accelerator=cpu"], (False, 8, 1)),
        ([(8, 1), (8, 0)], ["data.batch_size=8"], (True, 1, 4)),
    ],
)
def test_the_workers_of_a_training(monkeypatch, nodes, overrides, expected):
    monkeypatch.setattr(resources, "_nodes", lambda: nodes)
    assert resources.for_training(load_config(None, overrides)) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.num_workers=3"], r"num_workers=3 workers of 1 CPU cores each do not fit.*2 CPU cores, 0 GPUs"),
        (["training.cpus_per_worker=3"], r"num_workers=1 workers of 3 CPU cores each do not fit"),
        (["training.accelerator=gpu"], r"num_workers=1 workers of 1 CPU cores and a GPU each do not fit"),
    ],
)
def test_what_does_not_fit_is_one_message(monkeypatch, capsys, overrides, message):
    monkeypatch.setattr(resources, "_nodes", lambda: [(2, 0)])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=message):
        resources.for_training(load_config(None, overrides))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster may grow
    resources.for_training(load_config(None, overrides))
    assert "waiting for it to grow" in capsys.readouterr().out


def test_a_sweep_has_room_for_a_worker_a_core(monkeypatch):
    monkeypatch.setattr(resources, "_nodes", lambda: [(8, 0)])
    assert resources.most_at_once(load_config(None, ["training.num_workers=1"])) == 8
    assert resources.most_at_once(load_config(None, ["training.num_workers=1", "training.cpus_per_worker=3"])) == 2


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_quotas_of_a_control_group_and_of_those_around_it(tmp_path):
    assert resources._quotas(tmp_path, "a/b") == []
    write(tmp_path / "a" / "b" / "cpu.max", "max 100000\n")
    write(tmp_path / "a" / "cpu.max", "150000 100000\n")
    write(tmp_path / "cpu.max", "400000 100000\n")
    write(tmp_path.parent / "cpu.max", "1 100000\n")  # outside
    assert resources._quotas(tmp_path, "a/b") == [1.5, 4.0]
    assert resources._quotas(tmp_path, "") == [4.0]


def test_the_quota_of_an_older_control_group(tmp_path):
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert resources._quotas(tmp_path, "") == []
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "250000\n")
    assert resources._quotas(tmp_path, "") == [2.5]


@pytest.mark.parametrize(("quotas", "cores"), [([], 4), ([1.5], 1), ([0.5], 1), ([16.0], 4), ([16.0, 3.2], 3)])
def test_usable_cores_are_those_of_the_affinity_and_the_quota(monkeypatch, quotas, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(resources, "_quotas", lambda root, group: quotas)
    assert resources.usable_cores() == cores


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.5:8265", r"an address for `ray job submit` .*expected HOST:PORT .* such as 10\.0\.0\.5:6379"),
        ("https://ray.example.org", "an address for `ray job submit`"),
        ("ray://10.0.0.5:10001", "must run in the cluster, not behind Ray Client; submit it"),
        ("localhost", "not an address; expected HOST:PORT"),
        ("localhost:", "not an address; expected HOST:PORT"),
        (":6379", "not an address; expected HOST:PORT"),
        ("localhost:6379/", "not an address; expected HOST:PORT"),
        ("localhost:99999", "not an address; expected HOST:PORT"),
        ("localhost:0", "not an address; expected HOST:PORT"),
        ("no host.invalid:6379", r"no Ray cluster answers there \(.*; expected HOST:PORT"),
    ],
)
def test_an_address_that_jobs_cannot_take_is_one_line(address, message):
    with pytest.raises(InputError, match=rf"^RAY_ADDRESS={address}: .*{message}") as told:
        resources._check_answers(address)
    assert "\n" not in str(told.value)


def test_a_cluster_that_is_gone_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(
        InputError, match=rf"^RAY_ADDRESS={address}: no Ray cluster answers there \(Connection refused\)"
    ):
        resources._check_answers(address)


@pytest.mark.parametrize(("backlog", "problem"), [(5, "does not answer as a head does"), (0, "timed out")])
def test_what_takes_connections_and_says_nothing_is_no_cluster(monkeypatch, backlog, problem):
    monkeypatch.setattr(resources, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent, futures.ThreadPoolExecutor() as others:
        silent.bind(("127.0.0.1", 0))
        silent.listen(backlog)
        address = silent.getsockname()
        if not backlog:  # so that it takes no more
            filling = [others.submit(socket.create_connection, address, 0.2) for _ in range(8)]
            time.sleep(0.1)
        with pytest.raises(InputError, match=problem):
            resources._check_answers(f"127.0.0.1:{address[1]}")
        for each in filling if not backlog else ():
            if each.exception() is None:
                each.result().close()


def test_a_head_answers():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        resources._check_answers(f"127.0.0.1:{port}")
        resources._check_answers(f"localhost:{port}")
    finally:
        server.stop(None)


def test_a_home_that_cannot_be_written_keeps_no_token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resources._keeps_tokens()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert not resources._keeps_tokens()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user whom nobody knows
    assert not resources._keeps_tokens()
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secrets/token")
    assert resources._keeps_tokens()


@pytest.mark.parametrize(
    ("python", "given"),
    [
        ("/usr/bin/python3", {}),
        ("/my env #1/bin/python", {"runtime_env": {"py_executable": "'/my env #1/bin/python'"}}),
    ],
)
def test_an_environment_with_blanks_in_its_path_is_quoted_for_ray(monkeypatch, python, given):
    started = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    resources._start_ray()
    assert {key: value for key, value in started.items() if key == "runtime_env"} == given


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    def never(**_):
        raise Exception("The current node timed out during startup. This could happen because …")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", never)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(TimeoutError, match="Ray did not start within its 30 s: the machine is too busy"):
        resources._start_ray()


def test_a_long_tmpdir_is_named(tmp_path, monkeypatch):
    long = f"{tmp_path}/{'long' * 30}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", long)
    monkeypatch.setattr(ray, "init", lambda **_: validate_socket_filepath(f"{long}/ray/session/sockets/raylet"))
    with pytest.raises(InputError, match=rf"^TMPDIR={long}: too long for Ray.*; set RAY_TMPDIR=/tmp$"):
        resources._start_ray()


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(resources, "ANSWER_SECONDS", 0.1)

    def look_up(*_):
        time.sleep(0.5)
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", look_up)
    with pytest.raises(InputError, match=r"head\.example\.org is not found in 0\.2 s"):
        resources._check_answers("head.example.org:6379")


@pytest.mark.parametrize("says_so", [True, False])
def test_places_of_dead_trainings_are_released(monkeypatch, says_so):
    """Ray registers a group after the death of its actor now and then, and the group never says that it is dead."""
    actors = {name: bytes([number]) * 12 + b"\1\0\0\0" for number, name in enumerate(("alive", "dead", "unknown"), 1)}
    actors["driver"] = resources.ActorID.nil().binary()
    Group, Actor = resources.PlacementGroupTableData, resources.ActorTableData  # noqa: N806
    groups = {
        name: Group(
            placement_group_id=bytes([number]) * 14 + b"\1\0\0\0",
            creator_job_id=bytes.fromhex("02000000" if name == "another job" else "01000000"),
            creator_actor_id=actors.get(name, actors["dead"]),
            creator_actor_dead=says_so and name not in ("alive", "driver"),
            state=Group.REMOVED if name == "removed" else Group.CREATED,
        )
        for number, name in enumerate((*actors, "another job", "removed"))
    }

    class State:
        def get_placement_group_table(self):
            return [group.SerializeToString() for group in groups.values()]

        def get_actor_info(self, actor):
            states = {actors["alive"]: Actor.ALIVE, actors["dead"]: Actor.DEAD}
            if actor.binary() not in states:
                return None
            return Actor(actor_id=actor.binary(), state=states[actor.binary()]).SerializeToString()

    removed = []
    monkeypatch.setattr(ray._private.state.state, "_connect_and_get_accessor", State)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01000000"))
    monkeypatch.setattr(resources, "remove_placement_group", lambda group: removed.append(group.id.binary()))
    resources._release_abandoned()
    assert removed == [groups[name].placement_group_id for name in ("dead", "unknown")]
