"""The item table in shards: the same training as with a copy in each worker, and checkpoints for any number of them."""

import contextlib
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.multiprocessing

from bert4rec import config as config_module
from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.vectors import to_lists, write_table
from bert4rec.errors import InputError
from bert4rec.model import network
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import _DRAWN_ROWS, ItemShards, Shard
from bert4rec.training import loop
from bert4rec.training import worker as worker_module
from bert4rec.training.checkpoint import load_shard
from bert4rec.training.loop import DDP_OPTIONS, Worker
from bert4rec.training.worker import read_sequences, run_epochs
from tests.helpers.datasets import random_times, write_dataset
from tests.helpers.trainer import Kept, Quiet, WorkerKilledError, every_item_as_negative
from tests.unit.training.test_worker import AT_EACH_STEP, HISTORIES, config_for, flip_a_bit, without_times

pytestmark = pytest.mark.unit

NUM_ITEMS = 20
SHARDED = "training.shard_items=true"
ALIKE = ["model.dropout_rate=0", "model.metadata_dropout=0", "training.num_epochs=1"]
SOFTMAX = "training.loss=sampled-softmax"
FILES = ("model", "training_state")
SETTINGS = {
    "cross-entropy": ["training.weight_decay=0.1", "training.gradient_clip_val=0.5"],
    "metadata": [
        "training.optimizer=adam",
        "model.use_genre_emb=true",
        "model.use_title_emb=true",
        "model.attention=causal",
    ],
    "sampled-softmax": [SOFTMAX, "training.optimizer=muon", "model.time_encoding=gap+bias"],
    "rowwise": ["model.dropout_rate=0", SOFTMAX, "training.item_optimizer=rowwise", "training.weight_decay=0.1"],
    "bf16": [SOFTMAX, "training.precision=bf16-mixed"],
    "rowwise clipped": ["training.loss=gbce", "training.item_optimizer=rowwise", "training.gradient_clip_val=0.5"],
}
OF_FOUR = ["cross-entropy", "rowwise"]
RESUMED = "rowwise"
TWO_EPOCHS = ["training.num_epochs=2", "training.early_stopping=false"]


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    genres = [[token % 4, 3][: token % 3] for token in range(NUM_ITEMS)]
    root = tmp_path_factory.mktemp("data")
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS - 1, 5)).astype(np.float32)  # one has no title
    write_table(
        f"{root}/titles.parquet", pa.table({"item": range(101, 100 + NUM_ITEMS), "embedding": to_lists(vectors)})
    )
    return write_dataset(root / "d", HISTORIES, NUM_ITEMS, times=random_times(HISTORIES), genres=genres)


def every_item_of_the_shard(self, device):
    """Instead of drawn negatives: each item of the shard once."""
    size = self.shard.size
    return torch.arange(size, device=device), torch.full((size,), -torch.log(torch.tensor(float(size))).item())


class Gathered(Kept):
    """Keeps checkpoints of which each worker has a part, as Ray Train does."""

    def report(self, metrics, name, directory, in_background, rank=0, size=1):
        if rank > 0:
            shutil.copytree(directory, self.path / f"part-{name}", dirs_exist_ok=True)
            shutil.rmtree(directory)
        barrier(size)
        stops = False
        if rank == 0:
            if size > 1:
                shutil.copytree(self.path / f"part-{name}", directory, dirs_exist_ok=True)
                shutil.rmtree(self.path / f"part-{name}")
            try:
                super().report(metrics, name, directory, in_background)
            except WorkerKilledError:
                stops = True
        told = [stops]
        if size > 1:
            torch.distributed.broadcast_object_list(told)
        if told[0]:
            raise WorkerKilledError


def barrier(size):
    if size > 1:
        torch.distributed.barrier()


def own_titles(config, dataset_path):
    embedding = {"output_path": f"{Path(dataset_path).parent}/titles.parquet"}
    return config.model_copy(update={"embedding": config.embedding.model_copy(update=embedding)})


