"""The jobs. Each module is one step: `python -m jobs.NAME [--config FILE] [group.key=value ...]`."""

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    """One line for Ctrl+C in the seconds of imports, which leave an exception half-handled: nothing has begun yet."""
    os.write(2, b"error: interrupted; run the same command to continue\n")
    os._exit(130)


# "-m": as Python has it until it has found the module of `python -m`. `run_job` takes the signal back.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
