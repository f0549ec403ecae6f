import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import learning_rate
from bert4rec.training.train import train, what_shapes_the_result
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.processes import REPEATS, KillOnce, random_delay

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

SMALL = [
    "model.hidden_units=8",
    "model.num_heads=2",
    "model.max_len=8",
    "data.batch_size=16",
    "training.num_epochs=4",
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
    with pytest.raises(InputError, match=r"model\.max_len was 8, is 9.*run\.name"):
        train(config_for(tmp_path / "b", *settings, "model.max_len=9", f"run.name={name}"), dataset_path)


def test_one_worker_and_two_learn_the_same(tmp_path, dataset_path):
    """Without dropout only the order of additions differs."""
    settings = ["model.dropout_rate=0", "model.position_encoding=rotary"]
    histories = [
        train(config_for(tmp_path, *settings, f"training.num_workers={count}"), dataset_path).history
        for count in (1, 2)
    ]
    for one, two in zip(*histories, strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["val_mrr"] == pytest.approx(two["val_mrr"], abs=2e-2)  # near ties may change places
    assert histories[0][-1]["train_loss"] < histories[0][0]["train_loss"]


def test_full_data_is_judged_by_train_loss(tmp_path, dataset_path):
    result = train(config_for(tmp_path, "data.use_full_data=true"), dataset_path)
    assert all("val_ndcg@10" not in metrics for metrics in result.history)
    assert result.best_metrics["train_loss"] == min(metrics["train_loss"] for metrics in result.history)
    assert len(result.history) == 4
    tokens = [token for items in HISTORIES.values() for token in items if len(items) >= 3]
    counts = BERT4Rec.from_pretrained(result.best_checkpoint).item_counts
    assert counts.tolist() == [tokens.count(token) for token in range(1, 21)]


def test_training_begins_with_the_weights_of_an_earlier_model(tmp_path, dataset_path, monkeypatch):
    first = train(config_for(tmp_path, "data.holdout=2"), dataset_path)
    monkeypatch.chdir(first.run_path)  # workers have another folder
    best = Path(first.best_checkpoint).name
    settings = ["data.holdout=2", "training.lr=1e-12", "training.num_epochs=1", f"training.start_from={best}"]
    second = train(config_for(tmp_path, *settings), dataset_path)
    assert second.run_path != first.run_path
    for name, value in second.best_metrics.items():
        if name.startswith("val_"):
            assert value == pytest.approx(first.best_metrics[name]), name
    assert len(second.history) == 1
    name = f"run.name={Path(second.run_path).name}"
    with pytest.raises(InputError, match=r"weights of training\.start_from was [0-9a-f]{16}, is None"):
        train(config_for(tmp_path, *settings[:-1], name), dataset_path)


def test_early_stopping_and_validation_interval(tmp_path, dataset_path):
    result = train(
        config_for(
            tmp_path,
            "training.lr=1e-12",
            "training.num_epochs=50",
            "training.early_stopping_patience=2",
            "training.val_check_interval=3",
        ),
        dataset_path,
    )
    assert [int(metrics["epoch"]) for metrics in result.history] == [3, 6, 9]
    assert int(result.best_metrics["epoch"]) == 3
    stored = json.loads((Path(result.run_path) / "run.json").read_text())["best_checkpoint"]
    assert Path(result.run_path) / stored == Path(result.best_checkpoint)


def test_what_cannot_be_trained_is_one_message(tmp_path, dataset_path):
    with pytest.raises(InputError, match=r"none of 75 users has data\.min_interactions=99"):
        train(config_for(tmp_path, "data.min_interactions=99"), dataset_path)
    with pytest.raises(InputError, match=r"diverged: the loss of epoch 1 is nan at learning rate 1e\+30.*smaller"):
        train(config_for(tmp_path, "training.lr=1e30"), dataset_path)
    with pytest.raises(InputError, match=r"num_workers=3 workers of 1 CPU cores each do not fit.*2 CPU cores"):
        train(config_for(tmp_path, "training.num_workers=3"), dataset_path)
    with pytest.raises(InputError, match=r"do not fit on this machine, which has 2 CPU cores, 0 GPUs"):
        train(config_for(tmp_path, "training.accelerator=gpu"), dataset_path)
    with pytest.raises(InputError, match=r"include_new_items=true needs metadata"):
        train(config_for(tmp_path, "data.include_new_items=true", "model.output_features=fused"), dataset_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(config_for(tmp_path / "file"), dataset_path)


def test_gates_and_settings_are_in_tensorboard(tmp_path, capsys):
    """Read back with TensorBoard's own reader."""
    path = write_dataset(
        tmp_path / "d", random_histories(75, 20), 20, genres=[[token % 4, 4][: token % 3] for token in range(20)]
    )
    result = train(config_for(tmp_path, "model.use_genre_emb=true", "model.use_writer_emb=true"), path)
    assert "use_writer_emb is switched off: the data has no writers.tsv" in capsys.readouterr().out
    events = EventAccumulator(f"{result.run_path}/tensorboard")
    events.Reload()
    curves = events.Tags()["scalars"]
    assert {"train_loss", "lr", "tokens_per_second", "val_ndcg@10", "val_gate/item", "val_gate/genre"} <= set(curves)
    assert "val_gate/writer" not in curves
    for name in ("train_loss", "val_ndcg@10", "val_gate/genre"):
        read = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert [(int(metrics["epoch"]), metrics[name]) for metrics in result.history] == read
    for metrics in result.history:
        assert metrics["val_gate/item"] + metrics["val_gate/genre"] == pytest.approx(1)
        assert 0 < metrics["val_gate/genre"] < 0.9
    (summary,) = [e for e in events.summary_metadata.values() if e.plugin_data.plugin_name == "hparams"][:1]
    assert summary
    model = BERT4Rec.from_pretrained(result.best_checkpoint)
    assert model.items.features == ["item", "genre"]


def test_title_embeddings_are_found_by_workers_from_a_relative_path(tmp_path, dataset_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    ids = pa.array(range(101, 120))  # item 120 has no title
    pq.write_table(pa.table({"item": ids, "embedding": vectors[:19].tolist()}), "titles.parquet")
    result = train(config_for("runs", "embedding.output_path=titles.parquet", "training.num_epochs=1"), dataset_path)
    model = BERT4Rec.from_pretrained(result.best_checkpoint)
    assert model.items.features == ["item", "title"]
    np.testing.assert_allclose(model.items.titles[1:20], vectors[:19])
    assert not model.items.titles[[0, 20, 21]].any()
    pq.write_table(pa.table({"item": ["a"], "embedding": vectors[:1].tolist()}), "titles.parquet")
    with pytest.raises(InputError, match=r"titles\.parquet: was made for other data: none of its 1 items, such as 'a'"):
        train(config_for("other", "embedding.output_path=titles.parquet", "training.num_epochs=1"), dataset_path)


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
    from bert4rec.training.train import run_name

    other = write_dataset(tmp_path / "other", random_histories(75, 20, seed=1), 20)
    config = config_for(tmp_path)
    names = {run_name(config, PreparedDataset(path).manifest) for path in (dataset_path, other)}
    assert len(names) == 2


def test_a_key_that_came_later_renames_no_run():
    """The same command goes on with a run that an earlier version began."""
    assert storage.fingerprint(what_shapes_the_result(load_config())) == "0232de4b68dc657b"
    rotary = what_shapes_the_result(load_config(None, ["model.position_encoding=rotary"]))
    assert rotary["model.position_encoding"] == "rotary"
