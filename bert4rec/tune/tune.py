"""Sweeps on Ray Tune. A trial calls `train`, Ray Tune runs the trials, and the sweep's directory records them.

    <storage_path>/<sweep>/identity.json     what the sweep searches; only an equal sweep may continue it
    <storage_path>/<sweep>/trial-000/        the run of one trial (see `train.py`), and trial.json, its record
    <storage_path>/<sweep>/best_config.yaml, trials.csv, trials.parquet, plots.html, hparams/, refit/
    <storage_path>/<sweep>/sweep.json        the result; written last

Ray's own record of an experiment is in ray_tune/ while the sweep runs, and the sweep never reads it: it lacks the
scheduler's comparisons and the trials of the last seconds. The sweep records a trial before it starts and each epoch as
soon as it is reported, so a sweep killed at any time continues as if it had not been killed.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, assert_never

import pyarrow as pa
import ray
from ray import tune as ray_tune
from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from bert4rec import lease, storage
from bert4rec.cluster import errors, resources
from bert4rec.config import Config
from bert4rec.data.dataset import Manifest, PreparedDataset
from bert4rec.errors import InputError
from bert4rec.progress import duration
from bert4rec.runs import begin_directory, checkpoint_name, kept_metrics
from bert4rec.training.train import TrainResult, sorted_rules, train, what_shapes_the_result, with_features
from bert4rec.tune import outputs
from bert4rec.tune.space import Space, Trial, score, with_values

TRIAL = "trial.json"
SWEEP = "sweep.json"
SHOWN_BEST = 5
SECONDS_BETWEEN_LINES = 10.0
METRICS = ("epoch", "train_loss", "lr", "tokens_per_second", "seconds")
"""Metrics in the report of an epoch besides val_…; Ray Tune adds others."""


@dataclass(frozen=True)
class TuneResult:
    """The result of a sweep."""

    sweep_path: str
    trials: list[Trial]
    """In the order of their start."""
    best: Trial
    best_checkpoint: str
    """Model directory."""
    best_config: str
    """Config file for `--config`."""
    files: list[str]
    """Paths of tables, plots and TensorBoard's directory."""
    epochs_spared: int
    """Largest number of epochs that the stopped trials would still have trained."""
    refit: TrainResult | None
    """Training of the best settings on the full data (tune.refit)."""
    seconds: float
    """Wall time of this call."""


def sweep_name(config: Config, manifest: Manifest) -> str:
    """run.name, or a name that follows from data, settings and search."""
    return config.run.name or f"{config.data_name}-tune-{storage.fingerprint(_identity(config, manifest))[:8]}"


