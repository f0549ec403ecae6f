"""Training on Ray Train: the driver, and the worker's loop around `loop.py`.

The run's directory is Ray Train's own (`<storage_path>/<run name>`): the best and the last checkpoint, each a model
directory with its catalogue and card, `config.yaml` (the settings, as `--config` takes them), and `run.json`, written
last.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from bert4rec import storage
from bert4rec.cluster import resources
from bert4rec.config import Config, EvaluationConfig
from bert4rec.data.dataset import ITEMS, Manifest, PreparedDataset, Sequences
from bert4rec.data.ids import find_ids, some_of
from bert4rec.data.vectors import read_vectors
from bert4rec.data.windows import Windows, held_out_users, item_counts, training_windows
from bert4rec.errors import InputError
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.losses import make_loss
from bert4rec.model.network import BERT4Rec
from bert4rec.progress import Progress, Reporter
from bert4rec.runs import RUN, begin_directory
from bert4rec.training.card import CARD, model_card
from bert4rec.training.loop import make_optimizers, train_epoch, validate
from bert4rec.training.mlflow import MLflowLog
from bert4rec.training.tensorboard import TensorBoardLog
from bert4rec.training.warm_start import begin_from, check_start, weights_of

STATE = "training_state.pt"
STATE_HASH = "training_state.sha256"  # as sha256sum writes and checks it


@dataclass(frozen=True)
class TrainResult:
    """What a finished training left behind."""

    run_path: str
    best_checkpoint: str
    """Model directory."""
    last_checkpoint: str
    best_metrics: dict[str, float]
    """Of the best epoch; `epoch` counts from 1."""
    history: list[dict[str, float]]
    """Metrics of each validated epoch."""
    seconds: float
    """Wall time of this call's training."""


def run_name(config: Config, manifest: Manifest) -> str:
    """run.name, or a name that is the same for the same data and settings, and another for others."""
    return config.run.name or (
        f"{config.data_name}-{storage.fingerprint([manifest.fingerprint, what_shapes_the_result(config)])[:8]}"
    )


def train(
    config: Config,
    dataset_path: str,
    callbacks: Sequence[UserCallback] = (),
    sequences: ray.ObjectRef | None = None,
) -> TrainResult:
    """Train to the end, going on from the last checkpoint of a run of the same name, if there is one.

    Parameters
    ----------
    callbacks : sequence of UserCallback
        Told of each report, in Ray Train's controller.
    sequences : ObjectRef
        The dataset's `Sequences`, where they were read already for several trainings.

    Raises
    ------
    InputError
        If the run's name belongs to a training with other settings or data, training diverges, or the cluster lacks
        what was asked for.
    ray.train.TrainingFailedError
        If workers fail more than training.max_failures times.
    """
    dataset = PreparedDataset(dataset_path, verify=True)
    manifest = dataset.manifest
    config = with_features(config, manifest)
    if config.training.start_from is not None:
        check_start(config, manifest)
    name = run_name(config, manifest)
    run_path = storage.join(storage.absolute(config.run.storage_path), name)
    finished = _open_run(config, manifest, run_path)
    if finished is not None:
        print(f"run {name} is already trained")
        return finished

    use_gpu, cpus = resources.for_training(config.training)
    fewest, most = config.training.min_workers, config.training.num_workers
    # The controller polls at this interval, and every report waits for it: the default of 2 s would cost 2 s an epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    began = time.monotonic()
    log = TensorBoardLog(run_path)
    mlflow = MLflowLog(config, run_path, name) if config.run.mlflow_uri else None

    def record(metrics: dict[str, float]) -> None:
        log.record(metrics)
        if mlflow is not None:
            mlflow.record(metrics)

    with ExitStack() as unless_trained, Progress("training", config.training.num_epochs, "epochs", record) as reporter:
        if mlflow is not None:
            unless_trained.callback(mlflow.close, None)
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "config": config,
                "dataset_path": dataset_path,
                "reporter": reporter,
                "sequences": sequences,
            },
            scaling_config=ScalingConfig(
                num_workers=(fewest, most) if fewest else most,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage.absolute(config.run.storage_path),
                # How long threads spin while they wait for each other: by default so long that a step takes 7 times
                # as long where others use the cores too; not at all, and it takes up to a third longer on idle ones.
                worker_runtime_env={"env_vars": {"GOMP_SPINCOUNT": "10000"}},
                callbacks=list(callbacks),
                failure_config=FailureConfig(max_failures=config.training.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=1,  # the best; Ray keeps the last one besides
                    checkpoint_score_attribute="improvement",
                ),
            ),
        )
        result = trainer.fit()
        if isinstance(result.return_value, str):
            raise InputError(result.return_value)
        unless_trained.pop_all()
    history = result.return_value
    best, _ = result.best_checkpoints[-1]
    best_name = os.path.basename(best.path)
    trained = TrainResult(
        run_path=run_path,
        best_checkpoint=storage.join(run_path, best_name),
        last_checkpoint=storage.join(run_path, os.path.basename(result.checkpoint.path)),
        best_metrics=next(m for m in reversed(history) if checkpoint_name(m, config.monitor) == best_name),
        history=history,
        seconds=time.monotonic() - began,
    )
    log.close(config, manifest, trained.best_metrics, history)
    if mlflow is not None:
        mlflow.close(trained.best_metrics)
    # Names, not paths: a run's directory may be moved.
    names = {key: os.path.basename(getattr(trained, key)) for key in ("best_checkpoint", "last_checkpoint")}
    storage.write_json(storage.join(run_path, RUN), asdict(trained) | names)
    return trained


