"""What goes wrong on one machine, injected, and the result compared with that of an undisturbed run.

The same for nodes is in test_nodes.py; worker and driver of training are killed in tests/integration.
BERT4REC_REPEATS sets how often the random ones are repeated (docs/reliability.md).
"""

import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from bert4rec.cluster.errors import first_line, root_cause
from bert4rec.config import DataConfig, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import prepare
from bert4rec.errors import InputError
from bert4rec.inference.recommend import recommend
from bert4rec.model.network import BERT4Rec
from bert4rec.runs import checkpoint_name
from bert4rec.training.train import train
from tests.helpers import trainer
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.processes import REPEATS, KillOnce, random_delay, wait_for
from tests.integration.test_jobs import ROOT, without_ray
from tests.integration.training.test_train import SMALL, without_times
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

EPOCHS = 12


def training(root, *overrides):
    """Of a dataset in root/data."""
    own = [f"run.storage_path={root}", f"data.data_dir={root}/data", "run.name=run"]
    own.append("model.use_title_emb=false")  # as the job sets it where there are none
    return load_config(
        None, [*SMALL, f"training.num_epochs={EPOCHS}", "training.early_stopping=false", *own, *overrides]
    )


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", random_histories(75, 20), 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset_path):
    """The undisturbed run, in this process: its history, and its directory of checkpoints."""
    path = tmp_path_factory.mktemp("undisturbed")
    history, kept = trainer.run(training(path), dataset_path, path)
    return history, path / kept.best["name"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, dataset_path):
    """A run whose worker was killed in one of its first epochs, without a second chance."""
    root = tmp_path_factory.mktemp("interrupted")
    killed = KillOnce("RayTrainWorker", lambda: list((root / "run").glob("bert4rec-03-*")))
    with killed, pytest.raises(TrainingFailedError):
        train(training(root, "training.max_failures=0"), dataset_path)
    return root


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_an_interrupted_run_ends_like_an_undisturbed_one(interrupted, trained, dataset_path):
    history, best = trained
    result = train(training(interrupted), dataset_path)
    assert without_times(result.history) == without_times(history)
    assert Path(result.best_checkpoint).name == best.name
    for name in ("model.safetensors", "config.json"):
        assert (Path(result.best_checkpoint) / name).read_bytes() == (best / name).read_bytes()


@pytest.mark.slow
def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path, trained, dataset_path):
    """A file of the fourth epoch's checkpoint leads to the device that is always full."""
    fourth = tmp_path / "run" / checkpoint_name(trained[0][3], "val_ndcg@10")
    fourth.mkdir(parents=True)
    (fourth / "training_state.pt").symlink_to("/dev/full")
    with pytest.raises(TrainingFailedError) as raised:
        train(training(tmp_path, "training.max_failures=1"), dataset_path)
    assert "No space left on device" in first_line(root_cause(raised.value))
    third = tmp_path / "run" / checkpoint_name(trained[0][2], "val_ndcg@10")
    BERT4Rec.from_pretrained(str(third))
    assert not (tmp_path / "run" / "run.json").exists()

    (fourth / "training_state.pt").unlink()
    result = train(training(tmp_path), dataset_path)
    assert without_times(result.history) == without_times(trained[0])


def test_an_altered_dataset_is_named_by_every_job(tmp_path, trained, dataset_path):
    copy = tmp_path / "d"
    shutil.copytree(dataset_path, copy)
    flip_a_bit(copy / "sequences" / "part-00000.parquet")
    for work in (
        lambda: train(training(tmp_path), str(copy)),
        lambda: recommend(load_config(), str(copy), str(trained[1]), str(tmp_path / "out")),
    ):
        with pytest.raises(InputError, match=r"part-00000\.parquet: its content is not what was written"):
            work()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


# Scoring

