"""MLflow, read back with its own client from a local store."""

import json
from pathlib import Path

import pytest

from bert4rec.config import load_config
from bert4rec.errors import InputError
from bert4rec.training.train import train
from tests.helpers.datasets import random_histories, write_dataset
from tests.integration.training.test_train import SMALL

mlflow = pytest.importorskip("mlflow")
from bert4rec.training.mlflow import MLflowLog  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", random_histories(75, 20), 20)


def config_for(tmp_path, *overrides):
    own = [f"run.storage_path={tmp_path}", f"data.data_dir={tmp_path}/films", "training.num_epochs=2", "run.name=one"]
    return load_config(None, [*SMALL, *own, f"run.mlflow_uri=sqlite:///{tmp_path}/mlflow.db", *overrides])


def runs_of(tmp_path):
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("films").experiment_id])


@pytest.mark.usefixtures("local_training")
def test_a_training_that_diverged_has_failed(tmp_path, dataset_path):
    """One that went well is looked at in test_using_a_model."""
    with pytest.raises(InputError, match="diverged"):
        train(config_for(tmp_path, "training.lr=1e30"), dataset_path)
    _, (run,) = runs_of(tmp_path)
    assert (run.info.run_name, run.info.status) == ("one", "FAILED")
    assert run.data.params["training.lr"] == "1e+30"
    assert run.data.tags["run_path"] == str(tmp_path / "one")


def test_a_continued_training_is_one_run(tmp_path, capsys):
    config, run_path = config_for(tmp_path), str(tmp_path / "one")
    MLflowLog(config, run_path, "one").record({"epoch": 1, "train_loss": 3.0})
    again = MLflowLog(config, run_path, "one")
    again.record({"epoch": 2, "train_loss": 2.0})
    again.close({"epoch": 2, "train_loss": 2.0})
    client, (run,) = runs_of(tmp_path)
    assert run.info.run_id == json.loads(Path(run_path, "mlflow.json").read_text())["run_id"]
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "train_loss")] == [3, 2]
    assert run.info.status == "FINISHED"

    client.delete_run(run.info.run_id)  # as good as a server that went away
    again.record({"epoch": 3, "train_loss": 1.0})
    again.record({"epoch": 4, "train_loss": 1.0})
    assert capsys.readouterr().out.count("note: MLflow is lost, training goes on without it") == 1


def test_a_store_that_cannot_be_had_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"run\.mlflow_uri=nonsense://x: .*nonsense"):
        MLflowLog(config_for(tmp_path, "run.mlflow_uri=nonsense://x"), str(tmp_path), "one")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"MLflow is not installed; pip install 'bert4rec-ray\[mlflow\]'"):
        MLflowLog(config_for(tmp_path), str(tmp_path), "one")
