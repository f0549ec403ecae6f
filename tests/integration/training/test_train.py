"""What only Ray Train can promise, on real workers; and the driver's part, with training in this process.

What a worker does is tested in tests/unit/training/test_worker.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.train import TrainingFailedError

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import learning_rate
from bert4rec.training.train import run_name, train, what_shapes_the_result
from tests.helpers import trainer
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.processes import REPEATS, KillOnce, named, random_delay, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

ROOT = Path(__file__).parents[3]
SMALL = [
    "model.hidden_units=8",
    "model.num_heads=2",
    "model.max_len=8",
    "data.batch_size=16",
    "training.num_epochs=4",
    "training.num_workers=1",
    "training.cpus_per_worker=1",
]


HISTORIES = random_histories(75, 20)


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", HISTORIES, 20)


def config_for(storage_path, *overrides):
    # a data_dir of their own: title embeddings in the default one would be used
    own = [f"run.storage_path={storage_path}", f"data.data_dir={storage_path}/data"]
    return load_config(None, [*SMALL, *own, *overrides])


def without_times(history):
    return [{k: v for k, v in epoch.items() if k not in ("seconds", "tokens_per_second")} for epoch in history]


# On Ray Train


@pytest.mark.cluster
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_killed_worker_changes_nothing_and_a_rerun_finds_it_done(tmp_path, dataset_path, capsys, repeat):
    settings = ["training.num_workers=2", "training.num_epochs=16", "training.early_stopping=false"]
    settings.append("training.optimizer=muon")  # beside AdamW: the state of both is kept
    undisturbed = train(config_for(tmp_path / "a", *settings), dataset_path)

    config = config_for(tmp_path / "b", *settings)
    name = Path(undisturbed.run_path).name  # the name follows from data and settings
    run_path = tmp_path / "b" / name
    with KillOnce("RayTrainWorker", lambda: list(run_path.glob("bert4rec-02-*")), random_delay()):
        disturbed = train(config, dataset_path)
    assert without_times(disturbed.history) == without_times(undisturbed.history)
    assert [int(epoch["epoch"]) for epoch in disturbed.history] == list(range(1, 17))
    best = max(undisturbed.history, key=lambda metrics: metrics["val_ndcg@10"])
    assert undisturbed.best_metrics["val_ndcg@10"] == best["val_ndcg@10"]
    expected = f"bert4rec-{int(undisturbed.best_metrics['epoch']):02d}-{best['val_ndcg@10']:.4f}"
    assert Path(undisturbed.best_checkpoint).name == expected
    kept = sorted(path.name for path in Path(undisturbed.run_path).glob("bert4rec-*"))
    assert kept == sorted({expected, Path(undisturbed.last_checkpoint).name})
    assert BERT4Rec.from_pretrained(undisturbed.best_checkpoint).catalogue == "test"

    capsys.readouterr()
    again = train(config, dataset_path)
    assert again.history == disturbed.history
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"model\.max_len was 8, is 9"):
        train(config_for(tmp_path / "b", *settings, "model.max_len=9", f"run.name={name}"), dataset_path)


def test_two_workers_learn_what_one_does_with_the_threads_that_were_asked_for(tmp_path, dataset_path, monkeypatch):
    """Without dropout only the order of additions differs. One worker, here, is the one of the unit tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # what images, conda and batch systems set counts nothing
    settings = ["model.dropout_rate=0", "model.position_encoding=rotary"]
    two = train(config_for(tmp_path, *settings, "training.num_workers=2"), dataset_path).history
    one, _ = trainer.run(config_for(tmp_path, *settings), dataset_path, tmp_path / "one")
    for ours, theirs in zip(one, two, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["val_mrr"] == pytest.approx(theirs["val_mrr"], abs=2e-2)  # near ties may change places
    assert two[-1]["train_loss"] < two[0]["train_loss"]


def test_two_workers_write_one_checkpoint_in_shards(tmp_path, dataset_path):
    """Ray Train puts the parts of both together. The loss of all items is that of whole tables."""
    settings = ["model.dropout_rate=0", "training.num_epochs=2"]
    shards = ["training.shard_items=true", "training.num_workers=2", "training.checkpoint_minutes=1e-9"]
    two = train(config_for(tmp_path, *settings, *shards), dataset_path)
    one, _ = trainer.run(config_for(tmp_path, *settings), dataset_path, tmp_path / "one")
    for ours, theirs in zip(one, two.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["val_mrr"] == pytest.approx(theirs["val_mrr"], abs=2e-2)
    for path in (two.best_checkpoint, two.last_checkpoint):
        assert len(list(Path(path).glob("*-of-00002.safetensors"))) == 4
        assert BERT4Rec.from_pretrained(path).output_weights()[0].shape == (20, 8)
    assert not list(Path(two.run_path).glob("unfinished-*"))


IN_SHARDS = [
    "training.shard_items=true",
    "training.num_epochs=12",
    "training.early_stopping=false",
    "training.num_workers=null",  # as many as there are cores for
    "model.dropout_rate=0",
    "run.name=run",
]


@pytest.fixture(scope="module")
def undisturbed_shards(tmp_path_factory, dataset_path):
    """A training in two shards."""
    return train(config_for(tmp_path_factory.mktemp("undisturbed"), *IN_SHARDS), dataset_path)


def shards_of(checkpoint):
    return {path.name: path.read_bytes() for path in Path(checkpoint).glob("*-of-*.safetensors")}


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_killed_worker_of_shards_changes_nothing(tmp_path, dataset_path, undisturbed_shards, repeat):
    with KillOnce("RayTrainWorker", lambda: list((tmp_path / "run").glob("bert4rec-02-*")), random_delay()):
        disturbed = train(config_for(tmp_path, *IN_SHARDS), dataset_path)
    assert len(disturbed.history) == 12
    assert without_times(disturbed.history) == without_times(undisturbed_shards.history)
    expected = shards_of(undisturbed_shards.last_checkpoint)
    assert len(expected) == 4
    assert shards_of(disturbed.last_checkpoint) == expected


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_killed_driver_of_shards_goes_on_with_any_number_of_workers(
    tmp_path, dataset_path, undisturbed_shards, ray_session, capsys, repeat
):
    """By the same command, to the same end, which one worker reaches but for rounding."""
    script = "import sys; from bert4rec.config import load_config; from bert4rec.training.train import train; "
    script += "train(load_config(None, sys.argv[2:]), sys.argv[1])"
    settings = [*SMALL, *IN_SHARDS, f"run.storage_path={tmp_path}/two", f"data.data_dir={tmp_path}/data"]
    command = [sys.executable, "-c", script, dataset_path, *settings]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ray_session}, stdout=subprocess.DEVNULL)
    run_path = tmp_path / "two" / "run"
    while not list(run_path.glob("bert4rec-02-*")):
        assert driver.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    time.sleep(random_delay())
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "ended before it could be killed"
    wait_for(lambda: not named("RayTrainWorker") and not named("TrainController"))  # Ray ends what the driver left
    assert not (run_path / "run.json").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    two = train(config_for(tmp_path / "two", *IN_SHARDS), dataset_path)
    assert "continuing run" in (printed := capsys.readouterr().out)
    assert "2 workers of" in printed
    assert without_times(two.history) == without_times(undisturbed_shards.history)
    assert shards_of(two.last_checkpoint) == shards_of(undisturbed_shards.last_checkpoint)

    one = train(config_for(tmp_path / "one", *IN_SHARDS, "training.cpus_per_worker=2"), dataset_path)
    assert "continuing run" in (printed := capsys.readouterr().out)
    assert "1 worker of" in printed
    assert len(list(Path(one.last_checkpoint).glob("*-of-00001.safetensors"))) == 2
    assert len(one.history) == len(two.history)
    for ours, theirs in zip(one.history, two.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["val_mrr"] == pytest.approx(theirs["val_mrr"], abs=2e-2)  # near ties may change places


# The driver


def test_a_worker_has_as_many_threads_as_cores(tmp_path, dataset_path, monkeypatch):
    """Whatever OMP_NUM_THREADS says: the function that Ray Train runs, in this process."""
    import ray.train
    import torch

    from bert4rec.training.train import train_worker

    seen = []
    rules = object()

    def run_epochs(*_, ranking, **__):
        assert ranking is rules
        seen.append(torch.get_num_threads())

    monkeypatch.setattr("bert4rec.training.worker.run_epochs", run_epochs)
    context = type("Context", (), {"get_world_rank": lambda _: 0, "get_world_size": lambda _: 1})()
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    loop = {"config": config_for(tmp_path), "dataset_path": dataset_path, "reporter": None, "sequences": None}
    loop |= {"ranking": rules, "fingerprint": None, "end_key": b"key", "may_lose_nodes": False}
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            train_worker({**loop, "num_threads": threads})
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 1]
    own = []
    with monkeypatch.context() as patch:
        patch.setattr("ray.train.torch.get_device", lambda: torch.device("cuda:1"))
        patch.setattr(torch.cuda, "set_device", own.append)
        train_worker({**loop, "num_threads": before})
    assert own == [torch.device("cuda:1")]

    def fail(*_, **__):
        raise InputError("the user's problem")

    monkeypatch.setattr("bert4rec.training.worker.run_epochs", fail)  # told, not raised: Ray would try again
    assert train_worker({**loop, "num_threads": before}) == "the user's problem"


