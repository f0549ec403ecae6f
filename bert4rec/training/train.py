"""Training on Ray Train: what the driver decides before and after, and how `worker.py` runs in Ray Train's workers.

The run's directory is Ray Train's own (`<storage_path>/<run name>`): the best and the last checkpoint, each a model
directory with its catalogue and card, `config.yaml` (the settings, as `--config` takes them), and `run.json`, written
last.
"""

import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental import internal_kv

from bert4rec import lease, storage
from bert4rec.cluster import resources
from bert4rec.config import Config, EvaluationConfig
from bert4rec.data.dataset import Manifest, PreparedDataset
from bert4rec.data.features import FEATURES
from bert4rec.errors import InputError
from bert4rec.progress import Progress
from bert4rec.runs import RUN, begin_directory, checkpoint_name, remove_abandoned
from bert4rec.training.mlflow import MLflowLog
from bert4rec.training.tensorboard import TensorBoardLog

if TYPE_CHECKING:
    from ray.train import UserCallback

    from bert4rec.inference.ranking import Ranking
    from bert4rec.training.worker import Wish

_COUNTED_AT_DEFAULT = {
    "data": "batch_size min_interactions use_full_data sampling_strategy include_new_items min_item_interactions split "
    "split_time holdout seed",
    "model": "hidden_units num_heads num_layers max_len dropout_rate random_mask_prob last_item_mask_ratio "
    "share_embeddings use_genre_emb use_director_emb use_writer_emb use_title_emb metadata_fusion metadata_dropout "
    "output_features",
    "training": "num_epochs lr weight_decay optimizer scheduler warmup_epochs loss num_negatives negative_sampling "
    "gbce_t gradient_clip_val monitor_metric early_stopping early_stopping_patience val_check_interval precision",
    "evaluation": "exclude_seen",
}
"""The keys of the first version, whose runs are named after all of them. No key is added here: any other counts only
where it is set, so that a new key renames no run. The number of workers, which the machine chooses, does so too: the
same command goes on with its run on another machine."""
WORKER_ENVIRONMENT = {
    # OpenMP's threads spin for a while before they sleep. The default makes a step 7 times slower where other processes
    # use the cores too; no spinning at all makes it up to a third slower on idle cores.
    "GOMP_SPINCOUNT": "10000",
    # glibc keeps freed blocks up to this size for the next step, instead of asking the system for them anew.
    "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(1024 * 2**20),
}
SECONDS_TO_SAVE = 25
"""How long a driver that got SIGTERM waits for the last checkpoint: Kubernetes kills 30 s after it."""
HEAVY = ("bert4rec.training.trainer",)
"""What takes seconds to import: done while Ray starts, and not at all where a run is found finished."""


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
    callbacks: Sequence["UserCallback"] = (),
    sequences: ray.ObjectRef | None = None,
    fingerprint: str | None = None,
    is_held: bool = False,
) -> TrainResult:
    """Train to the end, going on from the last checkpoint of a run of the same name, if there is one.

    Parameters
    ----------
    callbacks : sequence of UserCallback
        Told of each report, in Ray Train's controller.
    sequences : ObjectRef
        The dataset's `Sequences`, where they were read already for several trainings.
    fingerprint : str
        The dataset's, where the caller has opened it before.
    is_held : bool
        Whether the caller holds the run's directory: a sweep holds those of its trials.

    Raises
    ------
    InputError
        If the run's name belongs to a training with other settings or data, another job trains it, training diverges,
        or the cluster lacks what was asked for.
    ray.train.TrainingFailedError
        If workers fail more than training.max_failures times.
    SystemExit
        With 143, if this process got SIGTERM; a checkpoint is saved.
    """
    dataset = PreparedDataset(dataset_path, verify=True, fingerprint=fingerprint)
    manifest = dataset.manifest
    config = with_features(config, manifest)
    check_times(config, dataset)
    if config.training.start_from is not None:
        from bert4rec.training.warm_start import check_start

        check_start(config, manifest)
    name = run_name(config, manifest)
    run_path = storage.join(storage.absolute(config.run.storage_path), name)
    if storage.exists(storage.join(run_path, RUN)) and (finished := _open_run(config, manifest, run_path)) is not None:
        print(f"run {name} is already trained")
        return finished
    with nullcontext() if is_held else lease.held(run_path):
        if (finished := _open_run(config, manifest, run_path)) is not None:
            return finished  # another job has trained it since the line before
        return _train(config, dataset, run_path, callbacks, sequences)


