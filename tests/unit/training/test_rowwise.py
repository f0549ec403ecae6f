"""Rows touched alone: equal to AdamW of the whole table."""

import numpy as np
import pytest
import torch

from bert4rec.config import load_config
from bert4rec.data.windows import training_windows
from bert4rec.errors import InputError
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.losses import make_loss
from bert4rec.model.network import BERT4Rec
from bert4rec.model.rows import RowTable
from bert4rec.model.shards import Shard
from bert4rec.training import rowwise
from bert4rec.training.loop import make_optimizers, train_epoch
from bert4rec.training.rowwise import RowwiseAdam
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.trainer import WorkerKilledError, every_item_as_negative, run
from tests.unit.model.test_batches import windows_of
from tests.unit.training.test_worker import HISTORIES, config_for, files_of, without_times

pytestmark = pytest.mark.unit

ROWWISE = ["training.item_optimizer=rowwise"]
SAMPLED = ["training.loss=sampled-softmax", "training.num_negatives=30"]
NUM_ITEMS = 25


class Table(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shape", [(9, 3), (9,)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rows_are_updated_as_by_adamw_of_the_whole_table(shape, weight_decay, monkeypatch):
    """Rows that rest for up to 250 steps, rows looked up twice in one step, and rows that catch up in between."""
    monkeypatch.setattr(rowwise, "_MOVING_STEPS", 200)
    module, whole, random = Table(*shape), Table(*shape), np.random.default_rng(0)
    start = module.table.detach().clone()
    optimizer = RowwiseAdam([RowTable(module, "table")], 0.1, weight_decay)
    dense = torch.optim.AdamW(whole.parameters(), 0.1, weight_decay=weight_decay if len(shape) > 1 else 0)
    for number in range(500):
        rows = random.choice(6, 4)  # row 8 is never touched
        if number % 401 == 0:
            rows[0] = 7
        factor = torch.from_numpy(random.normal(size=(4, *shape[1:])).astype(np.float32))
        for group in (*optimizer.param_groups, *dense.param_groups):
            group["lr"] = 0.1 / (1 + number)
        looked_up = optimizer.tables[0](torch.from_numpy(rows))
        torch.testing.assert_close(looked_up, whole.table[rows], rtol=1e-5, atol=1e-6)  # up to date when it is read
        (looked_up * factor).sum().backward()
        dense.zero_grad()
        (whole.table[rows] * factor).sum().backward()
        optimizer.collect()
        optimizer.step()
        dense.step()
        if number == 250:
            optimizer.catch_up()
            torch.testing.assert_close(module.table, whole.table, rtol=1e-5, atol=1e-6, check_stride=False)
    optimizer.catch_up()
    torch.testing.assert_close(module.table.detach(), whole.table.detach(), rtol=1e-5, atol=1e-6)
    is_decayed = weight_decay > 0 and len(shape) > 1
    assert torch.equal(module.table[8], start[8]) != is_decayed
    assert not torch.equal(module.table[7], start[7])


def test_padding_never_changes():
    module = Table(4, 2)
    start = module.table.detach().clone()
    optimizer = RowwiseAdam([RowTable(module, "table", padding=0)], 0.1, 0.0)
    optimizer.tables[0](torch.tensor([0, 2, 0])).sum().backward()
    (gradients,) = optimizer.collect()
    optimizer.step()
    assert gradients.tolist() == [[0, 0], [1, 1]]
    assert torch.equal(module.table[0], start[0])
    assert (module.table[2] < start[2]).all()


def test_a_look_up_without_gradients_is_not_kept():
    table = RowTable(Table(4, 2), "table")
    with torch.no_grad():
        table(torch.tensor([1]))
    table(torch.tensor([3])).sum().backward()
    rows, gradients = table.take_gradients()
    assert (rows.tolist(), gradients.tolist()) == ([3], [[1, 1]])


# Whole trainings, with negatives that touch every item


def trained(config, metadata=None, loss=every_item_as_negative):
    histories = list(random_histories(60, NUM_ITEMS - 1, longest=9).values())
    windows = training_windows(windows_of(histories), config.data)
    torch.manual_seed(0)
    shard = Shard(0, 1, NUM_ITEMS) if config.training.shard_items else None
    model = BERT4Rec(config.model, NUM_ITEMS, "test", metadata, shard=shard)
    model.loss = loss(config.training)
    if model.shards is not None:
        model.row_tables = model.shards.prepare(config.training, model.item_counts)
    elif config.training.item_optimizer == "rowwise":
        model.train_by_rows()
    optimizers = make_optimizers(model, config.training)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = [train_epoch(model, windows, config, epoch, optimizers, scaler) for epoch in range(4)]
    return model, [metrics["train_loss"] for metrics in found]


def genres():
    from tests.unit.model.test_item_vectors import ragged

    return Metadata({"genre": (4, ragged([[token % 4, 3][: token % 3] for token in range(NUM_ITEMS)]))}, None)


WHOLE = {
    "sampled-softmax": [],
    "gbce": ["training.loss=gbce"],
    "decayed": ["training.weight_decay=0.1", "training.scheduler=linear"],
    "clipped": ["training.gradient_clip_val=0.5"],
    "adam": ["training.optimizer=adam"],
    "muon": ["training.optimizer=muon"],
    "own output": ["model.share_embeddings=false"],
    "genres": ["model.use_genre_emb=true"],
    "fused output": ["model.use_genre_emb=true", "model.output_features=fused"],
}


@pytest.mark.parametrize("settings", WHOLE.values(), ids=WHOLE)
def test_where_every_step_touches_all_rows_it_is_the_dense_training(settings):
    metadata = genres() if "model.use_genre_emb=true" in settings else None
    # One step has all users, and with them all the items that any step has.
    common = ["data.batch_size=100", "model.dropout_rate=0", "model.metadata_dropout=0", *SAMPLED, *settings]
    model, losses_of_rows = trained(config_for(*common, *ROWWISE), metadata=metadata)
    dense, expected = trained(config_for(*common), metadata=metadata)
    assert losses_of_rows == pytest.approx(expected, rel=1e-5)
    assert model.row_tables
    assert not dense.row_tables
    torch.manual_seed(0)
    begin = BERT4Rec(dense.config, NUM_ITEMS, "test", metadata)
    for name in ["items.embedding.weight", "output_bias"] + ["output_embedding"] * (len(model.row_tables) == 3):
        own, other, before = (each.get_parameter(name) for each in (model, dense, begin))
        assert (other - before).norm() > 0.005
        assert (own - other).norm() < 1e-3 * (other - before).norm()


@pytest.mark.parametrize("shards", [[], ["training.shard_items=true"]], ids=["whole", "one shard"])
def test_where_steps_touch_few_rows_it_is_the_dense_training(shards):
    """120 steps of two users and two negatives, the same ones in both."""
    settings = ["data.batch_size=2", "training.num_negatives=2", "training.weight_decay=0.1", "model.dropout_rate=0"]
    settings += ["training.lr=0.01"]
    common = ["training.loss=sampled-softmax", *settings]
    model, losses_of_rows = trained(config_for(*common, *ROWWISE, *shards), loss=make_loss)
    dense, expected = trained(config_for(*common), loss=make_loss)
    assert losses_of_rows == pytest.approx(expected, rel=1e-5)
    for name in ("items.embedding.weight", "output_bias"):  # a key's bias has no gradient but rounding
        torch.testing.assert_close(model.get_parameter(name), dense.get_parameter(name), rtol=0, atol=1e-3)


# Resuming, and what cannot be (two workers are in test_worker.py)


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", HISTORIES, 20)


def test_a_resumed_run_ends_like_an_undisturbed_one(dataset_path, tmp_path):
    settings = ["training.weight_decay=0.1", "training.early_stopping=false", "training.num_negatives=3"]
    config = config_for("training.loss=sampled-softmax", *settings, *ROWWISE)
    history, whole = run(config, dataset_path, tmp_path / "whole")
    with pytest.raises(WorkerKilledError):
        run(config, dataset_path, tmp_path / "stopped", 2)
    resumed, kept = run(config, dataset_path, tmp_path / "stopped")
    assert without_times(resumed) == without_times(history)
    assert files_of(kept.last) == files_of(whole.last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"rowwise needs training\.loss=sampled-softmax or gbce; cross-entropy changes every item"),
        (
            [*SAMPLED, "training.optimizer=adam", "training.weight_decay=0.1"],
            r"adam needs training\.weight_decay=0, not 0\.1",
        ),
        ([*SAMPLED, "training.precision=16-mixed"], r"needs training\.precision=32-true or bf16-mixed"),
    ],
)
def test_what_changes_all_rows_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [*settings, *ROWWISE])