def test_the_first_sigterm_asks_the_workers_to_save_and_the_second_ends_the_driver(monkeypatch, capsys):
    from ray.experimental import internal_kv

    from bert4rec.training.worker import Wish

    module = sys.modules[train.__module__]
    wish = module._wish(b"this run", False)
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("by Ray's handler"))
    try:
        with module._saving_on_sigterm(b"this run"):
            assert wish() == Wish.NOTHING
            os.kill(os.getpid(), signal.SIGTERM)
            assert wish() == Wish.END
            assert module._wish(b"another run", False)() == Wish.NOTHING
            assert capsys.readouterr().out == "SIGTERM: saving a checkpoint\n"
            assert ended == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == ["by Ray's handler"]
    finally:
        signal.signal(signal.SIGTERM, before)
        internal_kv._internal_kv_del(b"this run")


def test_a_node_that_will_go_is_saved_for_once(monkeypatch):
    import ray.train

    from bert4rec.training.worker import Wish

    told = iter([None, "node 1 goes", "node 1 goes", "nodes 1 and 2 go", None])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told))
    wish = sys.modules[train.__module__]._wish(b"no key", True)
    assert [wish() for _ in range(5)] == [Wish.NOTHING, Wish.SAVE, Wish.NOTHING, Wish.SAVE, Wish.NOTHING]


