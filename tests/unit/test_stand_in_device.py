"""Everything that can lie on a GPU, on a stand-in for one: equal to the CPU, and no step waits for the device."""

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows, item_counts, training_windows, usual_gap
from bert4rec.evaluation import evaluate
from bert4rec.inference import fit_blend
from bert4rec.inference.export import ScoringFunction
from bert4rec.inference.item_item import FITTED
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender
from bert4rec.model import item_vectors
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.losses import make_loss
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import Shard
from bert4rec.training import loop
from bert4rec.training.loop import Worker, make_optimizers, train_epoch, validate
from bert4rec.training.muon import BFloat16Muon
from bert4rec.training.worker import read_sequences
from tests.helpers.datasets import random_histories, random_times, write_dataset
from tests.helpers.stand_in_device import DEVICE, moved, stand_in_device
from tests.helpers.trainer import Quiet
from tests.unit.inference.test_blend import blend_of

pytestmark = pytest.mark.unit

NUM_ITEMS = 40
GENRES = ["model.use_genre_emb=true"]
NETWORKS = {
    "ids": [],
    "rotary": ["model.position_encoding=rotary"],
    "causal": ["model.attention=causal", "model.output_transform=false"],
    "times": ["model.time_encoding=rotary+gap+bias+calendar"],
    "rotary and times": ["model.position_encoding=rotary", "model.time_encoding=rotary"],
    "own output": ["model.share_embeddings=false"],
    **{
        f"{fusion} of genres and titles": [*GENRES, "model.use_title_emb=true", f"model.metadata_fusion={fusion}"]
        for fusion in ("concat", "add", "gate")
    },
    "fused output": [*GENRES, "model.use_title_emb=true", "model.output_features=fused"],
}
SAMPLED = ["training.loss=sampled-softmax", "training.num_negatives=16"]
TRAININGS = {
    "cross-entropy": [],
    "sampled-softmax": SAMPLED,
    "by popularity": [*SAMPLED, "training.negative_sampling=popularity"],
    "gbce": ["training.loss=gbce", "training.num_negatives=16"],
    "rows alone": [*SAMPLED, "training.item_optimizer=rowwise", "training.weight_decay=0.1"],
    "muon": ["training.optimizer=muon"],
    "clipped": ["training.optimizer=adam", "training.gradient_clip_val=0.5"],
}
SHARDED = ["training.shard_items=true"]
IN_SHARDS = {
    "in shards": [*SHARDED, *GENRES, "training.gradient_clip_val=0.5"],
    "in shards, by popularity": [*SHARDED, *TRAININGS["by popularity"]],
    "in shards, gbce": [*SHARDED, *TRAININGS["gbce"]],
    "in shards, rows alone": [*SHARDED, *TRAININGS["rows alone"]],
}
WAITS_OF_SHARDS = Counter({"aten::_unique2": 1, "aten::bincount": 1, "tolist": 3, "copy to the device": 2})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    histories = random_histories(70, NUM_ITEMS, longest=20)
    counts = [len(history) for history in histories.values()]
    path = write_dataset(
        tmp_path_factory.mktemp("device") / "dataset",
        histories,
        NUM_ITEMS,
        years=[None if token % 7 == 0 else 1990 + token % 20 for token in range(NUM_ITEMS)],
        last_years=[None if user % 5 == 0 else 2000 + user % 9 for user in range(70)],
        genres=[sorted(set(random.integers(0, 7, random.integers(0, 4)).tolist())) for _ in range(NUM_ITEMS)],
        before={"recent_last": [count // 2 for count in counts]},
        times=random_times(histories),
    )
    return PreparedDataset(path)


def config_of(*settings):
    common = ["data.data_dir=unused", "data.batch_size=32", "model.random_mask_prob=0.4", "model.num_layers=1"]
    network = ["model.hidden_units=16", "model.num_heads=2", "model.max_len=12", "training.num_epochs=2"]
    no_dropout = ["model.dropout_rate=0", "model.metadata_dropout=0"]
    return load_config(None, [*common, *network, *no_dropout, "model.use_title_emb=false", *settings])


def model_of(config, dataset):
    torch.manual_seed(1)
    titles = np.random.default_rng(2).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    titles[::3] = 0  # without a title
    metadata = Metadata.of(config.model, dataset.items(), titles)
    shard = Shard(0, 1, NUM_ITEMS) if config.training.shard_items else None
    model = BERT4Rec(config.model, NUM_ITEMS, "test", metadata, shard=shard)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5  # attention makes a difference, and its gradients are more than rounding
    return model


class Watch:
    """A `loop.Saver` that notes after each step how often the device was waited for until then."""

    def __init__(self, waits):
        self.waits, self.by_step = waits, [Counter()]

    def is_due(self, place):
        self.by_step.append(Counter(self.waits))
        return False


def trained(config, dataset, waits=None):
    """The trained model, the metrics of an epoch, and what made each step wait. With `waits`: on the device."""
    read = read_sequences(config, dataset)
    windows = training_windows(Windows.from_sequences(read), config.data)
    model = model_of(config, dataset)
    if model.times is not None:
        model.times.usual_gap.fill_(usual_gap(windows))
    counts = item_counts(windows, NUM_ITEMS)
    model.item_counts.copy_(counts)
    by_popularity = config.training.negative_sampling == "popularity"
    model.loss = make_loss(config.training, counts.float() if by_popularity else None)
    device = torch.device("cpu") if waits is None else DEVICE
    if model.shards is not None:
        model.row_tables = model.shards.prepare(config.training, counts)
    elif config.training.item_optimizer == "rowwise":
        model.train_by_rows()
    model = model if waits is None else moved(model)
    optimizers = make_optimizers(model, config.training)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    watch = Watch({} if waits is None else waits)  # a Counter is false as long as it is empty
    found = train_epoch(model, windows, config, 0, optimizers, scaler, Worker(device=device), watch)
    metrics = validate(model, Windows.from_sequences(read), config, Worker(device=device))
    return model, {"train_loss": found["train_loss"], **metrics}, watch.by_step


def weights_of(model):
    return torch.cat([getattr(value, "elem", value).detach().flatten() for value in model.parameters()])


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, id=name) for name, each in (NETWORKS | TRAININGS | IN_SHARDS).items()]
    + [
        pytest.param([*NETWORKS["fused output"], *SAMPLED, *more], id=f"fused output, {name}")
        for name, more in {
            "sampled-softmax": [],
            "rows alone": ["training.item_optimizer=rowwise", "training.gradient_clip_val=0.5"],
        }.items()
    ],
)
def test_a_training_is_that_of_the_cpu_and_no_step_waits(dataset, settings, monkeypatch):
    monkeypatch.setattr(loop, "muon_for", lambda device, width: BFloat16Muon)
    config = config_of(*settings)
    cpu, expected, _ = trained(config, dataset)
    with stand_in_device() as waits:
        model, metrics, by_step = trained(config, dataset, waits)
    assert metrics == pytest.approx(expected, rel=1e-5)
    before, after = weights_of(model_of(config, dataset)), weights_of(cpu)
    assert (weights_of(model) - after).norm() < 0.01 * (after - before).norm()
    # How many rows go to each worker is known on the device alone, and needed by the host.
    shards = Counter() if model.shards is None else WAITS_OF_SHARDS
    assert by_step[2] - by_step[1] == shards, "a step waits for the device"


