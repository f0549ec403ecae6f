"""Training in MLflow, besides TensorBoard, by Ray's own integration.

Ray's `MLflowLoggerCallback` is for Tune's trials; Ray Train takes none but its own callbacks. What Ray has for Train is
`setup_mlflow`. It is called in the driver, which all metrics come to: so workers need neither MLflow nor a way to it,
and the restart of a worker is no new MLflow run.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.errors import InputError

RUN_ID = "mlflow.json"


class MLflowLog:
    """Logs a training to `run.mlflow_uri`: experiment, the data's name; run, the run's name.

    Raises
    ------
    InputError
        If MLflow is not installed, or cannot be reached.
    """

    def __init__(self, config: Config, run_path: str, run_name: str) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise InputError("run.mlflow_uri: MLflow is not installed; pip install 'bert4rec-ray[mlflow]'")
        import mlflow
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._failures = (MlflowException, OSError)
        self._is_lost = False
        uri = config.run.mlflow_uri
        marker = storage.join(run_path, RUN_ID)
        try:
            if storage.exists(marker):  # a continued training
                self._run_id = str(storage.read_json(marker)["run_id"])
                mlflow.set_tracking_uri(uri)
                self._client = mlflow.MlflowClient()
                self._client.update_run(self._run_id, status="RUNNING")
                return
            from ray.air.integrations.mlflow import setup_mlflow

            setup_mlflow(
                _settings(config),
                tracking_uri=uri,
                experiment_name=config.data_name,
                run_name=run_name,
                create_experiment_if_not_exists=True,
                tags={"run_path": run_path},
            )
            self._run_id = mlflow.active_run().info.run_id
            mlflow.end_run()  # only the process's active one; ours goes on by its id, which any thread may use
            self._client = mlflow.MlflowClient()
            self._client.update_run(self._run_id, status="RUNNING")
        except (*self._failures, ImportError) as error:
            raise InputError(f"run.mlflow_uri={uri}: {_first_line(error)}") from None
        storage.write_json(marker, {"run_id": self._run_id})

    def record(self, metrics: dict[str, float]) -> None:
        """The curves of one epoch."""
        self._log({name: value for name, value in metrics.items() if name != "epoch"}, int(metrics["epoch"]))

    def close(self, best_metrics: dict[str, float] | None) -> None:
        """The best epoch's metrics and the end; without them the training has failed."""
        if best_metrics is not None:
            self._log({f"best/{name}": value for name, value in best_metrics.items()}, int(best_metrics["epoch"]))
        self._try(self._client.set_terminated, self._run_id, "FAILED" if best_metrics is None else "FINISHED")

    def _log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():  # MLflow's names have no @
            self._try(self._client.log_metric, self._run_id, name.replace("@", "_at_"), value, step=step)

    def _try(self, call: Callable[..., object], *arguments: object, **named: object) -> None:
        """A server that is gone must not end a training, but its user is told."""
        if self._is_lost:
            return
        try:
            call(*arguments, **named)
        except self._failures as error:
            self._is_lost = True
            print(f"note: MLflow is lost, training goes on without it ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _settings(config: Config) -> dict[str, Any]:
    groups = config.model_dump(mode="json", include={"data", "model", "training", "evaluation"})
    return {f"{group}.{key}": value for group, fields in groups.items() for key, value in fields.items()}