def tune(config: Config, dataset_path: str) -> TuneResult:
    """Run the search to its end, and continue a sweep of the same name if there is one.

    Raises
    ------
    InputError
        If the space or the search is unusable, the name belongs to a sweep with other settings or data, another job
        runs it, the cluster is too small, more than tune.max_failed_trials trials fail, or no trial reaches a
        validation.
    """
    began = time.monotonic()
    if config.data.use_full_data:
        raise InputError(
            "data.use_full_data=true leaves no validation to compare trials; tune.refit=true trains the best"
        )
    if config.tune.search == "tpe" and find_spec("optuna") is None:
        raise InputError('tune.search=tpe needs Optuna: pip install -e ".[tune]"')
    dataset = PreparedDataset(dataset_path)
    config = with_values(config, {"training.num_workers": config.training.num_workers or 1})  # trials share the cores
    resources.begin(config)
    sorted_rules(config, dataset)  # now, as trials leave no core for it
    resolved = with_features(config, dataset.manifest)
    space = Space.of(resolved)
    sweep_path = storage.join(storage.absolute(config.run.storage_path), sweep_name(resolved, dataset.manifest))
    with lease.held(sweep_path):
        trials = _open_sweep(resolved, dataset.manifest, sweep_path)
        sweep = _Sweep(space, trials, sweep_path)
        sweep.check_failures()
        if sweep.num_left:
            with resources.releasing_abandoned():
                _run_trials(sweep, dataset)
            sweep.check_failures()
        for trial in trials:
            _complete_history(trial, sweep_path)
        ranking = outputs.ranked(trials, config.monitor)
        if not ranking:
            raise InputError(f"{sweep_path}: no trial has been validated; run the same command to continue")
        best = ranking[0]
        files = [
            *outputs.write_table(space, trials, sweep_path),
            outputs.write_plots(space, trials, sweep_path),
            outputs.write_hparams(space, trials, sweep_path),
        ]
        found = best.best(config.monitor)
        result = TuneResult(
            sweep_path=sweep_path,
            trials=trials,
            best=best,
            best_checkpoint=storage.join(sweep_path, best.name, checkpoint_name(found, config.monitor)),
            best_config=outputs.write_best_config(config, best, sweep_path),
            files=[file for file in files if file is not None],
            epochs_spared=sum(space.num_epochs(t.values) - t.epochs for t in trials if t.status == "stopped"),
            refit=_refit(config, best, sweep_path, dataset) if config.tune.refit else None,
            seconds=time.monotonic() - began,
        )
        checkpoint = f"{best.name}/{os.path.basename(result.best_checkpoint)}"
        summary = {
            "best_trial": best.number,
            "best_checkpoint": checkpoint,
            "best_metrics": found,
            "values": best.values,
        }
        storage.write_json(storage.join(sweep_path, SWEEP), summary)
        return result


def table(trials: Sequence[Trial], monitor: str) -> str:
    """A table of trials, one line each."""
    return "\n".join([_header(monitor), *(_row(trial, monitor) for trial in trials)])