def with_features(config: Config, manifest: Manifest) -> Config:
    """The config with absolute paths, and with the metadata features that can be used; what has no file is switched
    off, which is said."""
    features: dict[str, bool] = {}
    for name, plural, vocabulary in (
        ("genre", "genres", manifest.genres),
        ("director", "directors", manifest.directors),
        ("writer", "writers", manifest.writers),
    ):
        wanted = getattr(config.model, f"use_{name}_emb")
        features[f"use_{name}_emb"] = wanted and bool(vocabulary)
        if wanted and not vocabulary:
            print(f"note: model.use_{name}_emb is switched off: the data has no {plural}.tsv")
    has_titles = storage.exists(config.embeddings_path)
    features["use_title_emb"] = has_titles and config.model.use_title_emb is not False
    if config.model.use_title_emb and not has_titles:
        print(f"note: model.use_title_emb is switched off: there is no {config.embeddings_path} (python -m jobs.embed)")
    elif config.model.use_title_emb is None and has_titles:
        print(f"note: model.use_title_emb is on, as there is {config.embeddings_path}")
    if config.data.include_new_items and not any(features.values()):
        raise InputError(
            "data.include_new_items=true needs metadata to tell the new items apart, and none is used; set "
            "model.use_genre_emb=true (or director, writer), or make title embeddings (python -m jobs.embed)"
        )
    embedding = config.embedding.model_copy(
        update={"output_path": config.embeddings_path}
    )  # workers have other folders
    training = config.training
    if training.start_from is not None:
        training = training.model_copy(update={"start_from": storage.absolute(training.start_from)})
    model = config.model.model_copy(update=features)
    return config.model_copy(update={"model": model, "embedding": embedding, "training": training})


def checkpoint_name(metrics: dict[str, float], monitor: str) -> str:
    """Such as bert4rec-05-0.1234: the epoch, from 1, and the monitored metric."""
    return f"bert4rec-{int(metrics['epoch']):02d}-{metrics[monitor]:.4f}"


