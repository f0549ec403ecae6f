"""Training on Ray Train: the driver, the worker's loop, an epoch, validation.

The run's directory is Ray Train's own (`<storage_path>/<run name>`): the best and the last checkpoint, each a model
directory, `config.yaml` (the settings, as `--config` takes them), and `run.json`, written last.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import torch
import torch.distributed
import yaml
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import Tensor, nn

from bert4rec import storage, workers
from bert4rec.batches import Step, Windows, held_out, iter_steps, training_windows
from bert4rec.config import Config, TrainingConfig
from bert4rec.dataset import Manifest, PreparedDataset
from bert4rec.items import Metadata
from bert4rec.metrics import RankCounts
from bert4rec.model import BERT4Rec
from bert4rec.progress import Progress, Reporter
from bert4rec.scoring import Exclusions, rank_of_target, score_next
from bert4rec.storage import InputError
from bert4rec.tensorboard import TensorBoardLog

RUN = "run.json"
RUN_CONFIG = "config.yaml"
RUN_IDENTITY = "identity.json"
STATE = "training_state.pt"
VALIDATION_USERS = 512
"""Users ranked at once in validation."""
PASS_TOKENS = {"cpu": 8_192, "cuda": 131_072}
"""Padded tokens in one forward and backward pass: small enough for the caches of a CPU, large enough to fill a GPU."""


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
        f"{config.data_name}-{storage.fingerprint([manifest.fingerprint, _what_shapes_the_result(config)])[:8]}"
    )


def train(config: Config, dataset_path: str) -> TrainResult:
    """Train to the end, going on from the last checkpoint of a run of the same name, if there is one.

    Raises
    ------
    InputError
        If the run's name belongs to a training with other settings or data, training diverges, or the cluster lacks
        what was asked for.
    ray.train.TrainingFailedError
        If workers fail more than training.max_failures times.
    """
    dataset = PreparedDataset(dataset_path)
    manifest = dataset.manifest
    config = with_features(config, manifest)
    name = run_name(config, manifest)
    run_path = storage.join(storage.absolute(config.run.storage_path), name)
    finished = _open_run(config, manifest, run_path)
    if finished is not None:
        print(f"run {name} is already trained")
        return finished

    use_gpu, cpus = workers.for_training(config.training)
    # The controller polls at this interval, and every report waits for it: the default of 2 s would cost 2 s an epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    began = time.monotonic()
    log = TensorBoardLog(run_path)
    with Progress("training", config.training.num_epochs, "epochs", log.record) as reporter:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"config": config, "dataset_path": dataset_path, "reporter": reporter},
            scaling_config=ScalingConfig(
                num_workers=config.training.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage.absolute(config.run.storage_path),
                # Threads that wait by spinning made a step 10 to 17 times slower as soon as others used the cores too.
                worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
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
    log.close(config, manifest, trained.best_metrics)
    storage.write_json(storage.join(run_path, RUN), asdict(trained))
    return trained


def with_features(config: Config, manifest: Manifest) -> Config:
    """The config with the metadata features that can be used; what has no file is switched off, which is said."""
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
    return config.model_copy(update={"model": config.model.model_copy(update=features)})


def checkpoint_name(metrics: dict[str, float], monitor: str) -> str:
    """Such as bert4rec-05-0.1234: the epoch, from 1, and the monitored metric."""
    return f"bert4rec-{int(metrics['epoch']):02d}-{metrics[monitor]:.4f}"


def learning_rate(training: TrainingConfig, epochs_done: float) -> float:
    """The learning rate after `epochs_done` epochs, fractions included."""
    if epochs_done < training.warmup_epochs:
        return training.lr * epochs_done / training.warmup_epochs
    if training.scheduler == "constant":
        return training.lr
    share = (epochs_done - training.warmup_epochs) / max(training.num_epochs - training.warmup_epochs, 1e-9)
    share = min(share, 1.0)
    return training.lr * (1 - share if training.scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2)


def _what_shapes_the_result(config: Config) -> dict[str, Any]:
    """The settings that change the trained model, by key; where the data lie and the hardware do not."""
    keys = config.model_dump(
        include={"data", "model", "training", "evaluation"},
        exclude={
            "data": {"data_dir", "data_file", "memory_mb"},
            "training": {"accelerator", "cpus_per_worker", "max_failures"},
            "evaluation": {"split"},
        },
    )
    settings = {f"{group}.{key}": value for group, fields in keys.items() for key, value in fields.items()}
    if config.model.use_title_emb:
        settings["title embeddings"] = hashlib.sha256(storage.read_bytes(config.embeddings_path)).hexdigest()[:16]
    return settings


def _open_run(config: Config, manifest: Manifest, run_path: str) -> TrainResult | None:
    """The result of a run that is finished; refuses one of other settings or data, marks a new one."""
    identity_path = storage.join(run_path, RUN_IDENTITY)
    wanted = json.loads(json.dumps({"dataset": manifest.fingerprint, **_what_shapes_the_result(config)}))
    if not storage.exists(identity_path):
        storage.check_writable(run_path)
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        storage.write_bytes(storage.join(run_path, RUN_CONFIG), settings.encode())
        storage.write_json(identity_path, wanted)
        return None
    found = storage.read_json(identity_path)
    differing = [
        f"{key} was {found.get(key)}, is {wanted.get(key)}"
        for key in sorted(found | wanted)
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise InputError(
            f"{run_path}: this run was begun with other settings ({'; '.join(differing)}); "
            "choose another run.name, or delete the directory"
        )
    if not storage.exists(storage.join(run_path, RUN)):
        print(f"continuing run {run_path}")
        return None
    return TrainResult(**storage.read_json(storage.join(run_path, RUN)))


def _train_worker(loop: dict[str, Any]) -> list[dict[str, float]] | str:
    """What each worker runs: the history, or the user's problem, which is not raised so that Ray does not try again."""
    try:
        return _run_epochs(loop["config"], PreparedDataset(loop["dataset_path"]), loop["reporter"])
    except InputError as error:
        return str(error)