def train(config, dataset_path, path, rank=0, size=1, stop_after=None):
    """History of one of several workers, or of one alone, from the last checkpoint in `path` if there is one."""
    dataset = PreparedDataset(dataset_path)
    config = own_titles(config, dataset_path)
    Path(path).mkdir(exist_ok=True, parents=True)
    barrier(size)
    kept = Gathered(path, stop_after)
    resume = kept.last
    barrier(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ItemShards, "negatives", every_item_of_the_shard)
        patch.setattr(loop, "PASS_TOKENS", {"cpu": 50})  # so that workers need different numbers of passes
        patch.setattr(loop, "VALIDATION_USERS", 37)  # the second of two workers has none of the last part
        patch.setattr("bert4rec.training.worker.make_loss", every_item_as_negative)
        return run_epochs(
            config,
            dataset,
            read_sequences(config, dataset),
            report=lambda *told, in_background: kept.report(*told, in_background, rank, size),
            progress=Quiet(),
            worker=Worker(rank, size),
            resume_from=resume,
            wrap=lambda model: torch.nn.parallel.DistributedDataParallel(model, **DDP_OPTIONS) if size > 1 else model,
        )


def in_group(rank, size, root, dataset_path, names):
    """The trainings of one of `size` gloo processes."""
    meeting = f"file://{root}/meet-{size}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    histories = {
        name: train(config_for(SHARDED, *ALIKE, *SETTINGS[name]), dataset_path, f"{root}/{size}/{name}", rank, size)
        for name in names
    }
    if size == 2:
        name = RESUMED
        config = config_for(SHARDED, *TWO_EPOCHS, *SETTINGS[name])
        often = config_for(SHARDED, *TWO_EPOCHS, *SETTINGS[name], AT_EACH_STEP)
        histories[f"{name} whole"] = train(config, dataset_path, f"{root}/2/{name} whole", rank, 2)
        with contextlib.suppress(WorkerKilledError):
            train(often, dataset_path, f"{root}/2/{name} stopped", rank, 2, stop_after=3)  # in the first epoch
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(f"{root}/2/{name} stopped", f"{root}/2/{name} left")
        histories[f"{name} stopped"] = train(config, dataset_path, f"{root}/2/{name} stopped", rank, 2)
    torch.save(histories, f"{root}/histories-{size}-{rank}.pt")
    torch.distributed.barrier()  # a process that leaves while another still talks to it is aborted
    torch.distributed.destroy_process_group()


def work(rank, root, dataset_path):
    """One of four processes, of which two begin."""
    torch.set_num_threads(1)
    worker_module.SECONDS_BETWEEN_LOOKS, worker_module.MOST_OF_THE_TIME = 0, 1
    if rank < 2:
        in_group(rank, 2, root, dataset_path, SETTINGS)
    in_group(rank, 4, root, dataset_path, OF_FOUR)


@pytest.fixture(scope="module")
def root(tmp_path_factory, dataset_path):
    """Directory of the trainings in shards, of two and of four workers."""
    root = tmp_path_factory.mktemp("shards")
    multiprocessing.set_forkserver_preload([__name__])  # imports once for all four
    torch.multiprocessing.start_processes(work, (str(root), dataset_path), nprocs=4, start_method="forkserver")
    return root


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_in_shards_is_that_of_whole_tables(dataset_path, root, tmp_path, name):
    config = config_for(*ALIKE, *SETTINGS[name])
    expected = train(config, dataset_path, tmp_path / "whole")
    whole = BERT4Rec.from_pretrained(Kept(tmp_path / "whole").last)
    own = config_for(SHARDED, *ALIKE, *SETTINGS[name])
    found = {1: (train(own, dataset_path, tmp_path / "one"), Kept(tmp_path / "one").last)}
    for size in (2, 4):
        if size == 2 or name in OF_FOUR:
            first, *others = [torch.load(root / f"histories-{size}-{rank}.pt")[name] for rank in range(size)]
            found[size] = first, Kept(root / str(size) / name).last
            assert all(without_times(other) == without_times(first) for other in others)
    exact, near, same = (2e-2, 5e-2, 0.1) if name == "bf16" else (1e-5, 5e-3, 1e-3)  # near ties may change places
    torch.manual_seed(config.data.seed)
    untrained = worker_module._new_model(own_titles(config, dataset_path), PreparedDataset(dataset_path), Worker())
    begun = dict(untrained.named_parameters())
    for size, (history, last) in found.items():
        for one, other in zip(expected, history, strict=True):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=exact), size
            assert other["val_mrr"] == pytest.approx(one["val_mrr"], abs=near), size
        model = BERT4Rec.from_pretrained(last)
        for key, one in whole.named_parameters():
            difference, moved = model.get_parameter(key) - one, one - begun[key]
            assert difference.norm() <= same * moved.norm() + 1e-6, (size, key)
        for key, one in whole.named_buffers():
            torch.testing.assert_close(model.get_buffer(key), one, rtol=100 * exact, atol=1e-6)
        assert model.num_parameters == whole.num_parameters