def test_titles_too_large_for_the_device_are_read_by_row(dataset, monkeypatch):
    monkeypatch.setattr(item_vectors, "_BYTES_ON_GPU", 0)
    config = config_of(*NETWORKS["gate of genres and titles"])
    _, expected, _ = trained(config, dataset)
    with stand_in_device() as waits:
        _, metrics, by_step = trained(config, dataset, waits)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert by_step[2] - by_step[1] == {"copy to the CPU": 1, "copy to the device": 1}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_recommender_and_its_program_are_those_of_the_cpu(dataset, network):
    config = config_of(*NETWORKS[network], "inference.popularity_discount=0.5", "inference.score_memory_mb=1")
    read, items = read_sequences(config, dataset), dataset.items()
    history = torch.randint(1, NUM_ITEMS + 1, (5, 20))
    own, times, inputs = [101, 117, 109], None, [history]
    if config.model.time_parts:
        times = [10**9, 10**9 + 60, 10**9 + 10**6]
        inputs += [10**9 + torch.randint(10**6, (5, 20)).sort(1).values, torch.full((5,), 10**9 + 2 * 10**6)]
    found = []
    with stand_in_device():
        for place in (lambda model: model, moved):
            model = model_of(config, dataset)
            model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
            model = place(model).eval()
            recommender, ranking = Recommender(model, items), Ranking.of(config.inference)
            asked = recommender._asked(read, None)
            ranked = [each.table for each in recommender.rank(asked, InferenceConfig(batch_size=30), ranking)]
            with torch.no_grad():
                given = [each.to(model.output_bias.device) for each in inputs]
                outputs = [*ScoringFunction(model, 4, ranking).eval()(*given), ScoringFunction(model).eval()(*given)]
            frames = [recommender.recommend(own, 5, last_year=1999, times=times), recommender.similar(104, 3)]
            found.append((pa.concat_tables(ranked), [output.cpu() for output in outputs], frames))
    (table, outputs, frames), (expected, of_cpu, frames_of_cpu) = found[1], found[0]
    assert table.num_rows == 70 * 10
    assert table.drop(["score"]) == expected.drop(["score"])
    np.testing.assert_allclose(table["score"], expected["score"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs, of_cpu)
    for frame, own_frame in zip(frames, frames_of_cpu, strict=True):
        pd.testing.assert_frame_equal(frame, own_frame)


RULES = {
    "caps": Ranking(max_per={"genre": 2}),
    "diverse": Ranking(diversity=0.4, diversity_pool=15),
    "probabilities above a least one": Ranking(scores="probability", min_score=0.026),
    "with seen, no years": Ranking(exclude_seen=False, exclude_future=False),
}


@pytest.mark.parametrize("rules", [*RULES, "ease", "item-knn"])
def test_each_rule_ranks_as_on_the_cpu(dataset, rules, tmp_path):
    """Lists of items for all and for each user as well; and blends."""
    ranking = RULES.get(rules)
    if ranking is None:
        blend, _ = blend_of(tmp_path, rules, list(random_histories(50, NUM_ITEMS, 7).values()), 0.7, NUM_ITEMS)
        ranking = Ranking(blend=blend)
    histories = [[101, 117, 109], [104], [140, 139, 138, 101]]
    lists = [
        {"candidates": list(range(101, 130)), "exclude": [102, 103]},
        {"candidates": [list(range(101, 120)), [], list(range(110, 141))], "exclude": [[105], [106], []]},
    ]
    found = []
    with stand_in_device():
        for place in (lambda model: model, moved):
            model = model_of(config_of(*GENRES), dataset)
            recommender = Recommender(place(model).eval(), dataset.items())
            frames = [recommender.recommend_many(histories, 8, ranking=ranking, **given) for given in ({}, *lists)]
            found.append(frames)
    for frame, expected in zip(found[1], found[0], strict=True):
        pd.testing.assert_frame_equal(frame, expected)
    assert len(found[0][0]) > len(found[0][2]) > 0  # the second history has no candidates


@pytest.mark.parametrize("exclude_seen", ["true", "false"])
def test_an_evaluation_is_that_of_the_cpu(dataset, exclude_seen, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.ray, "get", lambda fitted: fitted)
    protocols = "[all, popularity-100, popularity-100-of-all, uniform-100, uniform-100-of-all]"
    config = config_of(
        *NETWORKS["fused output"],
        f"evaluation.protocols={protocols}",
        "evaluation.baselines=[popularity, popularity-7-days, item-knn, ease]",
        f"evaluation.exclude_seen={exclude_seen}",
        "inference.popularity_discount=0.3",
    )
    model = model_of(config, dataset)
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    model.save_pretrained(str(tmp_path))
    opened = (dataset.path, dataset.manifest.fingerprint)
    fitted = {name: fit_blend.fit_to_training(name, config, *opened) for name in FITTED}
    counts = (torch.arange(NUM_ITEMS), torch.arange(NUM_ITEMS).flip(0))
    systems = [evaluate.MODEL, *config.evaluation.baselines]
    arguments = (config, *opened, str(tmp_path), Ranking.of(config.inference), systems, counts, fitted, False)
    counted = []
    with stand_in_device():
        for device in (torch.device("cpu"), DEVICE):
            worker = evaluate._Evaluator(*arguments, Quiet())
            if device == DEVICE:
                worker.device, worker.model = device, moved(worker.model)
            counted.append([{name: each.tolist() for name, each in worker(part).items()} for part in dataset.parts()])
    assert counted[1] == counted[0]
    assert len(set(counted[0][0]["key"])) > len(systems) * 5  # ranks, and recommended items, of every system


def test_the_device_refuses_what_a_gpu_would_and_counts_what_waits_for_it():
    here = torch.ones(3)
    with stand_in_device() as waits:
        there = torch.arange(3.0, device=DEVICE)
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            there + here
        with pytest.raises(RuntimeError, match="a CPU tensor indexed by one of the device"):
            here[there.long()]
        assert there.device == DEVICE
        assert (there + torch.tensor(1.0)).sum() == 6  # a scalar may go with it; a condition waits
        assert there[there > 1].tolist() == [2]
        assert waits == {"aten::_local_scalar_dense": 1, "index by a mask": 1, "tolist": 1}
