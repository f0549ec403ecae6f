"""A training worker's loop, in this process: epochs, checkpoints, early stopping, resuming, NaN, full data."""

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.model.network import BERT4Rec
from bert4rec.runs import checkpoint_name
from bert4rec.training import worker as worker_module
from bert4rec.training.checkpoint import load_checkpoint
from bert4rec.training.loop import Place, Worker
from bert4rec.training.tensorboard import TensorBoardLog
from bert4rec.training.worker import AskedToEndError, Wish, read_sequences, run_epochs
from tests.helpers.datasets import random_histories, random_times, write_dataset
from tests.helpers.trainer import Kept, Quiet, WorkerKilledError, every_item_as_negative, run

pytestmark = pytest.mark.unit

SMALL = [
    "model.hidden_units=8",
    "model.num_heads=2",
    "model.max_len=8",
    "data.batch_size=16",
    "training.num_epochs=4",
]
HISTORIES = random_histories(75, 20)


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", HISTORIES, 20, times=random_times(HISTORIES))


def config_for(*overrides):
    return load_config(None, [*SMALL, "data.data_dir=/nowhere", "model.use_title_emb=false", *overrides])


def without_times(history):
    return [{k: v for k, v in epoch.items() if k not in ("seconds", "tokens_per_second")} for epoch in history]