def shards_of(checkpoint):
    return {path.name: path.read_bytes() for path in Path(checkpoint).glob("*.safetensors")}


def test_a_resumed_run_ends_like_an_undisturbed_one(root):
    histories = torch.load(root / "histories-2-1.pt")
    whole, stopped = (Kept(root / "2" / f"{RESUMED} {how}") for how in ("whole", "stopped"))
    assert without_times(histories[f"{RESUMED} stopped"]) == without_times(histories[f"{RESUMED} whole"])
    assert shards_of(whole.last) == shards_of(stopped.last)
    assert len(shards_of(whole.last)) == 4


def wholes(config, checkpoint, size):
    """What `size` shards read from a checkpoint, put together: table, bias and the optimiser's rows of them."""
    found = {}
    for rank in range(size):
        shard = Shard(rank, size, NUM_ITEMS)
        model = BERT4Rec(config.model, NUM_ITEMS, shard=shard)
        state = load_shard(checkpoint, model)["optimizers"][-1]["state"]
        for number, (name, start) in enumerate(shard.starts.items()):
            rows = {name: model.get_parameter(name).detach()} | {
                f"{name} {key}": value for key, value in state[number].items() if value.ndim
            }
            for key, value in rows.items():
                whole = torch.full((NUM_ITEMS + 2, *value.shape[1:]), torch.nan, dtype=torch.float64)
                found.setdefault(key, whole)[start::size][: len(value)] = value.double()
    return found


@pytest.mark.parametrize("name", OF_FOUR)
def test_a_checkpoint_of_two_shards_is_read_by_any_number_of_workers(root, name):
    left = Kept(root / "2" / name).last
    config = config_for(SHARDED, *SETTINGS[name])
    expected = wholes(config, left, 2)
    assert len(expected) == {"cross-entropy": 6, "rowwise": 8}[name]  # and the step in which a row was touched last
    for size in (1, 3, 4):
        for key, whole in wholes(config, left, size).items():
            assert torch.equal(whole.nan_to_num(7), expected[key].nan_to_num(7)), (size, key)
    assert int(expected["items.embedding.weight"].isnan().sum()) == 0
    model = BERT4Rec.from_pretrained(left)
    assert torch.equal(model.items.embedding.weight.double(), expected["items.embedding.weight"])
    assert torch.equal(model.output_bias.double(), expected["output_bias"][:NUM_ITEMS])


def test_a_large_model_is_read_from_local_disk(root, monkeypatch):
    """Put together from its shards in a file that is mapped into memory."""
    left = Kept(root / "2" / "metadata").last
    expected = BERT4Rec.from_pretrained(left).state_dict()
    made = []
    empty = storage.empty
    monkeypatch.setattr(storage, "empty", lambda *given: made.append(empty(*given)) or made[-1])
    monkeypatch.setattr(network, "_MAPPED_BYTES", 600)
    found = BERT4Rec.from_pretrained(left).state_dict()
    mapped = [array for array in made if isinstance(array, np.memmap)]
    assert {array.shape for array in mapped} >= {expected["items.embedding.weight"].shape}
    assert len(mapped) < len(made) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_run_of_two_goes_on_with_one_to_the_same_end(dataset_path, root, tmp_path):
    shutil.copytree(root / "2" / f"{RESUMED} left", tmp_path / "one")
    assert "unfinished-01" in Kept(tmp_path / "one").last
    history = train(config_for(SHARDED, *TWO_EPOCHS, *SETTINGS[RESUMED]), dataset_path, tmp_path / "one")
    for one, two in zip(history, torch.load(root / "histories-2-0.pt")[f"{RESUMED} whole"], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
    assert len(history) == 2


# Bad input


@pytest.fixture
def left(root, tmp_path):
    """A copy of a checkpoint of two shards."""
    path = tmp_path / "left"
    shutil.copytree(Kept(root / "2" / "cross-entropy").last, path)
    return path


def read(path):
    return load_shard(str(path), BERT4Rec(config_for().model, NUM_ITEMS, shard=Shard(0, 1, NUM_ITEMS)))


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 1000), flip_a_bit, os.unlink])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", *(f"{kind}-0000{n}-of-00002.safetensors" for kind in FILES for n in (1, 2))],
)
def test_a_damaged_or_missing_shard_is_named(left, damage, name):
    damage(left / name)
    with pytest.raises(InputError) as raised:
        read(left)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)
    if damage is os.unlink and "of" in name:
        assert "is missing; the checkpoint is in 2 files" in str(raised.value)
    if name.startswith("model"):
        with pytest.raises(InputError, match=name):
            BERT4Rec.from_pretrained(str(left))


