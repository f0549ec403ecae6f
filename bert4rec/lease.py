"""Keeps a directory for one job at a time, on any filesystem.

The holder writes who it is into a file in the directory, and renews the file every `RENEWAL` seconds. A file whose
holder is dead is taken over. On the holder's machine, a look at its process tells. Elsewhere, an observer waits for a
renewal for `PATIENCE` seconds of its own clock, so clocks need not agree.

Local disks create a file only once. pyarrow has no such call for object stores, and a dead holder's file is replaced
everywhere. Whoever replaces a file waits, and reads it again: the last writer has it. A writer that was slow, whose
look may be outdated, waits for several renewals: a holder that finds another's file writes its own again.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from bert4rec import storage
from bert4rec.errors import InputError

HOLDER = "holder.json"
RENEWAL = 10.0
PATIENCE = 60.0
SETTLING = 1.0
"""Seconds between writing over a file and reading it again; much more than a write takes."""


@contextlib.contextmanager
def held(directory: str, name: str = HOLDER) -> Iterator[None]:
    """Hold `directory`, which is made if need be, inside this block. `name` is that of the file that says so.

    Raises
    ------
    InputError
        If another job holds it: its host, its process id, and since when. Also if the directory is not writable, or
        another job took it over while this process did not run.
    """
    storage.check_writable(directory)
    path = storage.join(directory, name)
    lease = _Lease(path)
    lease.acquire()
    # What a shell script starts with & ignores SIGINT, by which the renewing thread ends the work.
    in_main = threading.current_thread() is threading.main_thread()
    is_ignored = in_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if is_ignored:
        signal.signal(signal.SIGINT, lambda *_: lease.end_if_lost())
    over = threading.Event()
    renewing = threading.Thread(target=lease.renew_until, args=(over,), daemon=True)
    renewing.start()
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost:
            raise InputError(lease.lost) from None
        raise
    finally:
        over.set()
        renewing.join()
        if is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # what stays behind is a dead holder's
            if lease.is_own(_read(path)):
                storage.remove(path)


class _Lease:
    def __init__(self, path: str) -> None:
        self.path = path
        self.lost = ""
        self._renewed = _clock()
        self._own: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "renewals": 0,
        }

    def is_own(self, content: dict[str, Any] | None) -> bool:
        return content is not None and content.get("id") == self._own["id"]

    def acquire(self) -> None:
        """Write the file, unless a living process holds it."""
        while True:
            found = _read(self.path)
            if found is not None and not _is_dead(self.path, found):
                raise InputError(f"{os.path.dirname(self.path)}: in use by another job ({_name(found)})")
            if found is None and storage.is_local(self.path):
                if _create(self.path, self._own):
                    break
                continue
            began = _clock()
            if _read(self.path) != found:
                continue
            storage.write_json(self.path, self._own)
            time.sleep(SETTLING if _clock() - began < SETTLING / 2 else SETTLING + 3 * RENEWAL)
            if self.is_own(_read(self.path)):
                break
        self._renewed = _clock()

    def end_if_lost(self) -> None:
        """End the work as Ctrl+C does, but only if another job has the directory."""
        if self.lost:
            raise KeyboardInterrupt

    def renew_until(self, over: threading.Event) -> None:
        """Renew the file until `over`. If another has it because this process did not run, end the work."""
        while not over.wait(RENEWAL):
            with contextlib.suppress(OSError):  # the store's; the next renewal tries again
                found = _read(self.path)
                paused = _clock() - self._renewed
                if found is not None and not self.is_own(found) and paused > PATIENCE / 2:
                    self.lost = (
                        f"{os.path.dirname(self.path)}: another job took it over ({_name(found)}), because this one "
                        f"did not run for {paused:.0f} s"
                    )
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._own["renewals"] += 1
                storage.write_json(self.path, self._own)
                self._renewed = _clock()


def _create(path: str, content: dict[str, Any]) -> bool:
    """Create a local file. Return whether it was not there."""
    path = storage.absolute(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(path, "x") as file:
            json.dump(content, file)
    except FileExistsError:
        return False
    return True


def _read(path: str) -> dict[str, Any] | None:
    """Read the file; None if there is none, {} if a killed job left it half-written."""
    for _ in range(5):
        try:
            content: dict[str, Any] = storage.read_json(path)
        except InputError:
            if not storage.exists(path):
                return None
            time.sleep(0.1)
        else:
            return content
    return {}


def _is_dead(path: str, found: dict[str, Any]) -> bool:
    """Whether the holder runs no more. Elsewhere than on its machine, this takes up to `PATIENCE` seconds."""
    if not found:
        return True
    if found["machine"] == _machine():
        return bool(_start_of(found["pid"]) != found["started"])
    print(f"waiting for a sign of life of another job ({_name(found)}), for at most {PATIENCE:.0f} s", flush=True)
    end = _clock() + PATIENCE
    while _clock() < end:
        time.sleep(min(SETTLING, PATIENCE / 10))
        if (now := _read(path)) != found:
            return now is None
    return True


def _name(found: dict[str, Any]) -> str:
    return f"host {found.get('host')}, pid {found.get('pid')}, since {found.get('since')}"


def _clock() -> float:
    """Seconds that also count while the machine sleeps, if the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _machine() -> str:
    """What processes have in common that see each other's ids: the host, since its last start, and the container."""
    own = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            own.append(file.read().strip())
        own.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(own)


def _start_of(pid: int) -> str:
    """When a process began, in the system's ticks, which tells it from a later one with its id. "" if it ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return ""
    else:
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
