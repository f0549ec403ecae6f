"""The whole pipeline, again and again, while its parts are killed: `python -m benchmarks.chaos --minutes N`.

A cluster of three nodes on this machine, with an S3 server as its storage. Each round ends with the files of an
undisturbed run, or the round is told as not survived. Each fault and each round is a line of JSON, the last line sums
up.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.fs as pafs

from bert4rec import storage
from tests.cluster.nodes import Nodes
from tests.helpers.processes import free_port, named, wait_for
from tests.helpers.s3_server import BUCKET, S3Server

_Started = TypeVar("_Started")
ROOT = Path(__file__).parents[1]
LONGEST_ROUND = 12
"""Times an undisturbed one, and ten minutes; a round that takes longer hangs."""
MOST_TRIES = 30
SETTINGS = [
    f"data.data_dir=s3://{BUCKET}/films",
    "data.batch_size=16",
    "data.holdout=2",
    "model.hidden_units=16",
    "model.num_heads=2",
    "model.max_len=20",
    "model.use_title_emb=false",
    "training.num_epochs=6",
    "training.early_stopping=false",
    "training.num_workers=2",
    "training.cpus_per_worker=1",
    "training.checkpoint_minutes=0.05",
    "training.max_failures=100",
    "inference.topk=5",
    "inference.batch_size=64",
    "run.name=run",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--faults-a-round", type=float, default=4, help="mean, in the time of an undisturbed round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--faults", nargs="+", choices=sorted(FAULTS), default=sorted(FAULTS))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with S3Server(free_port()) as server:
        gate = Gate(server.port)
        os.environ |= server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}"}
        try:
            write_data(args.users)
            with started(lambda: Nodes(head_cpus=0)) as nodes:
                run_rounds(Place(nodes, gate, rng), args)
        finally:
            gate.shut()


def run_rounds(place: "Place", args: argparse.Namespace) -> None:
    """An undisturbed round, then disturbed ones until the time is over."""
    whole = Round(place, 0, [], args)
    whole.run()
    expected = digests(whole.path)
    tell(round=0, seconds=whole.seconds, files=len(expected), exits=whole.exits, errors=whole.errors)
    place.seconds_a_round = whole.seconds
    end, number = time.monotonic() + 60 * args.minutes, 0
    injected: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    alone = 0
    while time.monotonic() < end:
        number += 1
        each = Round(place, number, args.faults, args)
        each.run()
        found = digests(each.path) if each.is_done else {}
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        injected.update(each.faults)
        survived.update(each.faults if not differing else [])
        alone += not differing and not each.errors
        tell(
            round=number,
            seconds=each.seconds,
            faults=Counter(each.faults),
            exits=each.exits,
            errors=each.errors,
            is_same=not differing,
            differing=differing[:5],
        )
        if not differing:
            storage.remove(each.path)
    tell(rounds=number, rounds_without_an_error=alone, faults=injected, survived=survived, num=sum(injected.values()))


def tell(**content: object) -> None:
    """A line of JSON."""
    print(json.dumps({"at": round(time.time()), **content}), flush=True)


class Gate:
    """The way to the S3 server, as a process that can be killed."""

    def __init__(self, target: int) -> None:
        self.port, self.target = free_port(), target
        self.open()

    def open(self) -> None:
        command = [sys.executable, "-m", "benchmarks.gate", str(self.port), str(self.target)]
        self._process = subprocess.Popen(command, cwd=ROOT)
        wait_for(lambda: storage_answers(self.port), 60)

    def shut(self) -> None:
        self._process.kill()
        self._process.wait()


def storage_answers(port: int) -> bool:
    import socket

    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


class Place:
    """The cluster and its storage."""

    def __init__(self, nodes: Nodes, gate: Gate, rng: random.Random) -> None:
        self.nodes, self.gate, self.rng = nodes, gate, rng
        self.seconds_a_round = 600.0
        self.workers = [started(lambda: nodes.add(cpus=1)) for _ in range(2)]

    def pids(self, *names: str) -> list[int]:
        """Processes on the nodes that do the work."""
        return [pid for node in [*self.workers, self.nodes.head] for name in names for pid in named(name, node.pid)]


def started(start: Callable[[], _Started]) -> _Started:
    """A node, tried again: where other work uses the cores, Ray gives its own processes too little time to start."""
    for _ in range(9):
        try:
            return start()
        except AssertionError:
            tell(note="a node did not start; trying again")
    return start()


def kill_one(place: Place, *names: str) -> bool:
    """Whether there was one."""
    found = place.pids(*names)
    if not found:
        return False
    try:
        os.kill(place.rng.choice(found), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def lose_node(place: Place, by: Callable[[subprocess.Popen[bytes]], None]) -> bool:
    """A node goes, and another one comes some seconds later."""
    index = place.rng.randrange(len(place.workers))
    by(place.workers[index])
    time.sleep(place.rng.uniform(0, 5))
    place.workers[index] = started(lambda: place.nodes.add(cpus=1))
    return True


def drain(node: subprocess.Popen[bytes]) -> None:
    """As Kubernetes or a spot market ends a node: SIGTERM to `ray start`, and SIGKILL 20 s later."""
    node.terminate()


def shut_storage(place: Place) -> bool:
    """The S3 server does not answer for some seconds."""
    place.gate.shut()
    time.sleep(place.rng.uniform(0.5, 5))
    place.gate.open()
    return True


FAULTS: dict[str, Callable[[Place], bool] | None] = {
    "worker": lambda place: kill_one(place, "ray::RayTrainWorker", "ray::MapWorker", "ray::_PartWorker", "ray::read"),
    "controller": lambda place: kill_one(place, "ray::TrainController"),
    "raylet": lambda place: lose_node(place, place.nodes.kill),
    "node drained": lambda place: lose_node(place, drain),
    "driver": None,
    "driver by SIGTERM": None,
    "storage": shut_storage,
}
"""What is killed; None for the driver, which the round itself kills."""


class Round:
    """One pipeline, from nothing to its report."""

    def __init__(self, place: Place, number: int, faults: list[str], args: argparse.Namespace) -> None:
        self.place, self.number, self.kinds, self.args = place, number, faults, args
        self.path = f"s3://{BUCKET}/round-{number}"
        self.faults: list[str] = []
        self.exits: list[int] = []
        self.errors: list[str] = []
        self.is_done = False
        self.seconds = 0.0

    def run(self) -> None:
        began = time.monotonic()
        longest = 600 + LONGEST_ROUND * self.place.seconds_a_round
        for _ in range(MOST_TRIES):
            driver = self.place.nodes.job("pipeline", *SETTINGS, f"run.storage_path={self.path}")
            was_killed = self._disturb(driver, began + longest)
            self.exits.append(driver.wait())
            if self.exits[-1] == 0:
                self.is_done = True
                break
            if not was_killed or self.exits[-1] not in (-signal.SIGKILL, signal.SIGTERM, 128 + signal.SIGTERM):
                self.errors.append(self._last_line())
            if time.monotonic() > began + longest:
                self.errors.append(f"hangs: {self._last_line()}")
                break
        self.seconds = round(time.monotonic() - began, 1)

    def _last_line(self) -> str:
        lines = (self.place.nodes.directory / "pipeline.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def _disturb(self, driver: "subprocess.Popen[bytes]", until: float) -> bool:
        """Faults at drawn times until the driver ends; whether it was killed."""
        next_fault = self._draw()
        while driver.poll() is None:
            if time.monotonic() > until:
                self.place.nodes.kill(driver)
                return False
            if self.kinds and time.monotonic() >= next_fault:
                if self._inject(driver):
                    return True
                next_fault = self._draw()
            time.sleep(0.05)
        return False

    def _draw(self) -> float:
        return time.monotonic() + self.place.rng.expovariate(self.args.faults_a_round / self.place.seconds_a_round)

    def _inject(self, driver: "subprocess.Popen[bytes]") -> bool:
        """One fault; whether it ends the driver."""
        for kind in self.place.rng.sample(self.kinds, len(self.kinds)):  # the first for which there is something
            act = FAULTS[kind]
            stage = self._last_line()
            if act is None:
                if kind == "driver":
                    driver.kill()
                else:
                    driver.terminate()
                    try:
                        driver.wait(40)
                    except subprocess.TimeoutExpired:
                        driver.kill()
            elif not act(self.place):
                continue
            self.faults.append(kind)
            tell(round=self.number, fault=kind, during=stage[:100])
            return act is None
        return False


def write_data(num_users: int) -> None:
    """Ratings of users who each walk along a ring of items, with titles and genres."""
    rng = np.random.default_rng(0)
    lines = ["user,item,time"]
    for user in range(num_users):
        length = int(rng.integers(6, 30))
        walk = (rng.integers(200) + np.cumsum(rng.integers(1, 7, length))) % 200
        lines += [f"{user},{item},{10**6 + 60 * n}" for n, item in enumerate(dict.fromkeys(walk.tolist()))]
    titles = ["item\ttitle", *(f"{item}\tFilm {item} (1990)" for item in range(200))]
    genres = ["item\tgenre", *(f"{item}\tG{item % 7}" for item in range(200))]
    for name, rows in (("train_ratings.csv", lines), ("titles.tsv", titles), ("genres.tsv", genres)):
        storage.write_bytes(f"s3://{BUCKET}/films/{name}", ("\n".join(rows) + "\n").encode())


def digests(path: str) -> dict[str, str]:
    """What is promised to be the same, by file: bytes; of results in JSON all but paths and times."""
    filesystem, inner = storage.open_store(path)
    found = {}
    for info in filesystem.get_file_info(pafs.FileSelector(inner, recursive=True)):
        name = info.path.removeprefix(f"{inner}/")
        if not info.is_file or name.startswith("run/tensorboard"):
            continue
        if name.endswith((".parquet", ".csv", ".safetensors", "/config.json")):
            found[name] = hashlib.sha256(storage.read_bytes(f"{path}/{name}")).hexdigest()
        elif name in ("run/run.json", "run/evaluation.json"):
            found[name] = storage.fingerprint(without_times(storage.read_json(f"{path}/{name}")))
        elif "unfinished" in name:
            found[name] = "should not be there"
    return found


def without_times(content: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(content, dict):
        differ = {"seconds", "tokens_per_second", "dataset", "checkpoint", "run_path"}
        return {key: without_times(value) for key, value in content.items() if key not in differ}
    return [without_times(each) for each in content] if isinstance(content, list) else content


if __name__ == "__main__":
    main()