def test_a_model_of_whole_tables_is_none_of_shards(tmp_path):
    config = config_for().model
    BERT4Rec(config, NUM_ITEMS).save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"is not in shards; it was trained without training\.shard_items"):
        BERT4Rec(config, NUM_ITEMS, shard=Shard(0, 1, NUM_ITEMS)).read_shard(str(tmp_path))


def test_there_are_not_more_workers_than_items(dataset_path):
    dataset, config = PreparedDataset(dataset_path), config_for(SHARDED)
    read = read_sequences(config, dataset)
    with pytest.raises(InputError, match=r"shard_items=true: .*/d has 20 items for 21 workers; expected an item"):
        run_epochs(config, dataset, read, report=None, progress=Quiet(), worker=Worker(0, 21))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["training.precision=16-mixed"], "needs training.precision=32-true or bf16-mixed"),
        (["training.start_from=runs/a/b"], "cannot be combined with training.start_from"),
        (["model.output_features=fused"], "needs model.output_features=ids"),
        (["evaluation.candidates=true"], "needs evaluation.candidates=false"),
        (["model.share_embeddings=false"], "needs model.share_embeddings=true"),
        (["model.output_features=fused", "data.include_new_items=true"], "needs model.output_features=ids"),
    ],
)
def test_what_cannot_be_in_shards_is_refused(settings, expected):
    with pytest.raises(InputError, match=rf"training\.shard_items=true {re.escape(expected)}"):
        load_config(None, [SHARDED, *settings])


def test_a_loss_that_shards_do_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(config_module, "SHARDED_LOSSES", ("cross-entropy",))
    with pytest.raises(InputError, match=r"shard_items=true needs training\.loss=cross-entropy, not gbce"):
        load_config(None, [SHARDED, "training.loss=gbce"])


# The parts


@pytest.mark.parametrize(("num_items", "width"), [(20, 8), (_DRAWN_ROWS + 1, 2), (2 * _DRAWN_ROWS - 2, 2)])
def test_a_shard_begins_with_its_rows_of_the_whole_table(num_items, width):
    """To the last bit, and so does what is drawn after it."""
    config = load_config(None, [f"model.hidden_units={width}", "model.num_heads=1"]).model
    torch.manual_seed(0)
    whole = BERT4Rec(config, num_items).state_dict()
    shards = [Shard(rank, 3, num_items) for rank in range(3)]
    for shard in shards:
        torch.manual_seed(0)
        for name, own in BERT4Rec(config, num_items, shard=shard).state_dict().items():
            rows = whole[name][shard.starts[name] :: 3] if name in shard.starts else whole[name]
            assert torch.equal(own, rows), name
    assert sum(shard.size for shard in shards) == num_items
    columns = torch.cat([shard.columns() for shard in shards])
    assert columns.sort().values.tolist() == list(range(num_items))


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_each_shard_draws_its_share_from_its_own_items(sampling):
    """By popularity in proportion to their interactions; a shard without any draws none."""
    config = load_config(
        None, [SHARDED, SOFTMAX, "training.num_negatives=40001", f"training.negative_sampling={sampling}"]
    )
    counts = torch.tensor([3.0, 0.0, 1.0, 0.0, 0.0])  # items 0, 2 and 4 are of the second of two workers
    drawn = []
    for rank in range(2):
        model = BERT4Rec(config_for().model, 5, shard=Shard(rank, 2, 5))
        model.shards.prepare(config.training, counts)
        torch.manual_seed(0)
        drawn.append(model.shards.negatives(torch.device("cpu")))
    for (items, log_q), size in zip(drawn, (2, 3), strict=True):
        share = torch.bincount(items, minlength=size) / 20_001
        if sampling == "uniform":
            assert share.tolist() == pytest.approx([1 / size] * size, abs=0.02)
            assert log_q.exp().tolist() == pytest.approx([1 / size] * 20_001)
        elif size == 3:
            assert share.tolist() == pytest.approx([0.75, 0.25, 0], abs=0.02)
            assert log_q.exp().tolist() == pytest.approx([0.75 if item == 0 else 0.25 for item in items.tolist()])
        else:
            assert len(items) == 0
