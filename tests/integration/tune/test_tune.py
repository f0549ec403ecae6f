"""Sweeps: one killed in the middle, as a user runs it; one of two-worker trials, in the tests' own Ray."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bert4rec.config import load_config
from bert4rec.errors import InputError
from bert4rec.model.network import BERT4Rec
from bert4rec.training.train import train
from bert4rec.tune.tune import tune
from tests.helpers.datasets import random_histories, write_dataset

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
NDCG = "val_ndcg@10"
MODEL = ["model.hidden_units=8", "model.num_heads=2", "model.max_len=8", "data.batch_size=16", "model.dropout_rate=0"]


def command(job, *arguments):
    return [sys.executable, "-m", f"jobs.{job}", *arguments]


def without_ray():
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def trials_of(sweep):
    return [json.loads(path.read_text()) for path in sorted(sweep.glob("trial-*/trial.json"))]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_a_config_that_train_takes(tmp_path):
    config = load_config(None, [f"data.data_dir={tmp_path}/films", f"run.storage_path={tmp_path}/runs"])
    write_dataset(Path(config.prepared_path), random_histories(75, 20), 20)
    settings = {
        "data": {"data_dir": f"{tmp_path}/films", "batch_size": 16},
        "model": {"hidden_units": 8, "num_heads": 2, "max_len": 8},
        "training": {"num_epochs": 40, "early_stopping": False},
        "tune": {
            "num_trials": 3,
            "grace_epochs": 3,
            "space": {"training.lr": {"choice": [1e-3, 1e30]}, "model.num_layers": {"choice": [1, 2]}},
        },
        "run": {"storage_path": f"{tmp_path}/runs", "name": "sweep"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    sweep, arguments = tmp_path / "runs" / "sweep", ["--config", f"{tmp_path}/sweep.yaml"]

    driver = subprocess.Popen(command("tune", *arguments), cwd=ROOT, env=without_ray(), stdout=subprocess.DEVNULL)
    while not (any(t["status"] != "running" for t in trials_of(sweep)) and list(sweep.glob("trial-*/bert4rec-02-*"))):
        assert driver.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    before = trials_of(sweep)
    ended = [trial for trial in before if trial["status"] in ("finished", "stopped", "failed")]
    assert ended
    assert len(ended) < 3

    again = subprocess.run(command("tune", *arguments), cwd=ROOT, env=without_ray(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert f"{len(ended)} have ended, {len(before) - len(ended)} go on" in again.stdout
    after = trials_of(sweep)
    assert len(after) == 3
    for trial in ended:
        assert after[trial["number"]] == trial
    for trial in before:
        assert after[trial["number"]]["values"] == trial["values"]
    epochs = [[metrics["epoch"] for metrics in trial["history"]] for trial in after if trial["status"] == "finished"]
    assert epochs
    assert all(found == list(range(1, 41)) for found in epochs)
    failed = [trial for trial in after if trial["status"] == "failed"]
    assert failed
    assert all(trial["values"]["training.lr"] == 1e30 for trial in failed)
    assert "training diverged: the loss of epoch 1 is nan at learning rate 1e+30" in again.stdout
    assert pd.read_csv(sweep / "trials.csv")["trial"].tolist() == [0, 1, 2]

    best = json.loads((sweep / "sweep.json").read_text())
    scores = [max(m[NDCG] for m in trial["history"]) for trial in after if trial["status"] != "failed"]
    assert best["best_metrics"][NDCG] == max(scores)
    assert BERT4Rec.from_pretrained(f"{sweep}/{best['best_checkpoint']}").held_out == 1


@pytest.mark.slow
def test_trials_of_two_workers_on_two_cores_and_a_refit(ray_session, tmp_path, capsys):
    path = write_dataset(tmp_path / "d", random_histories(75, 20), 20)
    overrides = [
        *MODEL,
        f"data.data_dir={tmp_path}/none",
        f"run.storage_path={tmp_path}/runs",
        "training.num_workers=2",
        "training.num_epochs=3",
        "tune.num_trials=2",
        "tune.scheduler=none",
        "tune.refit=true",
        "tune.space={training.lr: {choice: [1e-3, 1e-2]}}",
    ]
    config = load_config(None, overrides)
    result = tune(config, path)
    assert "2 trials to run, 1 at once" in capsys.readouterr().out
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    assert {trial.values["training.lr"] for trial in result.trials} == {1e-3, 1e-2}
    best = max(metrics[NDCG] for trial in result.trials for metrics in trial.history)
    found = result.best.best(NDCG)
    assert found[NDCG] == best
    assert Path(result.best_checkpoint).name == f"bert4rec-{int(found['epoch']):02d}-{best:.4f}"
    assert len(result.refit.history) == found["epoch"]
    assert BERT4Rec.from_pretrained(result.refit.last_checkpoint).held_out == 0
    # the same settings learn the same: what was best can be trained again
    again = train(load_config(result.best_config, ["run.name=again"]), path)
    assert [metrics[NDCG] for metrics in again.history] == [metrics[NDCG] for metrics in result.best.history]
    with pytest.raises(InputError, match=r"tune\.reduction_factor was 3.*, is 2\.0.*run\.name"):
        tune(
            load_config(None, [*overrides, "tune.reduction_factor=2", f"run.name={Path(result.sweep_path).name}"]), path
        )
    with pytest.raises(InputError, match=r"max_concurrent_trials=2 of training\.num_workers=2 workers do not fit"):
        tune(load_config(None, [*overrides, "tune.max_concurrent_trials=2", "run.name=other"]), path)