def test_only_a_ray_of_our_own_goes_without_the_cleaner_of_placement_groups(monkeypatch):
    from bert4rec.training.trainer import PlacementGroupCleanerCallback, not_needed

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert PlacementGroupCleanerCallback in not_needed()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert PlacementGroupCleanerCallback not in not_needed()


@pytest.mark.usefixtures("local_training")
def test_the_best_of_the_full_data_has_the_least_loss(tmp_path, dataset_path):
    result = train(config_for(tmp_path, "data.use_full_data=true"), dataset_path)
    assert result.best_metrics["train_loss"] == min(metrics["train_loss"] for metrics in result.history)
    assert result.best_checkpoint.endswith(f"-{result.best_metrics['train_loss']:.4f}")


@pytest.mark.usefixtures("local_training")
def test_a_finished_run_names_its_best_checkpoint(tmp_path, dataset_path):
    settings = ["training.lr=1e-12", "training.num_epochs=50", "training.early_stopping_patience=2"]
    result = train(config_for(tmp_path, *settings), dataset_path)
    assert [int(metrics["epoch"]) for metrics in result.history] == [1, 2, 3]
    assert int(result.best_metrics["epoch"]) == 1
    stored = json.loads((Path(result.run_path) / "run.json").read_text())["best_checkpoint"]
    assert Path(result.run_path) / stored == Path(result.best_checkpoint)


@pytest.mark.usefixtures("local_training")
def test_the_weights_that_training_began_with_are_part_of_a_run(tmp_path, dataset_path, monkeypatch):
    first = train(config_for(tmp_path, "data.holdout=2"), dataset_path)
    monkeypatch.chdir(first.run_path)  # workers have another folder
    best = Path(first.best_checkpoint).name
    settings = ["data.holdout=2", "training.lr=1e-12", "training.num_epochs=1", f"training.start_from={best}"]
    second = train(config_for(tmp_path, *settings), dataset_path)
    assert second.run_path != first.run_path
    for name, value in second.best_metrics.items():
        if name.startswith("val_"):
            assert value == pytest.approx(first.best_metrics[name]), name
    name = f"run.name={Path(second.run_path).name}"
    with pytest.raises(InputError, match=r"weights of training\.start_from was [0-9a-f]{16}, is None"):
        train(config_for(tmp_path, *settings[:-1], name), dataset_path)


