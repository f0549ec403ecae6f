"""The progress line of long work: stage, share done, time left, then the rate or a text of the work."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_Item = TypeVar("_Item")


class Line:
    """Progress of one stage. A terminal shows one line, redrawn in place; elsewhere plain lines come ever more
    rarely."""

    def __init__(self, stage: str, total: float, unit: str, seconds_between_lines: float = 10.0) -> None:
        self.stage, self.total, self.unit, self.text = stage, total, unit, ""
        self._done = self._skipped = 0.0
        self._began = self._shown = time.monotonic()
        self._started: float | None = None
        self._advanced = 0.0
        self._between = seconds_between_lines
        self._is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def start(self, skipped: float = 0.0) -> None:
        """End the start-up. The rate ignores the time until now and the amount `skipped`, done during start-up."""
        self._started = time.monotonic()
        self._skipped += skipped

    def advance(self, amount: float) -> None:
        """Count `amount` more as done."""
        if self._started is None:
            self.start(amount)
        else:
            self._done += amount
            self._advanced = time.monotonic()

    def skip(self, amount: float) -> None:
        """Count `amount` as done in an earlier run."""
        self._skipped += amount

    def show(self) -> None:
        """Redraw the line on a terminal. Elsewhere, print it if the last line is long enough ago."""
        now = time.monotonic()
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be drawn over
            text = str(self)
            print(f"\r\x1b[2K{text if len(text) <= columns else f'{text[: columns - 1]}…'}", end="", flush=True)
        elif now - self._shown >= max(self._between, (now - self._began) / 50):
            self._shown = now
            print(self, flush=True)

    def end(self) -> None:
        """Clear the line. The caller prints the result of the stage."""
        if self._is_terminal:
            print("\r\x1b[2K", end="", flush=True)

    def __str__(self) -> str:
        if self._started is None:
            return f"{self.stage}: starting"
        done = self._skipped + self._done
        # Divide by the time until the last report, since nobody knows what has been done after it.
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


def track(items: Iterable[_Item], stage: str, unit: str, total: int) -> Iterator[_Item]:
    """Yield the items, `total` of them, and show how many the caller has taken."""
    line = Line(stage, total, unit)
    line.start()
    try:
        for item in items:
            line.show()
            yield item
            line.advance(1)
    finally:
        line.end()


class Reporter:
    """The worker's end of a `Progress`. It can be sent to any Ray process."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._pending = 0.0
        self._last = 0.0

    def advance(self, amount: float, text: str = "", always: bool = False) -> None:
        """Report `amount` more as done. Sends at most two reports per second, unless `always`."""
        self._pending += amount
        if always or time.monotonic() - self._last > 0.5:
            self._queue.put_nowait(("advance", self._pending, text))
            self._pending, self._last = 0.0, time.monotonic()

    def record(self, metrics: dict[str, float]) -> None:
        """Send metrics to the driver."""
        self._queue.put_nowait(("record", 0.0, metrics))

    def skip(self, amount: float) -> None:
        """Report `amount` as done before this run started, so that the rate ignores it."""
        self._queue.put_nowait(("skip", amount, ""))


class Progress:
    """Shows the progress that `Reporter`s send, in one `Line`.

    Use it as a context manager, which returns the `Reporter`.
    """

    def __init__(
        self,
        stage: str,
        total: float,
        unit: str,
        on_record: Callable[[dict[str, float]], None] | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        """Start to show progress. A thread calls `on_record` with the metrics of each `Reporter.record`."""
        self._on_record = on_record
        self._line = Line(stage, total, unit, seconds_between_lines)
        # Run the queue on the driver's node, so that workers can still report after another node is lost.
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
            try:
                self._line.show()
            except BrokenPipeError:  # nobody reads the output any more: let the main thread end the work
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            try:
                kind, amount, text = self._queue.get(timeout=0.5)
            except Empty:
                if self._stop.is_set():  # stop only once the queue is empty
                    return
                continue
            except Exception:  # Ray has ended first, so no more reports can come
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
    """Format a duration, such as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