def what_shapes_the_result(config: Config) -> dict[str, Any]:
    """The settings that change the trained model, by key; where the data lie and the hardware do not."""
    keys = config.model_dump(
        include={"data", "model", "training", "evaluation"},
        exclude={
            "data": {"data_dir", "data_file", "memory_mb"},
            "training": {"accelerator", "cpus_per_worker", "max_failures", "min_workers", "start_from"},
            "evaluation": set(EvaluationConfig.model_fields) - {"exclude_seen"},
        },
    )
    settings = {f"{group}.{key}": value for group, fields in keys.items() for key, value in fields.items()}
    if config.model.position_encoding == "learned":
        del settings["model.position_encoding"]  # runs from before there was a choice keep their names
    if config.model.use_title_emb:
        settings["title embeddings"] = hashlib.sha256(storage.read_bytes(config.embeddings_path)).hexdigest()[:16]
    if config.training.start_from is not None:
        settings["weights of training.start_from"] = weights_of(config.training.start_from)[:16]
    return settings


def _open_run(config: Config, manifest: Manifest, run_path: str) -> TrainResult | None:
    """The result of a run that is finished; refuses one of other settings or data, marks a new one."""
    if begin_directory(run_path, config, {"dataset": manifest.fingerprint, **what_shapes_the_result(config)}):
        return None
    if not storage.exists(storage.join(run_path, RUN)):
        print(f"continuing run {run_path}")
        return None
    finished = storage.read_json(storage.join(run_path, RUN)) | {"run_path": run_path}
    paths = {key: storage.inside(run_path, finished[key]) for key in ("best_checkpoint", "last_checkpoint")}
    return TrainResult(**finished | paths)


def _train_worker(loop: dict[str, Any]) -> list[dict[str, float]] | str:
    """What each worker runs: the history, or the user's problem, which is not raised so that Ray does not try again."""
    try:
        config, dataset = loop["config"], PreparedDataset(loop["dataset_path"])
        shared = loop["sequences"]
        sequences = dataset.sequences(config.data.memory_mb) if shared is None else ray.get(shared)
        return _run_epochs(config, dataset, sequences, loop["reporter"])
    except InputError as error:
        return str(error)