def files_of(checkpoint):
    """What a checkpoint holds, byte by byte; but for the card, which names the time that training took."""
    return {path.name: path.read_bytes() for path in Path(checkpoint).iterdir() if path.suffix in (".safetensors",)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_ends_like_an_undisturbed_one(dataset_path, tmp_path, optimizer, stop_after):
    times = ["model.time_encoding=rotary+gap+bias+calendar"] if optimizer == "muon" else []
    settings = ["training.num_epochs=6", "training.early_stopping=false", f"training.optimizer={optimizer}"]
    config = config_for(*settings, *times)
    history, whole = run(config, dataset_path, tmp_path / "whole")
    with pytest.raises(WorkerKilledError):
        run(config, dataset_path, tmp_path / "stopped", stop_after)
    resumed, kept = run(config, dataset_path, tmp_path / "stopped")
    assert kept.progress.skipped == stop_after
    assert [metrics["epoch"] for metrics in resumed] == [1, 2, 3, 4, 5, 6]
    assert without_times(resumed) == without_times(history)
    assert [entry["name"] for entry in kept.entries] == [entry["name"] for entry in whole.entries]
    for ours, theirs in zip(kept.entries, whole.entries, strict=True):
        assert files_of(kept.path / ours["name"]) == files_of(whole.path / theirs["name"])
    again, kept = run(config, dataset_path, tmp_path / "stopped")
    assert again == resumed
    assert kept.reported == []


AT_EACH_STEP = "training.checkpoint_minutes=1e-9"


@pytest.fixture
def no_pause(monkeypatch):
    """Saving after each step, whatever it costs."""
    monkeypatch.setattr(worker_module, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(worker_module, "MOST_OF_THE_TIME", 1)


@pytest.mark.parametrize(
    "settings",
    [
        ["training.optimizer=muon", "training.val_check_interval=2"],
        [
            "training.loss=sampled-softmax",
            "data.sampling_strategy=weighted",
            "model.attention=causal",
            "training.gradient_clip_val=1",
        ],
        ["training.loss=gbce", "training.item_optimizer=rowwise", "training.weight_decay=0.1"],
    ],
    ids=["muon", "sampled", "rowwise"],
)
def test_a_run_killed_at_drawn_steps_ends_like_an_undisturbed_one(dataset_path, tmp_path, no_pause, settings):
    """Killed again and again, right after one of its next checkpoints, most of which are in the middle of an epoch."""
    settings = [*settings, "training.early_stopping=false", "model.max_len=6"]
    history, whole = run(config_for(*settings), dataset_path, tmp_path / "whole")
    rng, resumed, skipped = np.random.default_rng(0), None, []
    while resumed is None:
        try:
            resumed, kept = run(
                config_for(*settings, AT_EACH_STEP), dataset_path, tmp_path / "killed", int(rng.integers(1, 6))
            )
        except WorkerKilledError:
            left = Kept(tmp_path / "killed")
            best = [entry["name"] for entry in left.entries if entry["improvement"] >= 0]
            assert len(left.entries) <= 2
            assert best or len(left.entries) == 1  # the best epoch stays, whatever comes behind it
            skipped.append(Path(left.last).name)
    assert sum(name.startswith("unfinished-") for name in skipped) >= 2
    assert without_times(resumed) == without_times(history)
    assert [entry["name"] for entry in kept.entries] == [entry["name"] for entry in whole.entries]
    for ours, theirs in zip(kept.entries, whole.entries, strict=True):
        assert files_of(kept.path / ours["name"]) == files_of(whole.path / theirs["name"])


def test_the_time_of_an_epoch_counts_on_and_so_does_its_progress(dataset_path, tmp_path, no_pause):
    with pytest.raises(WorkerKilledError):
        run(config_for(AT_EACH_STEP), dataset_path, tmp_path, 7)  # in the second epoch, of four steps
    last = Kept(tmp_path).last
    assert Path(last).name == "unfinished-02-000002"
    state = torch.load(f"{last}/training_state.pt", weights_only=True)
    assert state["in_epoch"]["sums"].shape == (2, 2)
    state["in_epoch"]["seconds"] += 1000
    save_state(state, Path(last))
    history, kept = run(config_for(), dataset_path, tmp_path)
    assert kept.progress.skipped == 1.5
    assert kept.progress.texts[0].startswith("epoch 2/4, step 3/4, ")
    assert history[0]["seconds"] < 1000 < history[1]["seconds"]


def test_saving_takes_its_share_of_the_time_at_most(monkeypatch):
    """A save of 3 s comes every 300 s, though it is asked for every minute; steps take a second each."""
    now = [0.0]
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: now[0])

    def save(*_):
        now[0] += 3

    saver = worker_module._MidEpoch(1, Worker(), lambda: Wish.NOTHING, lambda place: None, save)
    saved = []
    for step in range(1000):
        now[0] += 1
        if saver.is_due(Place(0, step, 1000, 1, 1)):
            saved.append(now[0])
            saver.save(None, {})
    assert saved == [60, 60 + 300, 60 + 600, 60 + 900]


def test_who_is_asked_to_end_saves_first_and_who_will_lose_a_node_goes_on(dataset_path, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "SECONDS_BETWEEN_LOOKS", 0)
    config, dataset = config_for("training.early_stopping=false"), PreparedDataset(dataset_path)
    wishes = [Wish.NOTHING, Wish.SAVE, *[Wish.NOTHING] * 4, Wish.END]  # epochs of four steps
    kept = Kept(tmp_path)
    asked = iter(wishes)
    with pytest.raises(AskedToEndError):
        run_epochs(config, dataset, dataset.sequences(), report=kept.report, progress=Quiet(), wish=lambda: next(asked))
    assert [metrics["improvement"] for metrics in kept.reported] == [-1, 1, -1]
    assert Path(kept.last).name == "unfinished-02-000003"
    resumed, _ = run(config, dataset_path, tmp_path)
    whole, _ = run(config, dataset_path, tmp_path / "whole")
    assert without_times(resumed) == without_times(whole)


def test_a_checkpoint_is_named_after_its_epoch_and_the_best_is_that_of_early_stopping(dataset_path, tmp_path):
    history, kept = run(config_for("training.num_epochs=16", "training.early_stopping=false"), dataset_path, tmp_path)
    best = max(history, key=lambda metrics: metrics["val_ndcg@10"])  # the first of equal ones
    assert kept.best["name"] == f"bert4rec-{best['epoch']:02d}-{best['val_ndcg@10']:.4f}"
    assert kept.best["name"] == checkpoint_name(best, "val_ndcg@10")
    assert BERT4Rec.from_pretrained(str(tmp_path / kept.best["name"])).catalogue == "test"
    assert kept.progress.metrics == history
    improved = [metrics["improvement"] for metrics in kept.reported]
    assert max(improved) == sum(step > 0 for step in improved)
    assert kept.progress.texts[-2].startswith("epoch 16/16, step 4/4, ")
    assert kept.progress.texts[-1].startswith("epoch 16/16, validating, val_ndcg@10 0.")


def test_full_data_is_judged_by_train_loss(dataset_path, tmp_path):
    history, kept = run(config_for("data.use_full_data=true"), dataset_path, tmp_path)
    assert all("val_ndcg@10" not in metrics for metrics in history)
    assert len(history) == 4
    least = min(history, key=lambda metrics: metrics["train_loss"])
    assert kept.best["name"] == checkpoint_name(least, "train_loss")
    model = BERT4Rec.from_pretrained(kept.last)
    tokens = [token for items in HISTORIES.values() for token in items if len(items) >= 3]
    assert model.item_counts.tolist() == [tokens.count(token) for token in range(1, 21)]
    assert model.held_out == 0


def test_early_stopping_and_validation_interval(dataset_path, tmp_path):
    settings = ["training.lr=1e-12", "training.num_epochs=50", "training.early_stopping_patience=2"]
    history, kept = run(config_for(*settings, "training.val_check_interval=3"), dataset_path, tmp_path)
    assert [metrics["epoch"] for metrics in history] == [3, 6, 9]
    assert [entry["name"].split("-")[1] for entry in kept.entries] == ["03", "09"]


def test_the_usual_gap_is_the_median_of_what_training_sees(dataset_path, tmp_path):
    config = config_for("training.num_epochs=1", "model.time_encoding=gap", "data.holdout=2")
    _, kept = run(config, dataset_path, tmp_path)
    seen = [own[:-2] for own in random_times(HISTORIES).values() if len(own) >= 3]
    gaps = sorted(b - a for own in seen for a, b in itertools.pairwise(own) if b > a)
    assert BERT4Rec.from_pretrained(kept.last).usual_gap == gaps[(len(gaps) - 1) // 2]


def test_the_last_epoch_is_always_validated(dataset_path, tmp_path):
    config = config_for("training.val_check_interval=3", "training.early_stopping=false")
    history, _ = run(config, dataset_path, tmp_path)
    assert [metrics["epoch"] for metrics in history] == [3, 4]


def test_training_begins_with_the_weights_of_an_earlier_model(dataset_path, tmp_path):
    history, first = run(config_for("data.holdout=2"), dataset_path, tmp_path / "first")
    settings = ["data.holdout=2", "training.lr=1e-12", "training.num_epochs=1", f"training.start_from={first.last}"]
    (second,), _ = run(config_for(*settings), dataset_path, tmp_path / "second")
    for name, value in history[-1].items():
        if name.startswith("val_"):
            assert second[name] == pytest.approx(value), name


def test_a_resumed_run_does_not_begin_again_with_the_earlier_model(dataset_path, tmp_path):
    _, first = run(config_for("data.holdout=2"), dataset_path, tmp_path / "first")
    config = config_for("data.holdout=2", "training.early_stopping=false", f"training.start_from={first.last}")
    history, _ = run(config, dataset_path, tmp_path / "whole")
    with pytest.raises(WorkerKilledError):
        run(config, dataset_path, tmp_path / "stopped", 2)
    resumed, _ = run(config, dataset_path, tmp_path / "stopped")
    assert without_times(resumed) == without_times(history)


def test_what_cannot_be_trained_is_one_message(dataset_path, tmp_path):
    with pytest.raises(InputError, match=r"none of 75 users has data\.min_interactions=99"):
        run(config_for("data.min_interactions=99"), dataset_path, tmp_path)
    with pytest.raises(InputError, match=r"diverged: the loss of epoch 1 is nan at learning rate 1e\+30.*smaller"):
        run(config_for("training.lr=1e30"), dataset_path, tmp_path)


def test_nobody_to_train_or_to_validate_with_in_a_temporal_split(tmp_path):
    histories = {1: [1, 2, 3, 4], 2: [2, 3, 4, 5]}
    before = {"recent_validation": [0, 0], "validation": [3, 3], "recent_test": [0, 0], "test": [3, 3]}
    path = write_dataset(tmp_path / "d", histories, 5, before=before)
    temporal = ["data.split=temporal", "data.split_time=1002"]
    with pytest.raises(InputError, match=r"no user has data\.min_interactions=3 .* \(data\.split_time=1002\); nothing"):
        run(config_for(*temporal), path, tmp_path / "run")
    with pytest.raises(InputError, match=r"none of 2 users has data\.min_interactions=4"):
        run(config_for(*temporal, "data.min_interactions=4"), path, tmp_path / "run")


def test_the_cut_off_of_a_temporal_split_is_kept_in_the_model(tmp_path):
    histories = {user: [1, 2, 3, 4, 5] for user in range(20)}
    before = {name: [count] * 20 for name, count in (("validation", 3), ("test", 4))}
    path = write_dataset(tmp_path / "d", histories, 5, before=before)
    _, kept = run(config_for("data.split=temporal", "training.num_epochs=1"), path, tmp_path / "run")
    model = BERT4Rec.from_pretrained(kept.last)
    assert (model.trained_before, model.held_out) == (1000, 0)
    assert model.item_counts.tolist() == [20, 20, 20, 0, 0]


# Checkpoints


@pytest.fixture(scope="module")
def interrupted(dataset_path, tmp_path_factory):
    """The directory of a run that was ended after its third epoch."""
    path = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(WorkerKilledError):
        run(config_for("training.num_epochs=6", "training.early_stopping=false"), dataset_path, path, 3)
    return path


@pytest.fixture
def last(interrupted, tmp_path):
    """A copy of its last checkpoint, to be spoilt."""
    copy = tmp_path / Path(Kept(interrupted).last).name
    import shutil

    shutil.copytree(Kept(interrupted).last, copy)
    return copy


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: os.truncate(file, 1000), os.unlink])
@pytest.mark.parametrize("name", ["training_state.pt", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_named_before_it_is_used(last, dataset_path, damage, name):
    damage(last / name)
    with pytest.raises(InputError) as raised:
        load_checkpoint(str(last))
    assert name in str(raised.value)
    assert str(last) in str(raised.value)


def save_state(state, checkpoint):
    """With its digest, as training writes them."""
    torch.save(state, checkpoint / "training_state.pt")
    digest = storage.sha256(str(checkpoint / "training_state.pt"))
    (checkpoint / "training_state.sha256").write_text(f"{digest}  training_state.pt\n")


def test_a_checkpoint_of_an_older_version_is_named(last):
    state = torch.load(last / "training_state.pt", weights_only=True)
    state["optimizer"] = state.pop("optimizers")
    save_state(state, last)
    with pytest.raises(InputError, match=r"training_state.pt: was written by an older version.*another run\.name"):
        load_checkpoint(str(last))


def test_a_loss_that_is_no_number_stops_before_a_checkpoint(last, dataset_path):
    """An optimiser state with an infinite moment: the first step spoils the weights, the second loss is NaN."""
    state = torch.load(last / "training_state.pt", weights_only=True)
    next(iter(state["optimizers"][0]["state"].values()))["exp_avg"].fill_(torch.inf)
    save_state(state, last)
    expected = r"the loss of epoch 4 is nan at learning rate 0\.001, first in step 2 of 4 \(batch [0-9a-f]{16}\)"
    config, dataset = config_for("training.num_epochs=6"), PreparedDataset(dataset_path)

    def report(*_, **__):
        raise AssertionError("a checkpoint of weights that are no numbers")

    with pytest.raises(InputError, match=expected):
        run_epochs(config, dataset, dataset.sequences(), report=report, progress=Quiet(), resume_from=str(last))


# Metadata


def test_gates_and_curves_are_in_tensorboard(tmp_path):
    """Read back with TensorBoard's own reader."""
    path = write_dataset(
        tmp_path / "d", random_histories(75, 20), 20, genres=[[token % 4, 4][: token % 3] for token in range(20)]
    )
    config = config_for("model.use_genre_emb=true")
    history, kept = run(config, path, tmp_path / "run")
    log = TensorBoardLog(str(tmp_path / "run"))
    for metrics in history:
        log.record(metrics)
    log.close(config, PreparedDataset(path).manifest, history[-1], history)
    events = EventAccumulator(f"{tmp_path}/run/tensorboard")
    events.Reload()
    curves = events.Tags()["scalars"]
    assert {"train_loss", "lr", "tokens_per_second", "val_ndcg@10", "val_gate/item", "val_gate/genre"} <= set(curves)
    assert "val_gate/writer" not in curves
    for name in ("train_loss", "val_ndcg@10", "val_gate/genre"):
        read = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert [(int(metrics["epoch"]), metrics[name]) for metrics in history] == read
    for metrics in history:
        assert metrics["val_gate/item"] + metrics["val_gate/genre"] == pytest.approx(1)
        assert 0 < metrics["val_gate/genre"] < 0.9
    (summary,) = [e for e in events.summary_metadata.values() if e.plugin_data.plugin_name == "hparams"][:1]
    assert summary
    assert BERT4Rec.from_pretrained(kept.last).items.features == ["item", "genre"]


def test_title_embeddings_are_matched_by_id(tmp_path, dataset_path):
    vectors = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    ids = pa.array(range(101, 120))  # item 120 has no title
    pq.write_table(pa.table({"item": ids, "embedding": vectors[:19].tolist()}), tmp_path / "titles.parquet")
    titles = ["model.use_title_emb=true", f"embedding.output_path={tmp_path}/titles.parquet"]
    _, kept = run(config_for(*titles, "training.num_epochs=1"), dataset_path, tmp_path / "run")
    model = BERT4Rec.from_pretrained(kept.last)
    assert model.items.features == ["item", "title"]
    with torch.no_grad():
        projected = model.items.title_projection(torch.from_numpy(vectors[:19]))
    torch.testing.assert_close(model.items.projected_titles[1:20], projected)
    assert model.items.has_title.tolist() == [False, *[True] * 19, False, False]
    pq.write_table(pa.table({"item": ["a"], "embedding": vectors[:1].tolist()}), tmp_path / "titles.parquet")
    with pytest.raises(InputError, match=r"titles\.parquet: was made for other data: none of its 1 items, such as 'a'"):
        run(config_for(*titles), dataset_path, tmp_path / "other")


# Two workers

TWO = {
    "alike": ["model.dropout_rate=0", "model.position_encoding=rotary", "model.time_encoding=rotary+gap+bias"],
    "dropout": [
        "training.optimizer=muon",
        "training.num_epochs=6",
        "training.early_stopping=false",
        "model.time_encoding=rotary+gap+calendar",
    ],
    "drawn": [
        "training.early_stopping=false",
        "training.num_epochs=2",
        "data.sampling_strategy=window",
        "model.attention=causal",
    ],
    "temporal": ["data.split=temporal", "training.num_epochs=1", "model.dropout_rate=0"],
    "rowwise": [
        *["training.loss=sampled-softmax", "training.item_optimizer=rowwise", "training.weight_decay=0.1"],
        *["training.gradient_clip_val=0.5", "model.dropout_rate=0"],
    ],
}


def two_workers(rank, root, dataset_path):
    """One of two gloo processes; trains everything in TWO, "dropout" once more with a stop in the middle."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    dataset = PreparedDataset(dataset_path)
    models = {}

    def train(name, path, stop_after=None, resume=None, *overrides):
        kept = Kept(path, stop_after)

        def report(metrics, checkpoint, directory, in_background):
            assert (directory is None) == (rank == 1)
            stops = False
            if rank == 0:
                try:
                    kept.report(metrics, checkpoint, directory, in_background)
                except WorkerKilledError:
                    stops = True
            told = [stops]
            torch.distributed.broadcast_object_list(told)
            if told[0]:
                raise WorkerKilledError

        def wrap(model):
            models[name] = model
            return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

        with pytest.MonkeyPatch.context() as patch:
            if name == "rowwise":  # each worker draws its own negatives, two others than one
                patch.setattr("bert4rec.training.worker.make_loss", every_item_as_negative)
            return run_epochs(
                config_for(*TWO[name], *overrides),
                dataset,
                read_sequences(config_for(*TWO[name]), dataset),
                report=report,
                progress=Quiet(),
                worker=Worker(rank, 2),
                resume_from=resume,
                wrap=wrap,
            )

    histories = {name: train(name, root / name) for name in TWO}
    try:
        train("dropout", root / "stopped", stop_after=2)
    except WorkerKilledError:
        torch.distributed.barrier()
    histories["stopped"] = train("dropout", root / "stopped", resume=Kept(root / "stopped").last)
    worker_module.SECONDS_BETWEEN_LOOKS, worker_module.MOST_OF_THE_TIME = 0, 1
    for stop_after in (2, 1, 3, 99):  # behind steps 2 and 3 of the first epoch, and 2 of the second
        try:
            last = Kept(root / "killed").last
            histories["killed"] = train("drawn", root / "killed", stop_after, last, AT_EACH_STEP)
        except WorkerKilledError:
            torch.distributed.barrier()
    torch.save(histories, root / f"histories-{rank}.pt")
    torch.save(models["rowwise"].state_dict(), root / f"rowwise-{rank}.pt")
    torch.distributed.barrier()  # a process that leaves while another still talks to it is aborted
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Dataset, directory and histories of two workers."""
    root = tmp_path_factory.mktemp("two")
    for name in (*TWO, "stopped", "killed"):
        (root / name).mkdir()
    rng = np.random.default_rng(1)
    before = [sorted(rng.integers(0, len(items) + 1, 2).tolist()) for items in HISTORIES.values()]
    columns = {"validation": [low for low, _ in before], "test": [high for _, high in before]}
    path = write_dataset(root / "d", HISTORIES, 20, before=columns, times=random_times(HISTORIES))
    torch.multiprocessing.spawn(two_workers, (root, path), nprocs=2)
    return path, root, [torch.load(root / f"histories-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["alike", "temporal", "rowwise"])
def test_one_worker_and_two_learn_the_same(of_two, tmp_path, name, monkeypatch):
    """Without dropout only the order of additions differs."""
    path, _, histories = of_two
    if name == "rowwise":
        monkeypatch.setattr("bert4rec.training.worker.make_loss", every_item_as_negative)
    history, _ = run(config_for(*TWO[name]), path, tmp_path)
    for one, two in zip(history, histories[0][name], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["val_mrr"] == pytest.approx(two["val_mrr"], abs=2e-2)  # near ties may change places
    assert len(history) == 1 or history[-1]["train_loss"] < history[0]["train_loss"]


def test_both_workers_have_the_same_rows_and_about_those_of_one(of_two, tmp_path, monkeypatch):
    path, root, _ = of_two
    monkeypatch.setattr("bert4rec.training.worker.make_loss", every_item_as_negative)
    _, kept = run(config_for(*TWO["rowwise"]), path, tmp_path)
    first, second = (torch.load(root / f"rowwise-{rank}.pt") for rank in (0, 1))
    alone = BERT4Rec.from_pretrained(kept.last).state_dict()
    for name in ("items.embedding.weight", "output_bias"):
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - alone[name]).norm() < 2e-3 * alone[name].norm(), name


def test_both_workers_have_the_same_history_and_a_resumed_one_too(of_two):
    _, root, (first, second) = of_two
    for name, history in first.items():
        assert without_times(history) == without_times(second[name]), name
    for whole, resumed in (("dropout", "stopped"), ("drawn", "killed")):
        assert without_times(first[resumed]) == without_times(first[whole])
        last = [Kept(root / name).last for name in (whole, resumed)]
        assert files_of(last[0]) == files_of(last[1])
