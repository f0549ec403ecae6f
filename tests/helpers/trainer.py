"""Trains in this process: does for `run_epochs` what Ray Train does, without Ray's processes.

`LocalTrainer` replaces `training.train._trainer`. It keeps the best and the last checkpoint, as the job configures Ray
Train to do, and continues from the last one. tests/integration tests what only Ray Train can do.
"""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs as pafs
import torch

from bert4rec import storage
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.model.losses import gbce, sampled_softmax
from bert4rec.training.worker import read_sequences, run_epochs

SNAPSHOT = "snapshot.json"


class Quiet:
    """Receives a worker's progress. `metrics` has the metrics that it recorded."""

    def __init__(self):
        self.metrics, self.skipped, self.texts = [], 0, []

    def advance(self, amount, text="", always=False):
        self.texts.append(text)

    def record(self, metrics):
        self.metrics.append(metrics)

    def skip(self, amount):
        self.skipped += amount


def every_item_as_negative(training, counts=None):
    """What `make_loss` gives, but for the negatives: each item once, in every step and on every worker."""

    def loss(hidden, weights, bias, labels):
        items = torch.arange(len(weights), device=hidden.device)
        if training.loss == "gbce":
            return gbce(hidden, weights, bias, labels, items, training.gbce_t)
        log_q = -torch.log(torch.full_like(items, len(weights), dtype=torch.float32))
        return sampled_softmax(hidden, weights, bias, labels, items, log_q)

    return loss


class WorkerKilledError(Exception):
    """Simulates the death of a worker."""


class Kept:
    """Keeps the best and the last checkpoint in a run's directory, where a second call finds them."""

    def __init__(self, path, stop_after=None):
        self.path, self.stop_after = Path(path), stop_after
        self.reported = []
        snapshot = self.path / SNAPSHOT
        self.entries = json.loads(snapshot.read_text()) if snapshot.exists() else []

    def report(self, metrics, name, directory, in_background):
        self.reported.append(metrics)
        shutil.copytree(directory, self.path / name)
        shutil.rmtree(directory)
        self.entries.append({"name": name, "improvement": metrics["improvement"]})
        self.entries = [entry for entry in self.entries if entry in (self.best, self.entries[-1])]
        for found in [*self.path.glob("bert4rec-*"), *self.path.glob("unfinished-*")]:
            if found.name not in [entry["name"] for entry in self.entries]:
                shutil.rmtree(found)
        (self.path / SNAPSHOT).write_text(json.dumps(self.entries))
        if len(self.reported) == self.stop_after:
            raise WorkerKilledError

    @property
    def best(self):
        return max(reversed(self.entries), key=lambda entry: entry["improvement"])  # of equal ones the last

    @property
    def last(self):
        return str(self.path / self.entries[-1]["name"]) if self.entries else None


class KeptOnAStore(Kept):
    """The same below a URI."""

    def __init__(self, uri):
        self.uri = uri
        super().__init__(tempfile.mkdtemp())

    def report(self, metrics, name, directory, in_background):
        super().report(metrics, name, directory, in_background)
        filesystem, inner = storage.open_store(self.uri)
        there = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
        stale = {info.base_name for info in there if info.base_name.startswith(("bert4rec-", "unfinished-"))}
        for each in {entry["name"] for entry in self.entries} - stale:
            pafs.copy_files(str(self.path / each), f"{inner}/{each}", destination_filesystem=filesystem)
        for each in stale - {entry["name"] for entry in self.entries}:
            filesystem.delete_dir(f"{inner}/{each}")


def run(config, dataset_path, path, stop_after=None):
    """Call `run_epochs` for the directory `path`, from the last checkpoint if any. Return the history and the
    `Kept`."""
    dataset, kept = PreparedDataset(dataset_path), Kept(path, stop_after)
    kept.path.mkdir(exist_ok=True, parents=True)
    sequences = read_sequences(config, dataset)
    kept.progress = Quiet()
    return run_epochs(
        config, dataset, sequences, report=kept.report, progress=kept.progress, resume_from=kept.last
    ), kept


class LocalTrainer:
    """Has a method `fit` like Ray's TorchTrainer."""

    def __init__(self, config, name, places, loop, callbacks):
        self.config, self.loop = config, loop
        self.path = storage.join(storage.absolute(config.run.storage_path), name)

    def fit(self):
        threads = torch.get_num_threads()
        dataset = PreparedDataset(self.loop["dataset_path"])
        kept = KeptOnAStore(self.path) if "://" in self.path else Kept(self.path)
        try:
            history = run_epochs(
                self.config,
                dataset,
                read_sequences(self.config, dataset),
                report=kept.report,
                progress=self.loop["reporter"],
                resume_from=kept.last,
                ranking=self.loop["ranking"],
            )
        except InputError as error:
            return SimpleNamespace(return_value=str(error))
        finally:
            torch.set_num_threads(threads)
        best, last = (storage.join(self.path, entry["name"]) for entry in (kept.best, kept.entries[-1]))
        return SimpleNamespace(
            return_value=history,
            best_checkpoints=[(SimpleNamespace(path=best), {})],
            checkpoint=SimpleNamespace(path=last),
        )