@pytest.mark.usefixtures("local_training")
def test_what_cannot_be_trained_is_one_message(tmp_path, dataset_path):
    with pytest.raises(InputError, match=r"none of 75 users has data\.min_interactions=99"):
        train(config_for(tmp_path, "data.min_interactions=99"), dataset_path)
    with pytest.raises(InputError, match=r"num_workers=3 workers of 1 CPU cores each do not fit.*2 CPU cores"):
        train(config_for(tmp_path, "training.num_workers=3"), dataset_path)
    with pytest.raises(InputError, match=r"do not fit on this machine, which has 2 CPU cores, 0 GPUs"):
        train(config_for(tmp_path, "training.accelerator=gpu"), dataset_path)
    with pytest.raises(InputError, match=r"include_new_items=true needs metadata"):
        train(config_for(tmp_path, "data.include_new_items=true", "model.output_features=fused"), dataset_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(config_for(tmp_path / "file"), dataset_path)


@pytest.mark.usefixtures("local_training")
def test_a_feature_without_data_is_switched_off_with_a_note(tmp_path, dataset_path, capsys):
    result = train(config_for(tmp_path, "model.use_writer_emb=true", "training.num_epochs=1"), dataset_path)
    assert "use_writer_emb is switched off: the data has no writers.tsv" in capsys.readouterr().out
    assert BERT4Rec.from_pretrained(result.best_checkpoint).items.features == ["item"]
    assert (Path(result.run_path) / "tensorboard").is_dir()


@pytest.mark.usefixtures("local_training")
def test_title_embeddings_are_found_by_workers_from_a_relative_path(tmp_path, dataset_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    pq.write_table(pa.table({"item": range(101, 121), "embedding": vectors.tolist()}), "titles.parquet")
    seen = {}
    fit = trainer.LocalTrainer.fit
    monkeypatch.setattr(
        trainer.LocalTrainer, "fit", lambda self: seen.update(path=self.loop["config"].embeddings_path) or fit(self)
    )
    result = train(config_for("runs", "embedding.output_path=titles.parquet", "training.num_epochs=1"), dataset_path)
    assert seen["path"] == str(tmp_path / "titles.parquet")
    assert BERT4Rec.from_pretrained(result.best_checkpoint).items.features == ["item", "title"]


def test_a_failure_of_ray_train_comes_out_and_leaves_no_result(tmp_path, dataset_path, monkeypatch):
    class Failing(trainer.LocalTrainer):
        def fit(self):
            raise TrainingFailedError

    monkeypatch.setattr("bert4rec.training.train._trainer", Failing)
    with pytest.raises(TrainingFailedError):
        train(config_for(tmp_path, "run.name=run"), dataset_path)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
)
def test_learning_rate_by_hand(scheduler, expected):
    training = load_config(
        None, ["training.lr=1", "training.num_epochs=10", "training.warmup_epochs=2", f"training.scheduler={scheduler}"]
    ).training
    assert [learning_rate(training, epochs) for epochs in (1, 2, 6, 10)] == pytest.approx(expected)


def test_dataset_fingerprint_is_part_of_the_name(tmp_path, dataset_path):
    other = write_dataset(tmp_path / "other", random_histories(75, 20, seed=1), 20)
    config = config_for(tmp_path)
    names = {run_name(config, PreparedDataset(path).manifest) for path in (dataset_path, other)}
    assert len(names) == 2


def test_a_key_that_came_later_renames_no_run():
    """The same command goes on with a run that an earlier version began."""
    before = load_config(None, ["training.num_workers=1"])  # the default of then
    assert storage.fingerprint(what_shapes_the_result(before)) == "0232de4b68dc657b"
    rotary = what_shapes_the_result(load_config(None, ["model.position_encoding=rotary"]))
    assert rotary["model.position_encoding"] == "rotary"
    assert "training.num_workers" not in rotary
