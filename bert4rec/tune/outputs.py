"""Writes the results of a sweep: trials as CSV and Parquet, plots, TensorBoard's HPARAMS, and the best config."""

import io
import warnings

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import yaml

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.training.tensorboard import TensorBoardLog
from bert4rec.tune.space import Space, Trial, score, with_values

BEST_CONFIG = "best_config.yaml"
TABLE = "trials"
PLOTS = "plots.html"
HPARAMS = "hparams"


def ranked(trials: list[Trial], monitor: str) -> list[Trial]:
    """Sort the trials that have been validated and have not failed, best first; of equal trials the earlier one
    first."""
    validated = [trial for trial in trials if trial.history and trial.status != "failed"]
    return sorted(validated, key=lambda trial: -score(trial.best(monitor)[monitor], monitor))


def write_best_config(config: Config, best: Trial, sweep_path: str) -> str:
    """Write the sweep's config with the best trial's values, for `--config` of any job. Return the file's path."""
    content = with_values(config, best.values).model_dump(mode="json", exclude={"tune": True, "run": {"name"}})
    path = storage.join(sweep_path, BEST_CONFIG)
    storage.write_bytes(path, yaml.safe_dump(content, sort_keys=False).encode())
    return path


def write_table(space: Space, trials: list[Trial], sweep_path: str) -> list[str]:
    """Write one row per trial: its values, the metrics of its best epoch, its status. Return the files' paths."""
    monitor = space.config.monitor
    best = [trial.best(monitor) if trial.history else {} for trial in trials]
    metrics = sorted({name for found in best for name in found} - {"epoch", "seconds", monitor})
    columns = {
        "trial": [trial.number for trial in trials],
        "status": [trial.status for trial in trials],
        monitor: [found.get(monitor) for found in best],
        "best_epoch": pa.array([found.get("epoch") for found in best], pa.int64()),
        "epochs": [trial.epochs for trial in trials],
        "seconds": [round(trial.seconds, 1) for trial in trials],
        **{domain.key: [trial.values.get(domain.key) for trial in trials] for domain in space.domains},
        **{name: [found.get(name) for found in best] for name in metrics},
        "reason": [trial.reason for trial in trials],
    }
    table = pa.table(columns)
    content = {"csv": io.BytesIO(), "parquet": io.BytesIO()}
    pacsv.write_csv(table, content["csv"])
    pq.write_table(table, content["parquet"])
    paths = {form: storage.join(sweep_path, f"{TABLE}.{form}") for form in content}
    for form, path in paths.items():
        storage.write_bytes(path, content[form].getvalue())
    return list(paths.values())


def write_plots(space: Space, trials: list[Trial], sweep_path: str) -> str | None:
    """Plot history, importance of the keys and parallel coordinates on one page that needs no network.

    Return its path, or None if Optuna or Plotly is not installed or fewer than two trials have metrics.
    """
    try:
        import plotly  # noqa: F401
        from optuna import visualization
    except ImportError:
        print('note: no plots: they need pip install -e ".[tune]"')
        return None
    study = space.study([trial for trial in trials if trial.history and trial.status != "failed"], for_plots=True)
    drawn = [domain.key for domain in space.domains if len({str(t.params.get(domain.key)) for t in study.trials}) > 1]
    if len(study.trials) < 2 or not drawn:
        print("note: no plots: they need two trials of different values")
        return None
    with warnings.catch_warnings():  # Optuna warns that few trials say little about the importance of a key
        warnings.simplefilter("ignore")
        figures = [
            visualization.plot_optimization_history(study, target_name=space.config.monitor),
            visualization.plot_param_importances(study, params=drawn),
            visualization.plot_parallel_coordinate(study, params=drawn, target_name=space.config.monitor),
        ]
    page = "".join(
        figure.to_html(full_html=False, include_plotlyjs=index == 0, default_height="600px")
        for index, figure in enumerate(figures)
    )
    path = storage.join(sweep_path, PLOTS)
    storage.write_bytes(path, f'<!doctype html><meta charset="utf-8"><title>Sweep</title>{page}'.encode())
    return path


def write_hparams(space: Space, trials: list[Trial], sweep_path: str) -> str:
    """Write the values, the best epoch's metrics and the curves of each trial for TensorBoard.

    Return the directory for `tensorboard --logdir`.
    """
    root, monitor = storage.join(sweep_path, HPARAMS), space.config.monitor
    storage.remove(root)
    for trial in trials:
        if trial.history:
            log = TensorBoardLog(storage.join(root, trial.name))
            for metrics in trial.history:
                log.record(metrics)
            log.close_with(
                {key: value if value is not None else "none" for key, value in trial.values.items()},
                trial.best(monitor),
                trial.history,
            )
    return root
