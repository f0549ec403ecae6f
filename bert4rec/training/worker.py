"""What one training worker does, without Ray: begin or resume, train, validate, write checkpoints, stop early.

`train.py` runs it in Ray Train's workers. It runs as well alone, or as one of several gloo processes.
"""

import contextlib
import ctypes
import math
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed
from torch import nn

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.data.dataset import ITEMS, PreparedDataset, Sequences
from bert4rec.data.vectors import read_vectors_of
from bert4rec.data.windows import Windows, held_out_users, item_counts, training_windows, usual_gap
from bert4rec.errors import InputError
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.rules import Rules
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.losses import make_loss
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import Shard
from bert4rec.runs import checkpoint_name, unfinished_name
from bert4rec.training.card import CARD, model_card
from bert4rec.training.checkpoint import load_checkpoint, load_shard, write_checkpoint
from bert4rec.training.loop import ALONE, Place, Worker, make_optimizers, train_epoch, validate
from bert4rec.training.warm_start import begin_from

SECONDS_BETWEEN_LOOKS = 1.0
"""How often the workers agree on whether to save in the middle of an epoch."""
MOST_OF_THE_TIME = 0.01
"""The share of a training that saving in the middle of epochs may take; slow saves come more rarely."""


class Progress(Protocol):
    """Who is told how far the training is (`bert4rec.progress.Reporter`)."""

    def advance(self, amount: float, text: str = "", always: bool = False) -> None:
        """`amount` more epochs are done."""

    def record(self, metrics: dict[str, float]) -> None:
        """The metrics of a validated epoch."""

    def skip(self, amount: float) -> None:
        """`amount` epochs were done before."""


class Report(Protocol):
    """Keeps a checkpoint. Every worker calls it equally often; all but the first give no directory, except for their
    parts of a checkpoint in shards."""

    def __call__(self, metrics: dict[str, float], name: str, directory: str | None, in_background: bool) -> None:
        """Keep the content of `directory`, which it removes, as the checkpoint `name`.

        `in_background`: training goes on meanwhile.
        """


class Wish(IntEnum):
    """What is asked of a training from outside."""

    NOTHING = 0
    SAVE = 1
    """To save now and go on, as one of its nodes will go."""
    END = 2
    """To save now and end."""


class AskedToEndError(Exception):
    """The training was asked to end, and has saved."""


def read_sequences(config: Config, dataset: PreparedDataset) -> Sequences:
    """The histories of `dataset`, with times if the network reads them."""
    return dataset.sequences(config.data.memory_mb, with_times=bool(config.model.time_parts))


