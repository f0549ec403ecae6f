"""The command line that all jobs share: options, one-line errors, exit codes."""

import argparse
import atexit
import csv
import faulthandler
import gc
import io
import os
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

# Ray warns when many workers start, which sweeps do on purpose. Ray reads this variable when it is imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")

import pyarrow as pa

from bert4rec import config_docs, storage
from bert4rec.cluster.errors import first_line, root_cause
from bert4rec.cluster.resources import check_submitted, show_messages
from bert4rec.config import Config, load_config
from bert4rec.errors import InputError

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "ml-100k.yaml"
"""Part of the package; configs/ml-100k.yaml of the repository is a link to it."""


AUTO = "auto"
"""The name of the config that `training/auto.py` chooses for the data."""


def run_job(description: str, work: Callable[[Config], object], prepares: bool = False) -> None:
    """Parse the command line, do the work, and exit with 0 (done), 1 (failed) or 2 (the input is unusable).

    With `--config auto` the data are prepared first, if they are not, or if `work` itself `prepares` them. `work`
    itself starts or joins Ray (`cluster.resources.begin`) once it has checked its input.
    """
    atexit.register(
        gc.freeze
    )  # otherwise Python's garbage collector checks a million objects before the exit, which takes a second
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # while jobs import, `jobs/__init__.py` handles it
    print_anything()
    arguments = _parser(description).parse_intermixed_args()
    try:
        config = _load(arguments.config, arguments.overrides)
        check_submitted(config)
        if arguments.verbose:
            show_messages()
        else:
            _keep_native_messages_off_the_terminal()
        if arguments.config == AUTO:
            config = _chosen(config, arguments.overrides, prepares)
        work(config)
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        if _nobody_reads():  # the thread that shows progress has found out, and stopped the work
            sys.exit(_fail(_UNREAD, 1))
        sys.exit(_fail("interrupted; run the same command to continue", 130))
    except _expected_errors() as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(_fail(_UNREAD, 1))
        cause = root_cause(error)
        if isinstance(cause, InputError):
            sys.exit(_fail(str(cause), 2))
        if arguments.verbose:
            raise
        sys.exit(_fail(f"{first_line(cause)} (--verbose shows all)", 1))


_UNREAD = "nobody reads the output any more; run the same command to continue"


def _nobody_reads() -> bool:
    """Whether stdout leads to a program that has ended, such as `head`. What is still to be printed is then dropped."""
    looking = select.poll()
    looking.register(1, 0)
    if not any(event & select.POLLERR for _, event in looking.poll(0)):
        return False
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return True


def print_anything() -> None:
    """Let stdout show each line at once, and "?" for what a terminal or log without UTF-8 cannot show."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")


def _expected_errors() -> tuple[type[BaseException], ...]:
    """Errors to print as one line. Called only after an error, because Ray Train takes a second to import."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    return RayError, TrainingFailedError, OSError, pa.ArrowException, csv.Error


def _parser(description: str) -> argparse.ArgumentParser:
    width = min(shutil.get_terminal_size().columns, 120)
    keys = [
        f"  {key.group}.{key.name}={key.default}  ({key.type})\n"
        + textwrap.fill(key.meaning, width, initial_indent=6 * " ", subsequent_indent=6 * " ")
        for key in config_docs.all_keys()
    ]
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys with their defaults (and types):\n" + "\n".join(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        help="YAML file, or auto: settings that suit the data; without it and data.data_dir: configs/ml-100k.yaml",
    )
    parser.add_argument("--verbose", action="store_true", help="show the messages of Ray and its workers")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="override a key of the config")
    return parser


def _load(path: str | None, overrides: list[str]) -> Config:
    if path is None and not any(override.startswith("data.data_dir=") for override in overrides):
        print(
            f"no --config and no data.data_dir: MovieLens-100K with {DEFAULT_CONFIG.parent.name}/{DEFAULT_CONFIG.name}"
        )
        path = str(DEFAULT_CONFIG)
    return load_config(None if path == AUTO else path, overrides)


def _chosen(config: Config, overrides: list[str], prepares: bool) -> Config:
    """The config that suits the data of `config`, with the overrides; says what was chosen and why."""
    from bert4rec import api
    from bert4rec.data.dataset import PreparedDataset
    from bert4rec.training.auto import config_for

    if prepares or not storage.is_complete(config.prepared_path):
        api.prepare(config)
    chosen, lines = config_for(PreparedDataset(config.prepared_path), overrides)
    print("\n".join(lines))
    return chosen


def _keep_native_messages_off_the_terminal() -> None:
    """Discard messages of native code, such as Ray's warnings about actor pools. Ray's log files keep its messages."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    faulthandler.enable(sys.stderr)  # so that a crash of native code still shows its place
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
