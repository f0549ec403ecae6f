"""What all jobs share: options, Ray's start, errors as one message, exit codes, where a run's things lie."""

import argparse
import atexit
import csv
import gc
import io
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # ours report instead
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning that concerns no user of ours
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")  # so sweeps are meant

import pyarrow as pa
import pyarrow.fs as pafs
import ray
from ray.exceptions import RayError

from bert4rec import config_docs, storage
from bert4rec.cluster.resources import check_shared, first_line, root_cause
from bert4rec.config import Config, load_config
from bert4rec.storage import RUN, InputError

atexit.register(gc.freeze)  # else Python looks at each of a million objects once more before a job ends, for a second

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "ml-100k.yaml"


def run_job(
    description: str, work: Callable[[Config], object], needs_ray: Callable[[Config], bool] = lambda config: True
) -> None:
    """Parse the command line, start or join Ray, do the work, and exit: 0 done, 1 failed, 2 the input is unusable."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a job's log shows a line when it is printed
    arguments = _parser(description).parse_intermixed_args()
    try:
        config = _load(arguments.config, arguments.overrides)
        if needs_ray(config):
            if not arguments.verbose:
                _keep_native_messages_off_the_terminal()
            start_ray(arguments.verbose)
            check_shared(config)
        work(config)
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; the same command goes on from here", 130))
    except _expected_errors() as error:
        cause = root_cause(error)
        if isinstance(cause, InputError):
            sys.exit(_fail(str(cause), 2))
        if arguments.verbose:
            raise
        sys.exit(_fail(f"{first_line(cause)} (--verbose shows all)", 1))


def _expected_errors() -> tuple[type[BaseException], ...]:
    """Errors that are told in a line; asked for only when there is one, since Ray Train takes a second to import."""
    from ray.train import TrainingFailedError

    return RayError, TrainingFailedError, OSError, pa.ArrowException, csv.Error


def newest_run(storage_path: str) -> str:
    """The directory of the run that finished last.

    Raises
    ------
    InputError
        If there is none.
    """
    root = storage.absolute(storage_path)
    filesystem, inner = storage.open_store(root)
    found = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    runs = [info.base_name for info in found if info.type == pafs.FileType.Directory]
    finished = [(filesystem.get_file_info(f"{inner}/{run}/{RUN}"), run) for run in runs]
    times = [(info.mtime_ns, run) for info, run in finished if info.type == pafs.FileType.File]
    if not times:
        raise InputError(f"{root}: no trained run; run `python -m jobs.train` first, or set inference.checkpoint_path")
    return storage.join(root, max(times)[1])


def checkpoint_and_output(config: Config, checkpoint: str | None = None) -> tuple[str, str]:
    """The model directory to score with (`checkpoint` where given), and where recommendations go.

    Raises
    ------
    InputError
        If the run named, or any, has not been trained to its end.
    """
    checkpoint = checkpoint or config.inference.checkpoint_path
    if checkpoint is None:
        root = storage.absolute(config.run.storage_path)
        run = storage.join(root, config.run.name) if config.run.name else newest_run(root)
        if not storage.exists(storage.join(run, RUN)):
            raise InputError(f"{run}: no finished training ({RUN} is missing); run `python -m jobs.train` first")
        checkpoint = storage.inside(run, str(storage.read_json(storage.join(run, RUN))["best_checkpoint"]))
    checkpoint = storage.absolute(checkpoint)
    output = config.inference.output_path or storage.join(os.path.dirname(checkpoint.rstrip("/")), "recommendations")
    return checkpoint, storage.absolute(output)


def table_of_metrics(rows: dict[str, dict[str, float]]) -> str:
    """Metrics side by side, a column for each of `rows`."""
    names = list(next(iter(rows.values())))
    first = max(10, *(len(name) for name in names))
    lines = [" " * first + "".join(f"  {system:>11}" for system in rows)]
    for name in names:
        cells = (f"  {metrics[name]:>{max(11, len(system))}.4f}" for system, metrics in rows.items())
        lines.append(f"{name:<{first}}" + "".join(cells))
    return "\n".join(lines)


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
    parser.add_argument("--config", help="YAML file; without it and data.data_dir: configs/ml-100k.yaml")
    parser.add_argument("--verbose", action="store_true", help="show the messages of Ray and its workers")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="override a key of the config")
    return parser


def _load(path: str | None, overrides: list[str]) -> Config:
    if path is None and not any(override.startswith("data.data_dir=") for override in overrides):
        print(
            f"no --config and no data.data_dir: MovieLens-100K with {DEFAULT_CONFIG.parent.name}/{DEFAULT_CONFIG.name}"
        )
        path = str(DEFAULT_CONFIG)
    return load_config(path, overrides)


def start_ray(verbose: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS (as in a submitted job), else start Ray on this machine."""
    level = logging.INFO if verbose else logging.ERROR
    address = os.environ.get("RAY_ADDRESS") or "local"
    print("starting Ray" if address == "local" else f"joining Ray at {address}")
    dashboard = {}
    if address == "local":  # processes that would only take time from the work
        dashboard = {"include_dashboard": False}
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine's nodes away
        os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15 its other processes interrupt the work's
    try:
        ray.init(address=address, log_to_driver=verbose, logging_level=level, **dashboard)
    except ConnectionError as error:
        raise InputError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
    logging.getLogger("ray.data").setLevel(level)
    logging.getLogger("ray.train").setLevel(level)


def _keep_native_messages_off_the_terminal() -> None:
    """Drop what is written past Python: Ray's core warns of every actor pool of Ray Data. Processes have their logs."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