def run_epochs(
    config: Config,
    dataset: PreparedDataset,
    read: Sequences,
    *,
    report: Report,
    progress: Progress,
    worker: Worker = ALONE,
    resume_from: str | None = None,
    wrap: Callable[[BERT4Rec], nn.Module] = lambda model: model,
    wish: Callable[[], Wish] = lambda: Wish.NOTHING,
    ranking: Ranking | None = None,
) -> list[dict[str, float]]:
    """Train to the last epoch, or until early stopping; the metrics of each validated epoch.

    Parameters
    ----------
    read : Sequences
        What `read_sequences` returns.
    resume_from : str
        Directory of the checkpoint to go on from.
    wrap : callable
        Puts the model on the worker's device, inside DDP where there are several workers.
    wish : callable
        Called by every worker at the same steps, about once a second; what it tells the first of them counts.
    ranking : Ranking
        The rules by which validation ranks, if not all items but the seen ones may be ranked.

    Raises
    ------
    InputError
        If nothing is left to train on or to validate with, a checkpoint is damaged, or the loss is no number.
    AskedToEndError
        If `wish` asked for it.
    """
    training, device = config.training, worker.device
    torch.manual_seed(config.data.seed)
    model = _new_model(config, dataset, worker)
    sequences = Windows.from_sequences(read)
    windows = _training_windows(config, dataset, sequences, read)
    counts = item_counts(windows, model.num_items)
    known = counts[: model.num_items - model.num_new_items].float()
    ruled = None if ranking is None else (Rules(ranking, dataset.items(), device), read)
    if model.shards is None:
        model.loss = make_loss(training, known if training.negative_sampling == "popularity" else None)

    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "improvements": 0, "validations_since_best": 0}
    optimizer_states = scaler_state = begin_at = None
    if resume_from is not None:
        if model.shards is None:
            weights, state = load_checkpoint(resume_from)
            model.load_state_dict(weights)
        else:
            state = load_shard(resume_from, model)
        optimizer_states, scaler_state = state.pop("optimizers"), state.pop("scaler")
        begin_at = state.pop("in_epoch", None)
        if worker.rank == 0:
            num_steps = math.ceil(len(windows) / config.data.batch_size)
            progress.skip(state["epoch"] + (begin_at["step"] / num_steps if begin_at else 0))
    elif training.start_from is not None:
        begin_from(model, training.start_from, dataset.items().ids)
    model.get_buffer("item_counts").copy_(counts)
    if model.times is not None:
        model.times.get_buffer("usual_gap").fill_(usual_gap(windows))

    if model.shards is not None:
        model.row_tables = model.shards.prepare(training, counts)
    elif training.item_optimizer == "rowwise":
        model.train_by_rows()
    wrapped = wrap(model)
    optimizers = make_optimizers(model, training)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "16-mixed")  # type: ignore[attr-defined]
    if optimizer_states is not None:
        for optimizer, saved in zip(optimizers, optimizer_states, strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(scaler_state or {})

    def on_step(place: Place) -> None:
        if worker.rank == 0:
            where = f"epoch {place.epoch + 1}/{training.num_epochs}, step {place.step}/{place.num_steps}"
            rate = place.num_tokens / place.seconds
            progress.advance(1 / place.num_steps, f"{where}, {rate:,.0f} tokens/s{last_validation}")

    def save(place: Place, in_epoch: dict[str, Any]) -> None:
        name = unfinished_name(place.epoch + 1, place.step)
        directory = write_checkpoint(model, {**state, "in_epoch": in_epoch}, optimizers, scaler, worker.rank)
        # Below every finished epoch, so that Ray Train keeps it only while it is the latest.
        report({"improvement": -1}, name, directory, in_background=True)

    saver = _MidEpoch(training.checkpoint_minutes, worker, wish, on_step, save)
    last_validation = ""
    while state["epoch"] < training.num_epochs and not _should_stop(config, state):
        metrics = train_epoch(wrapped, windows, config, state["epoch"], optimizers, scaler, worker, saver, begin_at)
        begin_at = None
        state["epoch"] += 1
        if state["epoch"] % training.val_check_interval and state["epoch"] < training.num_epochs:
            continue
        if not config.data.use_full_data:
            if worker.rank == 0:
                place = f"epoch {state['epoch']}/{training.num_epochs}"
                progress.advance(0, f"{place}, validating{last_validation}", always=True)
            metrics |= validate(model, sequences, config, worker, read.before, ruled)
        _note_best(state, metrics, config.monitor)
        _give_memory_back()
        _report(model, state, optimizers, scaler, metrics, config, dataset, worker, report)
        if worker.rank == 0:
            progress.record(metrics)
            last_validation = _summary(metrics, config.monitor)
    history: list[dict[str, float]] = state["history"]
    return history


class _MidEpoch:
    """Saves in the middle of epochs when it is time, or when it is asked to. The first worker decides for all."""

    def __init__(
        self,
        minutes: float,
        worker: Worker,
        wish: Callable[[], Wish],
        on_step: Callable[[Place], None],
        save: Callable[[Place, dict[str, Any]], None],
    ) -> None:
        self._worker, self._wish, self._on_step, self._save = worker, wish, on_step, save
        self._between = 60 * minutes
        self._looked = time.monotonic()
        self._next_save = self._looked + self._between
        self._until_look = self._steps_between = 1
        self._ends = False

    def is_due(self, place: Place) -> bool:
        self._on_step(place)
        self._until_look -= 1
        if self._until_look:
            return False
        now, wished = time.monotonic(), self._wish()
        steps = int(self._steps_between * SECONDS_BETWEEN_LOOKS / max(now - self._looked, 1e-9))
        verdict = [int(wished != Wish.NOTHING or now >= self._next_save), int(wished == Wish.END), max(steps, 1)]
        is_due, ends, steps = _of_the_first(verdict, self._worker)
        self._looked, self._ends = now, bool(ends)
        self._until_look = self._steps_between = steps
        return bool(is_due)

    def save(self, place: Place, state: dict[str, Any]) -> None:
        began = time.monotonic()
        self._save(place, state)
        now = time.monotonic()
        self._next_save = now + max(self._between, (now - began) * (1 / MOST_OF_THE_TIME - 1))
        if self._ends:
            raise AskedToEndError


def _of_the_first(numbers: list[int], worker: Worker) -> list[int]:
    """What the first worker gives."""
    if not torch.distributed.is_initialized():
        return numbers
    is_nccl = torch.distributed.get_backend() == "nccl"
    told = torch.tensor(numbers, device=worker.device if is_nccl else "cpu")
    torch.distributed.broadcast(told, 0)
    return told.tolist()


def _give_memory_back() -> None:
    """Hand what validation took, and freed, back to the system: glibc keeps it, in pieces that training cannot use."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _new_model(config: Config, dataset: PreparedDataset, worker: Worker) -> BERT4Rec:
    manifest, shard = dataset.manifest, None
    if config.training.shard_items:
        shard = Shard(worker.rank, worker.world_size, manifest.num_items)
        if manifest.num_items < worker.world_size:
            raise InputError(
                f"training.shard_items=true: {dataset.path} has {manifest.num_items} items for {worker.world_size} "
                "workers; expected an item for each, so set a smaller training.num_workers"
            )
    metadata = _metadata(config, dataset)
    model = BERT4Rec(config.model, manifest.num_items, manifest.catalogue, metadata, manifest.num_new_items, shard)
    if config.data.split == "temporal" and not config.data.use_full_data:
        model.trained_before = manifest.cutoffs["validation"]
    else:
        model.held_out = 0 if config.data.use_full_data else config.data.holdout
    return model


def _training_windows(config: Config, dataset: PreparedDataset, sequences: Windows, read: Sequences) -> Windows:
    windows = training_windows(sequences, config.data, read.before)
    if len(windows) == 0:
        raise InputError(
            f"{dataset.path}: none of {dataset.manifest.num_users} users has data.min_interactions="
            f"{config.data.min_interactions} interactions; nothing to train on"
        )
    if not config.data.use_full_data and len(held_out_users(sequences, config.data, "validation", read.before)) == 0:
        raise InputError(
            f"{dataset.path}: no user has data.min_interactions={config.data.min_interactions} interactions before the "
            f"validation cut-off and another one before the test cut-off (data.split_time={config.data.split_time:g}); "
            "nothing to validate on"
        )
    return windows


def _metadata(config: Config, dataset: PreparedDataset) -> Metadata:
    items = dataset.items()
    titles = None
    if config.model.use_title_emb:
        titles = read_vectors_of(config.embeddings_path, items.ids.cast(pa.string()), config.data.memory_mb)
    return Metadata.of(config.model, items, titles)


def _note_best(state: dict[str, Any], metrics: dict[str, float], monitor: str) -> None:
    """Keep the history and what early stopping needs to know."""
    sign = -1 if monitor == "train_loss" else 1
    state["history"].append(metrics)
    if state["best"] is None or sign * metrics[monitor] > sign * state["best"]:
        state["best"], state["validations_since_best"] = metrics[monitor], 0
        state["improvements"] += 1
    else:
        state["validations_since_best"] += 1


def _should_stop(config: Config, state: dict[str, Any]) -> bool:
    training = config.training
    return (
        training.early_stopping
        and not config.data.use_full_data
        and state["validations_since_best"] >= training.early_stopping_patience
    )


def _report(
    model: BERT4Rec,
    state: dict[str, Any],
    optimizers: list[torch.optim.Optimizer],
    scaler: Any,  # noqa: ANN401
    metrics: dict[str, float],
    config: Config,
    dataset: PreparedDataset,
    worker: Worker,
    report: Report,
) -> None:
    """Report the metrics and a checkpoint: a model directory and the state to resume from."""
    name = checkpoint_name(metrics, config.monitor)
    # What Ray keeps the best checkpoint by: of equal epochs the first is best, as early stopping has it.
    metrics = {**metrics, "improvement": 0 if state["validations_since_best"] else state["improvements"]}
    directory = write_checkpoint(model, state, optimizers, scaler, worker.rank)
    if worker.rank == 0:
        assert directory is not None
        # The catalogue and the card make the directory one that can be handed over.
        storage.write_bytes(storage.join(directory, ITEMS), storage.read_bytes(dataset.items_file))
        card = model_card(model, config, dataset.manifest, dataset.items(), metrics, name)
        storage.write_bytes(storage.join(directory, CARD), card.encode())
    report(metrics, name, directory, in_background=False)


def _summary(metrics: dict[str, float], monitor: str) -> str:
    names = dict.fromkeys([monitor, "train_loss"])  # a narrow terminal cuts the end
    return "".join(f", {name} {metrics[name]:.4f}" for name in names)
