"""Finding and killing processes, of those alone that this process, or one that it started, has started."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = int(os.environ.get("BERT4REC_REPEATS", "1"))
"""How often tests of faults are repeated; more than once, then each time at another moment."""


def random_delay() -> float:
    """Up to a second before the fault, where it is repeated."""
    return random.random() * (REPEATS > 1)


def descendants(pid: int | None = None) -> list[int]:
    """Processes below `pid`, this process if none is given."""
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
    """Processes below `pid` whose command line holds `name`."""
    found = []
    for each in descendants(pid):
        try:
            if name.encode() in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 300, why: str = "") -> None:
    """Return once `condition` holds; it is looked at every 20 ms."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain {why}"
        time.sleep(0.02)


class KillOnce(threading.Thread):
    """SIGKILL one process of that name below this one as soon as `condition` holds; use as a context manager."""

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