def _run_epochs(config: Config, dataset: PreparedDataset, reporter: Reporter) -> list[dict[str, float]]:
    training, context = config.training, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.manual_seed(config.data.seed)
    manifest = dataset.manifest
    metadata = _metadata(config, dataset)
    model = BERT4Rec(config.model, manifest.num_items, manifest.catalogue, metadata, manifest.num_new_items)
    sequences = Windows.from_sequences(dataset.sequences(config.data.memory_mb))
    windows = training_windows(sequences, config.data)
    if len(windows) == 0:
        raise InputError(
            f"{dataset.path}: none of {manifest.num_users} users has data.min_interactions="
            f"{config.data.min_interactions} interactions; nothing to train on"
        )

    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "improvements": 0, "validations_since_best": 0}
    checkpoint = ray.train.get_checkpoint()
    optimizer_state = scaler_state = None
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            model.load_state_dict(BERT4Rec.from_pretrained(directory).state_dict())
            loaded = _load_state(directory)
        optimizer_state, scaler_state = loaded.pop("optimizer"), loaded.pop("scaler")
        state = loaded
        if rank == 0:
            reporter.skip(state["epoch"])
    wrapped = prepare_model(model)
    optimizer = make_optimizer(model, training)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "16-mixed")  # type: ignore[attr-defined]
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
        scaler.load_state_dict(scaler_state or {})

    last_validation = ""
    steps_an_epoch = math.ceil(len(windows) / config.data.batch_size)
    while state["epoch"] < training.num_epochs and not _should_stop(config, state):
        epoch = state["epoch"]
        torch.manual_seed(config.data.seed + 1_000_003 * (epoch + 1) + rank)  # dropout, the same in a resumed run
        began = time.monotonic()
        sums = torch.zeros(2, dtype=torch.float64)  # loss, targets
        num_tokens = 0
        wrapped.train()
        steps = iter_steps(
            windows,
            config.data,
            config.model,
            dataset.num_items,
            epoch,
            rank,
            world_size,
            PASS_TOKENS[device.type],
            device,
            manifest.num_new_items,
        )
        for step_index, step in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, epoch + (step_index + 1) / steps_an_epoch)
            sums += train_step(wrapped, step, optimizer, scaler, training, world_size)
            num_tokens += step.num_tokens
            if rank == 0:
                text = f"epoch {epoch + 1} of at most {training.num_epochs}{last_validation}"
                reporter.advance(1 / steps_an_epoch, text)
        _all_reduce(sums)
        seconds = time.monotonic() - began
        metrics = {
            "epoch": epoch + 1,
            "train_loss": float(sums[0] / sums[1].clamp(min=1)),
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_second": num_tokens / seconds,
            "seconds": seconds,
        }
        if not math.isfinite(metrics["train_loss"]):
            raise InputError(
                f"training diverged: the loss of epoch {epoch + 1} is {metrics['train_loss']} at learning rate "
                f"{metrics['lr']:g}; try a smaller training.lr or training.gradient_clip_val=1"
            )
        state["epoch"] = epoch + 1
        if state["epoch"] % training.val_check_interval and state["epoch"] < training.num_epochs:
            continue
        if not config.data.use_full_data:
            metrics |= _validate(model, sequences, config, device)
        _note_best(state, metrics, config.monitor)
        _report(model, state, optimizer, scaler, metrics, config.monitor)
        if rank == 0:
            reporter.record(metrics)
            last_validation = _summary(metrics, config.monitor)
            reporter.advance(
                0, f"epoch {state['epoch']} of at most {training.num_epochs}{last_validation}", always=True
            )
    history: list[dict[str, float]] = state["history"]
    return history