class _Sweep:
    """The trials and the decisions about them. It lives in the driver, where Ray Tune calls it."""

    def __init__(self, space: Space, trials: list[Trial], path: str) -> None:
        self.space, self.trials, self.path = space, trials, path
        self.config = space.config
        self.monitor = space.config.monitor
        self.waiting = [trial for trial in trials if trial.status in ("running", "crashed")]
        self.is_exhausted = False
        self._of: dict[str, Trial] = {}  # by Ray Tune's id; a continued trial has a new id
        self._began = self._last_line = time.monotonic()
        self._last_heard: dict[int, float] = {}
        self._asha = self._scheduler()
        for trial in trials:
            _complete_history(trial, path)
            known, trial.history = trial.history, []
            for metrics in known:
                trial.history.append(metrics)
                self._is_stopped_at(trial)

    @property
    def num_left(self) -> int:
        """Number of trials to run, including those to continue."""
        return len(self.waiting) + max(self.config.tune.num_trials - len(self.trials), 0)

    def next_trial(self, ray_id: str) -> Trial | None:
        """The next trial to start or to continue; None if nothing is left to try."""
        if self.waiting:
            trial = self.waiting.pop(0)
            trial.status, trial.reason = "running", ""
        else:
            values = self.space.next_values(self.trials)
            if values is None:
                self.is_exhausted = True
                return None
            trial = Trial(len(self.trials), values)
            self.trials.append(trial)
        self._save(trial)
        self._of[ray_id] = trial
        self._last_heard[trial.number] = time.monotonic()
        return trial

    def hear(self, ray_id: str, result: dict[str, Any]) -> bool:
        """Record a trial's report, and return whether to stop the trial."""
        trial = self._of[ray_id]
        if trial.status != "running":  # Ray Tune repeats the last report when a trial ends
            return trial.status == "stopped"
        if "outcome" in result:
            for metrics in result["history"]:
                trial.add(metrics)
            self.end(ray_id, result["outcome"], result["reason"])
            return False
        if "epoch" not in result:  # a checkpoint in the middle of an epoch
            return False
        if trial.add({key: value for key, value in result.items() if key in METRICS or key.startswith("val_")}):
            if self._is_stopped_at(trial):
                self.end(ray_id, "stopped")
                return True
            self._count_time(trial)
            self._save(trial)
        return False

    def end(self, ray_id: str, status: Any, reason: str = "") -> None:  # noqa: ANN401
        """Record how a trial ended."""
        trial = self._of[ray_id]
        trial.status, trial.reason = status, reason
        self._count_time(trial)
        self._save(trial)
        self._say(_row(trial, self.monitor))

    def is_over(self) -> bool:
        """Whether to stop all trials. Ray Tune calls this often, so it also shows the progress."""
        minutes = self.config.tune.time_budget_minutes
        if time.monotonic() - self._last_line > (0.5 if sys.stdout.isatty() else SECONDS_BETWEEN_LINES):
            self._show_running()
        return self._too_many_failed() or (minutes is not None and time.monotonic() - self._began > 60 * minutes)

    def check_failures(self) -> None:
        """Raise the first failure if there are too many."""
        if self._too_many_failed():
            failed = self._failed()
            raise InputError(
                f"{len(failed)} of {len(self.trials)} trials failed, more than tune.max_failed_trials="
                f"{self.config.tune.max_failed_trials}; the first, {failed[0].name} ({_settings(failed[0])}): "
                f"{failed[0].reason}"
            )

    def _failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status in ("failed", "crashed") and trial not in self.waiting]

    def _too_many_failed(self) -> bool:
        return len(self._failed()) > self.config.tune.max_failed_trials

    def _scheduler(self) -> ASHAScheduler | None:
        tune = self.config.tune
        match tune.scheduler:
            case "none":
                return None
            case "asha":
                return ASHAScheduler(
                    time_attr="epoch",
                    metric="score",
                    mode="max",
                    max_t=max(self.space.most_epochs, tune.grace_epochs),
                    grace_period=tune.grace_epochs,
                    reduction_factor=tune.reduction_factor,
                    stop_last_trials=False,
                )
            case _:
                assert_never(tune.scheduler)

    def _is_stopped_at(self, trial: Trial) -> bool:
        """Whether ASHA stops the trial after its last epoch, judged by its best metric so far."""
        if self._asha is None or trial.epochs >= self.space.num_epochs(trial.values):
            return False
        # The sweep asks ASHA itself, so that a continued sweep can replay earlier reports under lasting names.
        named = SimpleNamespace(trial_id=trial.name)
        best = score(trial.best(self.monitor)[self.monitor], self.monitor)
        self._asha.on_trial_add(None, named)
        decision = self._asha.on_trial_result(None, named, {"epoch": trial.epochs, "score": best})
        return bool(decision == TrialScheduler.STOP)

    def _count_time(self, trial: Trial) -> None:
        now = time.monotonic()
        trial.seconds += now - self._last_heard[trial.number]
        self._last_heard[trial.number] = now

    def _save(self, trial: Trial) -> None:
        storage.write_json(storage.join(self.path, trial.name, TRIAL), asdict(trial))

    def _show_running(self) -> None:
        self._last_line = time.monotonic()
        running = [trial for trial in self._of.values() if trial.status == "running"]
        ended = sum(trial.status != "running" for trial in self.trials)
        text = f"{ended} of {self.config.tune.num_trials} trials done"
        for trial in running:
            last = f" {trial.history[-1][self.monitor]:.4f}" if trial.history else ""
            text += f"; {trial.number}: epoch {trial.epochs}{last}"
        best = outputs.ranked(self.trials, self.monitor)
        if best:
            text += f"; best {best[0].best(self.monitor)[self.monitor]:.4f} (trial {best[0].number})"
        text += f"; {duration(self._last_line - self._began)}"
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{text}", end="")
        else:
            print(text)
        sys.stdout.flush()

    def _say(self, line: str) -> None:
        print(f"\r\x1b[2K{line}" if sys.stdout.isatty() else line, flush=True)


