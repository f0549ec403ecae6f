"""One live line for long work that runs in Ray workers: stage, share done, rate, time left."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


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
        self.stage, self.total, self.unit = stage, total, unit
        self._seconds_between_lines = seconds_between_lines
        # With the driver, so that the loss of another node never takes it away from the workers that report.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._print_reports, daemon=True)
        self._done = self._skipped = 0.0
        self._started: float | None = None
        self._last_line = 0.0
        self._text = ""

    def __enter__(self) -> Reporter:
        self._thread.start()
        return Reporter(self._queue)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._queue.shutdown(force=True)
        if sys.stdout.isatty() and self._last_line:
            print()

    def _print_reports(self) -> None:
        while True:
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
                continue
            if kind == "skip":
                self._skipped += amount
                continue
            if (
                self._started is None
            ):  # the first report: what came before it was start-up, and says nothing of the rate
                self._started = time.monotonic()
                self._skipped += amount
            else:
                self._done += amount
            self._text = text or self._text
            is_terminal = sys.stdout.isatty()
            if is_terminal or time.monotonic() - self._last_line > self._seconds_between_lines:
                self._last_line = time.monotonic()
                print(f"\r\x1b[2K{self._line()}" if is_terminal else self._line(), end="" if is_terminal else "\n")
                sys.stdout.flush()

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - (self._started or 0), 1e-9)
        done = self._skipped + self._done
        text = f"{self.stage}: {self._text + ', ' if self._text else ''}{min(done / self.total, 1):.0%}"
        if rate:
            text += f", {rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s, {duration((self.total - done) / rate)} left"
        return text


def duration(seconds: float) -> str:
    """Such as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
