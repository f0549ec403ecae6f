"""Finds and kills processes, but only those that descend from this process."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = int(os.environ.get("BERT4REC_REPEATS", "1"))
"""How often to repeat tests of faults. If more than once, each fault comes after a random delay."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def random_delay() -> float:
    """A delay of up to a second before the fault; 0 if the test runs only once."""
    return random.random() * (REPEATS > 1)


def descendants(pid: int | None = None) -> list[int]:
    """Ids of the descendants of `pid`; without it, of this process."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(process.name))
    found = list(children.get(os.getpid() if pid is None else pid, []))
    for each in found:
        found += children.get(each, [])
    return found


def named(name: str, pid: int | None = None) -> list[int]:
    """Ids of the descendants of `pid` whose command line contains `name`."""
    found = []
    for each in descendants(pid):
        try:
            if name.encode() in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 300, why: str = "") -> None:
    """Check `condition` every 20 ms and return once it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain {why}"
        time.sleep(0.02)


class KillOnce(threading.Thread):
    """Kills one descendant of that name by SIGKILL as soon as `condition` holds. Use it as a context manager."""

    def __init__(self, name: str, condition: Callable[[], object], delay: float = 0) -> None:
        super().__init__()
        self.name_part, self.condition, self.delay = name, condition, delay
        self.killed: int | None = None

    def run(self) -> None:
        wait_for(self.condition)
        time.sleep(self.delay)
        for pid in named(self.name_part)[:1]:
            os.kill(pid, signal.SIGKILL)
            self.killed = pid

    def __enter__(self) -> "KillOnce":
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.join()
        if kind is None:
            assert self.killed is not None, f"there was no {self.name_part} to kill"