class _Search(Searcher):  # type: ignore[misc]
    """Gives the sweep's trials to Ray Tune."""

    def __init__(self, sweep: _Sweep) -> None:
        super().__init__()
        self._sweep = sweep

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        trial = self._sweep.next_trial(trial_id)
        return Searcher.FINISHED if trial is None else {"name": trial.name, "values": trial.values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `_Watch` tells the sweep."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the sweep keeps its own record."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the sweep restores itself."""


class _Watch(ray_tune.Stopper, ray_tune.Callback):  # type: ignore[misc]
    """Passes the trials' reports from Ray Tune to the sweep, and the sweep's decisions to stop to Ray Tune."""

    def __init__(self, sweep: _Sweep) -> None:
        self._sweep = sweep

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._sweep.hear(trial_id, result)

    def stop_all(self) -> bool:
        return self._sweep.is_over()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401
        """Record that the process failed that drives the training, not the training itself."""
        error = trial.get_pickled_error()
        reason = errors.first_line(errors.root_cause(error)) if error else "its process died"
        self._sweep.end(trial.trial_id, "crashed", reason)


def _run_trials(sweep: _Sweep, dataset: PreparedDataset) -> None:
    """Run the remaining trials, as many at once as the cluster has room for."""
    config = sweep.config
    concurrent, cpus = _places(config, sweep.num_left)
    ended = [trial for trial in sweep.trials if trial not in sweep.waiting]
    begun = f"; {len(ended)} have ended, {len(sweep.waiting)} go on" if sweep.trials else ""
    print(
        f"{'continuing ' if sweep.trials else ''}sweep {sweep.path}: "
        f"{sweep.num_left} trials to run, {concurrent} at once{begun}"
    )
    print(table(ended, sweep.monitor), flush=True)
    config = config.model_copy(update={"training": config.training.model_copy(update={"cpus_per_worker": cpus})})
    # The driver reads the sequences once; workers get them from the shared memory of their node.
    may_read_times = config.model.time_parts or any(each.key == "model.time_encoding" for each in sweep.space.domains)
    with_times = bool(may_read_times) and dataset.manifest.has_time
    is_small = (12 if with_times else 4) * dataset.manifest.num_interactions <= config.data.memory_mb * 2**20
    shared = {
        "config": config,
        "sweep_path": sweep.path,
        "dataset_path": dataset.path,
        "fingerprint": dataset.manifest.fingerprint,
        "sequences": ray.put(dataset.sequences(with_times=with_times)) if is_small else None,
    }
    experiment = storage.join(sweep.path, "ray_tune")
    storage.remove(experiment)
    # Ray Tune writes no log files and no table, and Ctrl+C ends the sweep as it ends any job.
    os.environ |= {f"TUNE_DISABLE_{name}": "1" for name in ("AUTO_CALLBACK_LOGGERS", "SIGINT_HANDLER")}
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the sweep itself prints why a trial failed
    watch = _Watch(sweep)
    # The trial's own process reserves no CPU core, or its workers could wait for that core for ever.
    trainable = ray_tune.with_resources(ray_tune.with_parameters(_run_trial, shared=shared), {"memory": 1})
    tuner = ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            search_alg=_Search(sweep), num_samples=sweep.num_left, max_concurrent_trials=concurrent
        ),
        run_config=ray_tune.RunConfig(
            name="ray_tune",
            storage_path=sweep.path,
            stop=watch,
            callbacks=[watch],
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=config.training.max_failures),
        ),
    )
    tuner.fit()
    storage.remove(experiment)
    if sys.stdout.isatty():
        print()
    if sweep.is_exhausted:
        print(f"note: tune.space has no more valid combinations than these {len(sweep.trials)}")


def _run_trial(trial: dict[str, Any], shared: dict[str, Any]) -> None:
    """Run one training in a process of Ray Tune, and report last how it ended."""
    config = with_values(shared["config"], trial["values"])
    run = config.run.model_copy(update={"name": trial["name"], "storage_path": shared["sweep_path"]})
    outcome: dict[str, Any] = {"outcome": "finished", "reason": "", "history": []}
    try:
        result = train(
            config.model_copy(update={"run": run}),
            shared["dataset_path"],
            callbacks=[TuneReportCallback()],
            sequences=shared["sequences"],
            fingerprint=shared["fingerprint"],
            is_held=True,
        )
        outcome["history"] = result.history
    except InputError as error:
        outcome |= {"outcome": "failed", "reason": str(error)}
    except (RayError, TrainingFailedError, OSError, pa.ArrowException) as error:
        outcome |= {"outcome": "crashed", "reason": errors.first_line(errors.root_cause(error))}
    ray_tune.report(outcome)


def _places(config: Config, num_left: int) -> tuple[int, int]:
    """Return how many trials run at once, and how many CPU cores each of their workers has.

    Raises
    ------
    InputError
        If this machine has no room for tune.max_concurrent_trials.
    """
    each = config.training.num_workers or 1
    fitting = max(resources.most_at_once(config) // each, 1)
    wanted = config.tune.max_concurrent_trials
    if wanted is not None and wanted > fitting and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            f"tune.max_concurrent_trials={wanted} of training.num_workers={each} workers do not fit "
            f"on this machine, which has room for {fitting} of them at once"
        )
    concurrent = min(wanted or fitting, num_left)
    all_workers = with_values(config, {"training.num_workers": min(concurrent, fitting) * each})
    return concurrent, resources.for_training(all_workers).cpus_per_worker


def _identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """The settings and data that must be equal to continue a sweep."""
    names = {"space", "search", "scheduler", "include_config", "grace_epochs", "reduction_factor"}
    search = {f"tune.{name}": value for name, value in config.tune.model_dump(include=names).items()}
    return {"dataset": manifest.fingerprint, **what_shapes_the_result(config), **search}


def _open_sweep(config: Config, manifest: Manifest, sweep_path: str) -> list[Trial]:
    """Return the trials of an earlier call, or mark a new sweep. Refuses a sweep with other settings or data."""
    if begin_directory(sweep_path, config, _identity(config, manifest)):
        return []
    trials: list[Trial] = []
    while storage.exists(file := storage.join(sweep_path, Trial(len(trials), {}).name, TRIAL)):
        trials.append(Trial(**storage.read_json(file)))
    return trials


def _complete_history(trial: Trial, sweep_path: str) -> None:
    """Add the epochs that the run has kept but that the sweep did not record before it was killed."""
    if trial.status != "finished":
        for metrics in kept_metrics(storage.join(sweep_path, trial.name)):
            trial.add(metrics)


def _refit(config: Config, best: Trial, sweep_path: str, dataset: PreparedDataset) -> TrainResult:
    """Train the best settings on the full data, up to the best epoch of the best trial."""
    epochs = int(best.best(config.monitor)["epoch"])
    print(f"training the best settings on the full data for {epochs} epochs")
    values = {**best.values, "data.use_full_data": True, "training.num_epochs": epochs}
    values |= {"run.name": "refit", "run.storage_path": sweep_path}
    with resources.releasing_abandoned():  # the last trial may only just have been stopped
        return train(with_values(config, values), dataset.path, fingerprint=dataset.manifest.fingerprint, is_held=True)


def _header(monitor: str) -> str:
    return f"{'trial':>5}  {'status':<8}  {'epochs':>6}  {monitor:>11}  {'at epoch':>8}  {'time':>7}  settings"


def _row(trial: Trial, monitor: str) -> str:
    best = trial.best(monitor) if trial.history else None
    value, epoch = (f"{best[monitor]:.4f}", int(best["epoch"])) if best else ("", "")
    line = f"{trial.number:>5}  {trial.status:<8}  {trial.epochs:>6}  {value:>11}  {epoch:>8}  "
    line += f"{duration(trial.seconds):>7}  {_settings(trial)}"
    return f"{line}\n{'':>7}{trial.reason}" if trial.reason else line


def _settings(trial: Trial) -> str:
    return " ".join(f"{key.partition('.')[2]}={value}" for key, value in trial.values.items())