def _train(
    config: Config,
    dataset: PreparedDataset,
    run_path: str,
    callbacks: Sequence["UserCallback"],
    sequences: ray.ObjectRef | None,
) -> TrainResult:
    """Train in `run_path`, which is open."""
    manifest, name = dataset.manifest, os.path.basename(run_path)
    resources.begin(config, meanwhile=HEAVY)
    ranking = sorted_rules(config, dataset)
    places = resources.for_training(config)
    cores = f"{places.cpus_per_worker} CPU core{'s' * (places.cpus_per_worker > 1)}"
    plural = "s" * (places.num_workers > 1)
    print(f"training {name}: {places.num_workers} worker{plural} of {cores}{' and a GPU' * places.use_gpu}")
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
        end_key = f"bert4rec-end-{uuid.uuid4().hex}".encode()
        loop = {
            "config": config,
            "dataset_path": dataset.path,
            "fingerprint": manifest.fingerprint,
            "reporter": reporter,
            "sequences": sequences,
            "ranking": ranking,
            "num_threads": places.cpus_per_worker,
            "end_key": end_key,
            # Every look at it waits for all workers, so only where Ray looks itself.
            "may_lose_nodes": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0",
        }
        remove_abandoned(run_path)
        with _saving_on_sigterm(end_key):
            result = _trainer(config, name, places, loop, callbacks).fit()
        if isinstance(result.return_value, str):
            raise InputError(result.return_value)
        if result.return_value is None:
            print(f"stopped by SIGTERM; a checkpoint is saved, and the same command continues run {name}")
            sys.exit(128 + signal.SIGTERM)
        unless_trained.pop_all()
    remove_abandoned(run_path)
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


def _trainer(
    config: Config, name: str, places: resources.Places, loop: dict[str, Any], callbacks: Sequence["UserCallback"]
) -> Any:  # noqa: ANN401 - a TorchTrainer
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from bert4rec.training.trainer import ProcessGroup, Trainer

    # The controller polls at this interval, and every report waits for it: the default of 2 s would cost 2 s an epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    fewest = config.training.min_workers
    return Trainer(
        train_worker,
        train_loop_config=loop,
        scaling_config=ScalingConfig(
            num_workers=(fewest, places.num_workers) if fewest else places.num_workers,
            use_gpu=places.use_gpu,
            resources_per_worker={"CPU": places.cpus_per_worker, **({"GPU": 1} if places.use_gpu else {})},
        ),
        backend_config=ProcessGroup("nccl" if places.use_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=storage.absolute(config.run.storage_path),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=config.training.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1,  # the best; Ray keeps the last one besides
                checkpoint_score_attribute="improvement",
            ),
        ),
    )