def _run_epochs(
    config: Config, dataset: PreparedDataset, read: Sequences, reporter: Reporter
) -> list[dict[str, float]]:
    training, context = config.training, ray.train.get_context()
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    torch.manual_seed(config.data.seed)
    manifest = dataset.manifest
    metadata = _metadata(config, dataset)
    model = BERT4Rec(config.model, manifest.num_items, manifest.catalogue, metadata, manifest.num_new_items)
    if config.data.split == "temporal" and not config.data.use_full_data:
        model.trained_before = manifest.cutoffs["validation"]
    else:
        model.held_out = 0 if config.data.use_full_data else config.data.holdout
    sequences = Windows.from_sequences(read)
    windows = training_windows(sequences, config.data, read.before)
    if len(windows) == 0:
        raise InputError(
            f"{dataset.path}: none of {manifest.num_users} users has data.min_interactions="
            f"{config.data.min_interactions} interactions; nothing to train on"
        )
    if not config.data.use_full_data and len(held_out_users(sequences, config.data, "validation", read.before)) == 0:
        raise InputError(
            f"{dataset.path}: no user has data.min_interactions={config.data.min_interactions} interactions before the "
            f"validation cut-off and another one before the test cut-off (data.split_time={config.data.split_time:g}); "
            "nothing to validate on"
        )

    counts = item_counts(windows, model.num_items)
    known = counts[: model.num_items - model.num_new_items].float()
    model.loss = make_loss(training, known if training.negative_sampling == "popularity" else None)

    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "improvements": 0, "validations_since_best": 0}
    checkpoint = ray.train.get_checkpoint()
    optimizer_states = scaler_state = None
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            weights, state = _load_checkpoint(directory)
        model.load_state_dict(weights)
        optimizer_states, scaler_state = state.pop("optimizers"), state.pop("scaler")
        if rank == 0:
            reporter.skip(state["epoch"])
    elif training.start_from is not None:
        begin_from(model, training.start_from, dataset.items().ids)
    model.get_buffer("item_counts").copy_(counts)
    wrapped = prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})  # the tables never change
    optimizers = make_optimizers(model, training)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "16-mixed")  # type: ignore[attr-defined]
    if optimizer_states is not None:
        for optimizer, saved in zip(optimizers, optimizer_states, strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(scaler_state or {})

    def on_step(step: int, num_steps: int, tokens_per_second: float) -> None:
        if rank == 0:
            place = f"epoch {state['epoch'] + 1}/{training.num_epochs}, step {step}/{num_steps}"
            reporter.advance(1 / num_steps, f"{place}, {tokens_per_second:,.0f} tokens/s{last_validation}")

    last_validation = ""
    while state["epoch"] < training.num_epochs and not _should_stop(config, state):
        metrics = train_epoch(
            wrapped, windows, config, model.num_items, model.num_new_items, state["epoch"], optimizers, scaler, on_step
        )
        state["epoch"] += 1
        if state["epoch"] % training.val_check_interval and state["epoch"] < training.num_epochs:
            continue
        if not config.data.use_full_data:
            if rank == 0:
                reporter.advance(
                    0, f"epoch {state['epoch']}/{training.num_epochs}, validating{last_validation}", always=True
                )
            metrics |= validate(model, sequences, config, read.before)
        _note_best(state, metrics, config.monitor)
        _report(model, state, optimizers, scaler, metrics, config, dataset)
        if rank == 0:
            reporter.record(metrics)
            last_validation = _summary(metrics, config.monitor)
    history: list[dict[str, float]] = state["history"]
    return history


def _metadata(config: Config, dataset: PreparedDataset) -> Metadata:
    items = dataset.items()
    titles = None
    if config.model.use_title_emb:
        ids, vectors = read_vectors(config.embeddings_path)
        row = find_ids(items.ids.cast(pa.string()), ids)
        if (row < 0).all():
            raise InputError(
                f"{config.embeddings_path}: was made for other data: none of its {len(ids):,} items, such as "
                f"{some_of(ids)}, is in the catalogue, which has {len(items.ids):,} items, such as {some_of(items.ids)}"
            )
        titles = np.where(row[:, None] >= 0, vectors[row], np.float32(0))
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
) -> None:
    """Report the metrics, and from rank 0 a checkpoint: a model directory and the state to resume from."""
    name = checkpoint_name(metrics, config.monitor)
    # What Ray keeps the best checkpoint by: of equal epochs the first is best, as early stopping has it.
    metrics = {**metrics, "improvement": 0 if state["validations_since_best"] else state["improvements"]}
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(metrics, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        # The catalogue and the card make the directory one that can be handed over.
        storage.write_bytes(storage.join(directory, ITEMS), storage.read_bytes(storage.join(dataset.path, ITEMS)))
        card = model_card(model, config, dataset.manifest, dataset.items(), metrics, name)
        storage.write_bytes(storage.join(directory, CARD), card.encode())
        states = [optimizer.state_dict() for optimizer in optimizers]
        resume = {**state, "optimizers": states, "scaler": scaler.state_dict()}
        torch.save(resume, os.path.join(directory, STATE))
        digest = storage.sha256(storage.join(directory, STATE))
        storage.write_bytes(storage.join(directory, STATE_HASH), f"{digest}  {STATE}\n".encode())
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory), checkpoint_dir_name=name)


def _load_checkpoint(directory: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, and the state to resume from.

    Raises
    ------
    InputError
        If it is missing, damaged, altered, or of an older version.
    """
    path = storage.join(directory, STATE)
    try:
        is_whole = storage.read_bytes(storage.join(directory, STATE_HASH)).decode().split()[0] == storage.sha256(path)
    except (FileNotFoundError, UnicodeDecodeError, IndexError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{path}: is missing, damaged or was altered (SHA-256 in {STATE_HASH})")
    state: dict[str, Any] = torch.load(os.path.join(directory, STATE), map_location="cpu", weights_only=True)
    if "optimizers" not in state:
        raise InputError(f"{path}: was written by an older version; train anew with another run.name")
    return BERT4Rec.from_pretrained(directory).state_dict(), state


def _summary(metrics: dict[str, float], monitor: str) -> str:
    names = dict.fromkeys([monitor, "train_loss"])  # a narrow terminal cuts the end
    return "".join(f", {name} {metrics[name]:.4f}" for name in names)