SCORING = ["inference.topk=5", "inference.batch_size=4"]  # small batches: it takes a few seconds


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Dataset of 12 parts, model, and the undisturbed results."""
    root = tmp_path_factory.mktemp("scoring")
    dataset = write_dataset(root / "d", random_histories(6000, NUM_ITEMS, longest=20), NUM_ITEMS)
    model = make_model()
    model.catalogue = "test"
    model.save_pretrained(str(root / "m"))
    recommend(load_config(None, SCORING), dataset, str(root / "m"), str(root / "whole"))
    return dataset, str(root / "m"), root / "whole"


def assert_same_results(output, whole):
    assert (output / "recommendations.csv").read_bytes() == (whole / "recommendations.csv").read_bytes()
    table = pq.read_table(output / "recommendations.parquet")
    assert table.equals(pq.read_table(whole / "recommendations.parquet"))
    assert len(set(zip(table["user"].to_pylist(), table["rank"].to_pylist(), strict=True))) == len(table)
    assert sorted(set(table["user"].to_pylist())) == list(range(1, 6001))


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_killed_scoring_worker_costs_no_user(tmp_path, scored, repeat):
    dataset, model, whole = scored
    parts = tmp_path / "out" / "_unfinished"
    with KillOnce("_PartWorker", lambda: list(parts.glob("part-*.json")), random_delay()):
        recommend(load_config(None, SCORING), dataset, model, str(tmp_path / "out"))
    assert_same_results(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_killed_scoring_driver_keeps_the_finished_parts(tmp_path, scored, repeat):
    dataset, model, whole = scored
    shutil.copytree(dataset, load_config(None, [f"run.storage_path={tmp_path}", "data.data_dir=/d"]).prepared_path)
    parts = tmp_path / "out" / "_unfinished"
    paths = [f"run.storage_path={tmp_path}", "data.data_dir=/d", f"inference.output_path={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "jobs.recommend", *SCORING, *paths, f"inference.checkpoint_path={model}"]
    driver = subprocess.Popen(command, cwd=ROOT, env=without_ray(), stdout=subprocess.DEVNULL)
    wait_for(lambda: driver.poll() is not None or list(parts.glob("part-*.json")))
    time.sleep(random_delay())
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "ended before it could be killed"
    done = {path.stem for path in parts.glob("part-*.json")}
    written = {stem: (parts / "recommendations.parquet" / f"{stem}.parquet").stat().st_mtime_ns for stem in done}
    assert 0 < len(done) < 12
    recommend(load_config(None, SCORING), dataset, model, str(tmp_path / "out"))
    assert_same_results(tmp_path / "out", whole)
    final = tmp_path / "out" / "recommendations.parquet"
    assert {stem: (final / f"{stem}.parquet").stat().st_mtime_ns for stem in done} == written


@pytest.mark.slow
def test_a_full_disk_in_scoring_is_told_and_what_was_done_is_kept(tmp_path, scored, monkeypatch):
    """Of all parts but one, with the last one's file on the device that is always full."""
    dataset, model, whole = scored
    parts = tmp_path / "out" / "_unfinished"

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[recommend.__module__], "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            recommend(load_config(None, SCORING), dataset, model, str(tmp_path / "out"))
    (parts / "part-00011.json").unlink()
    (parts / "part-00011.csv").unlink()
    (parts / "part-00011.csv").symlink_to("/dev/full")
    logging.disable()  # pytest would keep what Ray Data logs, and with it the frames that hold the actor
    with pytest.raises(RayError) as raised:
        recommend(load_config(None, SCORING), dataset, model, str(tmp_path / "out"))
    logging.disable(logging.NOTSET)
    assert "No space left on device" in first_line(root_cause(raised.value))
    cores = ray.cluster_resources()["CPU"]
    wait_for(lambda: ray.available_resources()["CPU"] == cores, seconds=20, why="for the actor to give its core back")
    assert len(list(parts.glob("part-*.json"))) == 11
    (parts / "part-00011.csv").unlink()
    recommend(load_config(None, SCORING), dataset, model, str(tmp_path / "out"))
    assert_same_results(tmp_path / "out", whole)


# Prepare

KILLED_PREPARE = """
import os, signal, sys
from importlib import import_module
from bert4rec import storage
from bert4rec.config import load_config

prepare = import_module("bert4rec.data.prepare")  # the package's attribute is the function

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

prepare.RANGE_ROWS, prepare._SHARD_ROWS = 300, 1
{patch}
from bert4rec.cluster.resources import begin
config = load_config(None, ["data.data_dir=" + sys.argv[1]])
begin(config)
prepare.prepare(config.data, sys.argv[2])
"""


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param("prepare.item_table = die  # before it writes", marks=pytest.mark.slow),
        pytest.param("prepare.write_parquet = die  # of items, behind all sequences", marks=pytest.mark.slow),
        pytest.param("storage.commit = die", marks=pytest.mark.slow),
    ],
)
def test_a_killed_prepare_leaves_the_earlier_dataset(tmp_path, patch, monkeypatch):
    """Of other data."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)

    def write_ratings(num_rows):
        rows = [f"{rng.integers(200)},{rng.integers(50)},{rng.integers(10**9)}" for _ in range(num_rows)]
        (data / "train_ratings.csv").write_text("\n".join(["user,item,time", *rows, ""]))

    monkeypatch.setattr(sys.modules[prepare.__module__], "RANGE_ROWS", 300)
    monkeypatch.setattr(sys.modules[prepare.__module__], "_SHARD_ROWS", 1)
    settings = DataConfig(data_dir=str(data))
    write_ratings(500)
    old = prepare(settings, str(tmp_path / "out"))
    write_ratings(3000)
    whole = prepare(settings, str(tmp_path / "whole"))
    command = [sys.executable, "-c", KILLED_PREPARE.format(patch=patch), str(data), str(tmp_path / "out")]
    killed = subprocess.run(command, cwd=ROOT, env=without_ray(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert PreparedDataset(str(tmp_path / "out"), verify=True).manifest == old
    assert prepare(settings, str(tmp_path / "out")) == whole
    assert PreparedDataset(str(tmp_path / "out"), verify=True).manifest.sha256 == whole.sha256