@contextmanager
def _saving_on_sigterm(end_key: bytes) -> Iterator[None]:
    """Inside this block, the first SIGTERM asks the workers to save and to end; the next one ends this process."""
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep
        yield
        return
    before = signal.getsignal(signal.SIGTERM)  # Ray's, which exits

    too_late = threading.Timer(SECONDS_TO_SAVE, os.kill, (os.getpid(), signal.SIGTERM))
    too_late.daemon = True

    def ask(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        print("SIGTERM: saving a checkpoint", flush=True)
        too_late.start()
        internal_kv._internal_kv_put(end_key, b"1")

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        too_late.cancel()
        signal.signal(signal.SIGTERM, before)


def _wish(end_key: bytes, may_lose_nodes: bool) -> Callable[[], "Wish"]:
    """What a worker is asked for: the driver got SIGTERM, or a node of the workers is drained before it goes."""
    from bert4rec.training.worker import Wish

    saved_for = None

    def wish() -> Wish:
        nonlocal saved_for
        drained = ray.train.get_preemption_info() if may_lose_nodes else None
        is_new = drained is not None and drained != saved_for
        saved_for = drained
        if internal_kv._internal_kv_exists(end_key):
            return Wish.END
        return Wish.SAVE if is_new else Wish.NOTHING

    return wish


def train_worker(loop: dict[str, Any]) -> list[dict[str, float]] | str | None:
    """What each of Ray Train's workers runs: the history, the text of an `InputError`, or None if asked to end.

    The error is returned, not raised, so that Ray does not try again.
    """
    import ray.train.torch
    import torch

    from bert4rec.training.loop import DDP_OPTIONS, Worker
    from bert4rec.training.worker import AskedToEndError, read_sequences, run_epochs

    def report(metrics: dict[str, float], name: str, directory: str | None, in_background: bool) -> None:
        checkpoint = None if directory is None else ray.train.Checkpoint.from_directory(directory)
        mode = ray.train.CheckpointUploadMode.ASYNC if in_background else ray.train.CheckpointUploadMode.SYNC
        try:
            ray.train.report(metrics, checkpoint, name, mode)
        finally:
            if directory is not None and not in_background:  # Ray removes it behind an upload in the background
                shutil.rmtree(directory)

    context, checkpoint = ray.train.get_context(), ray.train.get_checkpoint()
    device = ray.train.torch.get_device()
    torch.set_num_threads(loop["num_threads"])
    if device.type == "cuda":  # a node's workers see all of its GPUs; each sums up on its own
        torch.cuda.set_device(device)
    try:
        config = loop["config"]
        dataset = PreparedDataset(loop["dataset_path"], fingerprint=loop["fingerprint"])
        shared = loop["sequences"]
        with ExitStack() as stack:
            return run_epochs(
                config,
                dataset,
                read_sequences(config, dataset) if shared is None else ray.get(shared),
                report=report,
                progress=loop["reporter"],
                worker=Worker(context.get_world_rank(), context.get_world_size(), device),
                resume_from=None if checkpoint is None else stack.enter_context(checkpoint.as_directory()),
                wrap=lambda model: ray.train.torch.prepare_model(model, parallel_strategy_kwargs=DDP_OPTIONS),
                wish=_wish(loop["end_key"], loop["may_lose_nodes"]),
                ranking=loop["ranking"],
            )
    except InputError as error:
        return str(error)
    except AskedToEndError:
        return None


def with_features(config: Config, manifest: Manifest) -> Config:
    """The config with absolute paths. A metadata feature that has no file is switched off, and a note says so."""
    features: dict[str, bool] = {}
    for name, feature in FEATURES.items():
        wanted = getattr(config.model, f"use_{name}_emb")
        features[f"use_{name}_emb"] = wanted and bool(manifest.vocabularies[name])
        if wanted and not manifest.vocabularies[name]:
            print(f"note: model.use_{name}_emb is switched off: the data has no {feature.file}.tsv")
    has_titles = storage.exists(config.embeddings_path)
    features["use_title_emb"] = has_titles and config.model.use_title_emb is not False
    if config.model.use_title_emb and not has_titles:
        print(f"note: model.use_title_emb is switched off: there is no {config.embeddings_path} (python -m jobs.embed)")
    elif config.model.use_title_emb is None and has_titles:
        print(f"note: model.use_title_emb is on, as there is {config.embeddings_path}")
    if config.data.include_new_items and not any(features.values()):
        raise InputError(
            "data.include_new_items=true needs metadata to tell the new items apart, and none is used; set "
            f"one of {', '.join(f'model.use_{name}_emb' for name in FEATURES)}, or make title embeddings "
            "(python -m jobs.embed)"
        )
    embedding = config.embedding.model_copy(
        update={"output_path": config.embeddings_path}
    )  # workers have other folders
    training = config.training
    if training.start_from is not None:
        training = training.model_copy(update={"start_from": storage.absolute(training.start_from)})
    model = config.model.model_copy(update=features)
    return config.model_copy(update={"model": model, "embedding": embedding, "training": training})


def check_times(config: Config, dataset: PreparedDataset) -> None:
    """Check that the data have the times that model.time_encoding reads.

    Raises
    ------
    InputError
        If they have none, or one time for all interactions, of which there is nothing to learn.
    """
    if not config.model.time_parts:
        return
    first, last = dataset.time_span()
    if first == last:
        raise InputError(
            f"{dataset.path}: all interactions have the same time, {first}; expected different times, of which "
            f"model.time_encoding={config.model.time_encoding} could learn, or model.time_encoding=none"
        )


def validation_rules(config: Config) -> "Ranking | None":
    """The rules on what users may get, where validation obeys them; training does not know the others."""
    if not config.evaluation.candidates or config.data.use_full_data:
        return None
    from bert4rec.inference.ranking import NO_RULES, Ranking

    ranking = Ranking.of(config.inference)
    return replace(
        NO_RULES,
        exclude_seen=config.evaluation.exclude_seen,
        exclude_future=ranking.exclude_future,
        candidates=ranking.candidates,
        candidates_default=ranking.candidates_default,
        exclude=ranking.exclude,
    )


def sorted_rules(config: Config, dataset: PreparedDataset) -> "Ranking | None":
    """`validation_rules`, whose lists of users Ray Data has sorted."""
    if (ranking := validation_rules(config)) is None:
        return None
    from bert4rec.inference.sort_lists import sort_lists

    ranking, _ = sort_lists(ranking, dataset)
    return ranking


def what_shapes_the_result(config: Config) -> dict[str, Any]:
    """The settings that change the trained model, by key; where the data lie and the hardware do not."""
    keys = config.model_dump(
        include={"data", "model", "training", "evaluation"},
        exclude={
            "data": {"data_dir", "data_file", "memory_mb"},
            "training": {
                "accelerator",
                "checkpoint_minutes",
                "cpus_per_worker",
                "max_failures",
                "min_workers",
                "start_from",
            },
            "evaluation": set(EvaluationConfig.model_fields) - {"exclude_seen", "query_time"},
        },
    )
    settings = {
        f"{group}.{key}": value
        for group, values in keys.items()
        for key, value in values.items()
        if key in _COUNTED_AT_DEFAULT[group].split() or value != type(getattr(config, group)).model_fields[key].default
    }
    if not config.model.time_parts:
        settings.pop("evaluation.query_time", None)
    if (ranking := validation_rules(config)) is not None:
        settings["rules of the validation"] = storage.fingerprint(ranking.identity())
    if config.model.use_title_emb:
        settings["title embeddings"] = storage.sha256(config.embeddings_path)[:16]
    if config.training.start_from is not None:
        from bert4rec.model.network import weights_of

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
