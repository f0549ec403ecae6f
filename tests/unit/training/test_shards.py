"""The item table in shards: the same training as with a copy in each worker, and checkpoints for any number of them."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from bert4rec.data.dataset import PreparedDataset
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import ItemShards
from bert4rec.training import loop
from bert4rec.training.loop import DDP_OPTIONS, Worker
from bert4rec.training.worker import read_sequences, run_epochs
from tests.helpers.datasets import write_dataset
from tests.helpers.trainer import Kept, Quiet, WorkerKilledError, every_item_as_negative
from tests.unit.training.test_worker import HISTORIES, config_for, without_times

pytestmark = pytest.mark.unit

NUM_ITEMS = 20
SHARDED = "training.shard_items=true"
ALIKE = ["model.dropout_rate=0", "model.metadata_dropout=0", "training.num_epochs=2"]
SOFTMAX = "training.loss=sampled-softmax"
SETTINGS = {
    "cross-entropy": ["training.weight_decay=0.1", "training.gradient_clip_val=0.5"],
    "genres": ["training.optimizer=adam", "model.use_genre_emb=true", "model.position_encoding=rotary"],
    "sampled-softmax": [SOFTMAX, "training.optimizer=muon", "model.time_encoding=gap+bias"],
    "gbce": ["training.loss=gbce", "training.gradient_clip_val=0.5"],
    "rowwise": [SOFTMAX, "training.item_optimizer=rowwise", "training.weight_decay=0.1"],
    "rowwise clipped": ["training.loss=gbce", "training.item_optimizer=rowwise", "training.gradient_clip_val=0.5"],
}
OF_FOUR = ["cross-entropy", "rowwise"]
RESUMED = ["training.num_epochs=4", "training.early_stopping=false"]


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    from tests.helpers.datasets import random_times

    genres = [[token % 4, 3][: token % 3] for token in range(NUM_ITEMS)]
    root = tmp_path_factory.mktemp("data")
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


def train(config, dataset_path, path, rank=0, size=1, stop_after=None):
    """History of one of several workers, or of one alone, from the last checkpoint in `path` if there is one."""
    dataset = PreparedDataset(dataset_path)
    Path(path).mkdir(exist_ok=True, parents=True)
    barrier(size)
    kept = Gathered(path, stop_after)
    resume = kept.last
    barrier(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ItemShards, "negatives", every_item_of_the_shard)
        patch.setattr(loop, "PASS_TOKENS", {"cpu": 40})  # so that workers need different numbers of passes
        patch.setattr(loop, "VALIDATION_USERS", 7)
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


def work(rank, size, root, dataset_path, names):
    """One of several gloo processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=size)
    histories = {
        name: train(config_for(SHARDED, *ALIKE, *SETTINGS[name]), dataset_path, f"{root}/{name}", rank, size)
        for name in names
    }
    if size == 2:
        for name in ("cross-entropy", "rowwise"):
            config = config_for(SHARDED, *SETTINGS[name], *RESUMED)
            histories[f"{name} whole"] = train(config, dataset_path, f"{root}/{name} whole", rank, size)
            try:
                train(config, dataset_path, f"{root}/{name} stopped", rank, size, stop_after=2)
            except WorkerKilledError:
                pass
            histories[f"{name} stopped"] = train(config, dataset_path, f"{root}/{name} stopped", rank, size)
    torch.save(histories, f"{root}/histories-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_workers(tmp_path_factory, dataset_path):
    """Directories of trainings in shards, by the number of workers."""
    roots = {size: tmp_path_factory.mktemp(f"of{size}") for size in (2, 4)}
    for size, names in ((2, list(SETTINGS)), (4, OF_FOUR)):
        torch.multiprocessing.spawn(work, (size, str(roots[size]), dataset_path, names), nprocs=size)
    return roots


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_in_shards_is_that_of_whole_tables(dataset_path, of_workers, tmp_path, name):
    config = config_for(*ALIKE, *SETTINGS[name])
    expected = train(config, dataset_path, tmp_path / "whole")
    whole = BERT4Rec.from_pretrained(Kept(tmp_path / "whole").last)
    torch.manual_seed(config.data.seed)
    own = config_for(SHARDED, *ALIKE, *SETTINGS[name])
    found = {1: (train(own, dataset_path, tmp_path / "one"), Kept(tmp_path / "one").last)}
    for size, root in of_workers.items():
        if size == 2 or name in OF_FOUR:
            first, *others = [torch.load(root / f"histories-{rank}.pt")[name] for rank in range(size)]
            found[size] = first, Kept(root / name).last
            assert all(without_times(other) == without_times(first) for other in others)
    for size, (history, last) in found.items():
        for one, other in zip(expected, history, strict=True):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5), size
            assert other["val_mrr"] == pytest.approx(one["val_mrr"], abs=5e-3), size  # near ties may change places
        model = BERT4Rec.from_pretrained(last)
        for (key, one), other in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
            assert (one.float() - other.float()).norm() <= 1e-3 * one.float().norm() + 1e-6, (size, key)
        assert model.num_parameters == whole.num_parameters