def _metadata(config: Config, dataset: PreparedDataset) -> Metadata:
    items = dataset.items()
    titles = None
    if config.model.use_title_emb:
        from bert4rec.vectors import read_vectors

        ids, vectors = read_vectors(config.embeddings_path)
        row = pc.index_in(items.ids.cast(pa.string()), ids.cast(pa.string())).fill_null(-1).to_numpy()
        titles = np.where(row[:, None] >= 0, vectors[row], np.float32(0))
    return Metadata.of(config.model, items, titles)


def train_step(
    model: nn.Module,
    step: Step,
    optimizer: torch.optim.Optimizer,
    scaler: Any,  # noqa: ANN401 - torch.amp.GradScaler, which torch does not export
    training: TrainingConfig,
    world_size: int = 1,
) -> Tensor:
    """One optimiser step; [2] this worker's sum of the loss, and its number of targets.

    The gradient is the mean over the targets of the whole step: each worker's loss is its sum over their number, times
    the number of workers, over which DDP takes the mean.
    """
    is_distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    device = next(model.parameters()).device
    dtype = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[training.precision]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    optimizer.zero_grad(set_to_none=True)
    for index, batch in enumerate(step.batches):
        is_last = index == len(step.batches) - 1
        with model.no_sync() if is_distributed and not is_last else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
                loss = model(batch.tokens, batch.query, batch.labels)
            scaler.scale(loss * (world_size / max(step.num_targets, 1))).backward()
        sums += torch.stack([loss.detach(), (batch.labels > 0).sum()])
    if training.gradient_clip_val is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip_val)
    scaler.step(optimizer)
    scaler.update()
    return sums.cpu()


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimiser over all parameters of `model`."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and norms are not decayed
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return kind(groups, lr=training.lr, fused=True)


def _validate(model: BERT4Rec, sequences: Windows, config: Config, device: torch.device) -> dict[str, float]:
    """Metrics over all users; each worker ranks its share, and the counts of ranks are summed, which is exact."""
    context = ray.train.get_context()
    histories, targets = held_out(sequences, config.data, "validation")
    mine = torch.arange(context.get_world_rank(), len(histories), context.get_world_size())
    ranks = RankCounts.empty(model.num_items)
    token_counts = torch.zeros(model.num_items + 1, dtype=torch.int64)
    model.eval()
    for users in torch.split(mine, VALIDATION_USERS):
        batch = histories.users(users).to(device)
        exclusions = Exclusions.of(batch if config.evaluation.exclude_seen else None, device=device)
        ranks.add(rank_of_target(score_next(model, batch), exclusions, targets[users].to(device), model.num_items))
        if model.metadata_shape:
            read = Windows(batch.items, torch.maximum(batch.start, batch.end - model.config.max_len + 1), batch.end)
            token_counts += torch.bincount(read.flat()[1].cpu(), minlength=len(token_counts))
    _all_reduce(ranks.counts)
    _all_reduce(token_counts)
    return ranks.metrics("val_") | _mean_gates(model, token_counts)


@torch.inference_mode()
def _mean_gates(model: BERT4Rec, token_counts: Tensor) -> dict[str, float]:
    """val_gate/FEATURE: mean gate over the items that validation read, each as often as it was read."""
    if not model.metadata_shape or model.config.metadata_fusion != "gate":
        return {}
    tokens = torch.nonzero(token_counts).flatten()
    weights = token_counts[tokens].double() / token_counts.sum()
    gates = model.items.gates(tokens.to(model.output_bias.device)).cpu().double()
    return {f"val_gate/{name}": float(mean) for name, mean in zip(model.items.features, weights @ gates, strict=True)}


def _all_reduce(sums: Tensor) -> None:
    """Sum over all workers, in place."""
    if ray.train.get_context().get_world_size() == 1:
        return
    on_device = sums.to(ray.train.torch.get_device())
    torch.distributed.all_reduce(on_device)
    sums.copy_(on_device)


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
    optimizer: torch.optim.Optimizer,
    scaler: Any,  # noqa: ANN401
    metrics: dict[str, float],
    monitor: str,
) -> None:
    """Report the metrics, and from rank 0 a checkpoint: a model directory and the state to resume from."""
    name = checkpoint_name(metrics, monitor)
    # What Ray keeps the best checkpoint by: of equal epochs the first is best, as early stopping has it.
    metrics = {**metrics, "improvement": 0 if state["validations_since_best"] else state["improvements"]}
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(metrics, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        resume = {**state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save(resume, os.path.join(directory, STATE))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory), checkpoint_dir_name=name)


def _load_state(directory: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(os.path.join(directory, STATE), map_location="cpu", weights_only=True)
    return state


def _summary(metrics: dict[str, float], monitor: str) -> str:
    text = f", train_loss {metrics['train_loss']:.4f}"
    if monitor != "train_loss":
        text += f", {monitor} {metrics[monitor]:.4f}"
    return f"{text}, {metrics['tokens_per_second']:,.0f} tokens/s"
