"""The jobs. Each module is one step: `python -m jobs.NAME [--config FILE] [group.key=value ...]`."""

import sys
from types import TracebackType


def _tell_of_an_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """One line for Ctrl+C in the seconds of imports, before `run_job` tells of it."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted; run the same command to continue", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # as Python has it until it has found the module of `python -m`
    sys.excepthook = _tell_of_an_interrupt
