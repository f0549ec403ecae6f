"""A run's directory: the names of its files, how to start it, and how to find it."""

import json
from typing import Any

import pyarrow.fs as pafs
import yaml

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.errors import InputError

RUN = "run.json"
"""The result of a finished training; written last."""
RUN_CONFIG = "config.yaml"
"""All settings, in the format of `--config`."""
RUN_IDENTITY = "identity.json"
"""The data and settings with which the run may be continued."""
EVALUATION = "evaluation.json"
REPORT = "report.html"


def checkpoint_name(metrics: dict[str, float], monitor: str) -> str:
    """Name of a model directory, such as bert4rec-05-0.1234: the epoch, from 1, and the monitored metric."""
    return f"bert4rec-{int(metrics['epoch']):02d}-{metrics[monitor]:.4f}"


UNFINISHED = "unfinished-"
"""How the name of a checkpoint in the middle of an epoch begins."""
_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own record of the checkpoints that it keeps, from which it resumes."""


def unfinished_name(epoch: int, step: int) -> str:
    """Name of the checkpoint after `step` steps of an epoch, from 1, such as unfinished-05-000120."""
    return f"{UNFINISHED}{epoch:02d}-{step:06d}"


def remove_abandoned(run_path: str) -> None:
    """Remove checkpoints in the middle of epochs that Ray Train does not know: uploads that were cut off."""
    filesystem, inner = storage.open_store(run_path)
    found = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    known = {each["checkpoint_dir_name"] for each in _kept(run_path)}
    for name in (info.base_name for info in found):
        if name.startswith(UNFINISHED) and name not in known:
            storage.remove(storage.join(run_path, name))


def _kept(run_path: str) -> list[dict[str, Any]]:
    snapshot = storage.join(run_path, _SNAPSHOT)
    return storage.read_json(snapshot)["checkpoint_results"] if storage.exists(snapshot) else []


def kept_metrics(run_path: str) -> list[dict[str, float]]:
    """Metrics of the epochs whose checkpoints a run has kept: the best and the last. The run may be unfinished."""
    kept = [{**result["metrics"]} for result in _kept(run_path)]
    for metrics in kept:
        metrics.pop("improvement", None)
    return [metrics for metrics in kept if metrics]  # in the middle of an epoch there are none


def begin_directory(path: str, config: Config, identity: dict[str, Any]) -> bool:
    """Mark the directory of a run or sweep with its settings. Return whether it is new.

    Raises
    ------
    InputError
        If it belongs to a run or sweep with another identity, or is not writable.
    """
    identity_path = storage.join(path, RUN_IDENTITY)
    wanted = json.loads(json.dumps(identity))
    if not storage.exists(identity_path):
        storage.check_writable(path)
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        storage.write_bytes(storage.join(path, RUN_CONFIG), settings.encode())
        storage.write_json(identity_path, wanted)
        return True
    found = storage.read_json(identity_path)
    differing = [
        f"{key} was {found.get(key)}, is {wanted.get(key)}"
        for key in sorted(found | wanted)
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise InputError(
            f"{path}: this run was begun with other settings ({'; '.join(differing)}); "
            "choose another run.name, or delete the directory"
        )
    return False


def newest_run(storage_path: str) -> str:
    """Find the directory of the run that finished last.

    Raises
    ------
    InputError
        If no run has finished.
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
