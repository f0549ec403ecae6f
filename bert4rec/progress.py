"""One live line for long work: stage, share done, time left, rate or what the work itself says."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_Item = TypeVar("_Item")


class Line:
    """A stage's state, drawn again in place on a terminal; elsewhere a plain line now and then, ever more seldom."""

    def __init__(self, stage: str, total: float, unit: str, seconds_between_lines: float = 10.0) -> None:
        self.stage, self.total, self.unit, self.text = stage, total, unit, ""
        self._done = self._skipped = 0.0
        self._began = self._shown = time.monotonic()
        self._started: float | None = None
        self._advanced = 0.0
        self._between = seconds_between_lines
        self._is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def start(self, skipped: float = 0.0) -> None:
        """What came before was start-up, and `skipped` was done in it: neither says anything of the rate."""
        self._started = time.monotonic()
        self._skipped += skipped

    def advance(self, amount: float) -> None:
        """`amount` more is done."""
        if self._started is None:
            self.start(amount)
        else:
            self._done += amount
            self._advanced = time.monotonic()

    def skip(self, amount: float) -> None:
        """`amount` was done in an earlier run."""
        self._skipped += amount

    def show(self) -> None:
        """Draw it, or print it if the last line is long enough ago."""
        now = time.monotonic()
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be drawn over
            text = str(self)
            print(f"\r\x1b[2K{text if len(text) <= columns else f'{text[: columns - 1]}…'}", end="", flush=True)
        elif now - self._shown >= max(self._between, (now - self._began) / 50):
            self._shown = now
            print(self, flush=True)

    def end(self) -> None:
        """Clear it: what came of the work is told by a line that stays."""
        if self._is_terminal:
            print("\r\x1b[2K", end="", flush=True)

    def __str__(self) -> str:
        if self._started is None:
            return f"{self.stage}: starting"
        done = self._skipped + self._done
        # Of the time to the last report: what has been done since is not known yet.
        rate = self._done / max(self._advanced - self._started, 1e-9)
        parts = [f"{min(done / max(self.total, 1e-9), 1):.0%}"]
        if rate:
            left = (self.total - done) / rate - (time.monotonic() - self._advanced)
            parts.append(f"{duration(max(left, 0))} left")
        if self.text:
            parts.append(self.text)
        elif rate:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{self.unit.rstrip('s')}")
        return f"{self.stage}: {', '.join(parts)}"


def track(items: Sequence[_Item], stage: str, unit: str) -> Iterator[_Item]:
    """The items in turn, with a line that says how far their reader is."""
    line = Line(stage, len(items), unit)
    line.start()
    try:
        for item in items:
            line.show()
            yield item
            line.advance(1)
    finally:
        line.end()


class Reporter:
    """What a worker holds of a `Progress`; can be sent to any Ray process."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._pending = 0.0
        self._last = 0.0

    def advance(self, amount: float, text: str = "", always: bool = False) -> None:
        """`amount` more is done; sent at most twice a second, unless `always`."""
        self._pending += amount
        if always or time.monotonic() - self._last > 0.5:
            self._queue.put_nowait(("advance", self._pending, text))
            self._pending, self._last = 0.0, time.monotonic()

    def record(self, metrics: dict[str, float]) -> None:
        """Hand metrics to the driver."""
        self._queue.put_nowait(("record", 0.0, metrics))

    def skip(self, amount: float) -> None:
        """`amount` was done before this run began (a resumed run), so it says nothing about the rate."""
        self._queue.put_nowait(("skip", amount, ""))


class Progress:
    """Prints what the `Reporter`s tell: a line that lives on a terminal, a plain line now and then elsewhere.

    Use as a context manager; it yields the `Reporter`.
    """

    def __init__(
        self,
        stage: str,
        total: float,
        unit: str,
        on_record: Callable[[dict[str, float]], None] | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        """`on_record` is called, in another thread, with what `Reporter.record` is given."""
        self._on_record = on_record
        self._line = Line(stage, total, unit, seconds_between_lines)
        # With the driver, so that the loss of another node never takes it away from the workers that report.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._print_reports, daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return Reporter(self._queue)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._queue.shutdown(force=True)
        self._line.end()

    def _print_reports(self) -> None:
        while True:
            self._line.show()
            try:
                kind, amount, text = self._queue.get(timeout=0.5)
            except Empty:
                if self._stop.is_set():  # only when all has been read
                    return
                continue
            except Exception:  # Ray goes down before us: there is nothing left to report
                return
            if kind == "record":
                if self._on_record is not None:
                    self._on_record(text)
            elif kind == "skip":
                self._line.skip(amount)
            else:
                self._line.advance(amount)
                self._line.text = text or self._line.text


def duration(seconds: float) -> str:
    """Such as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
