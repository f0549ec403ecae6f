"""The same draws on a GPU and on the CPU: losses, gradients, rankings, and a training that goes on."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch

from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows, training_windows
from bert4rec.inference.export import ScoringFunction, export_program
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender
from bert4rec.model.batches import iter_steps
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.losses import gbce, linear_cross_entropy, sampled_softmax
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import Worker, make_optimizers, train_epoch, validate
from bert4rec.training.muon import BFloat16Muon
from tests.helpers.datasets import random_histories, write_dataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

NUM_ITEMS = 60
NEGATIVES = torch.arange(0, NUM_ITEMS, 4)
LOSSES = {
    "cross-entropy": linear_cross_entropy,
    "gbce": lambda *of: gbce(*of, NEGATIVES.to(of[0].device), 0.75),
    "sampled-softmax": lambda *of: sampled_softmax(
        *of, NEGATIVES.to(of[0].device), torch.full((len(NEGATIVES),), -4.0, device=of[0].device)
    ),
}
FEATURES = {
    "ids": [],
    "rotary": ["model.position_encoding=rotary"],
    "own output": ["model.share_embeddings=false"],
    **{fusion: ["model.use_genre_emb=true", f"model.metadata_fusion={fusion}"] for fusion in ("gate", "add", "concat")},
    "fused output": ["model.use_genre_emb=true", "model.output_features=fused"],
}
SCALE = 2.0**12
"""Of the loss, as the scaler of 16-mixed has it: small gradients are zero in float16."""
DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    genres = [sorted(set(random.integers(0, 7, random.integers(0, 4)).tolist())) for _ in range(NUM_ITEMS)]
    histories = random_histories(240, NUM_ITEMS, longest=40)
    path = write_dataset(tmp_path_factory.mktemp("gpu") / "dataset", histories, NUM_ITEMS, genres=genres)
    return PreparedDataset(path)


def config_of(*settings):
    common = ["data.data_dir=unused", "data.batch_size=64", "data.holdout=2", "data.min_interactions=4"]
    network = ["model.hidden_units=32", "model.num_heads=2", "model.max_len=24", "model.random_mask_prob=0.4"]
    no_dropout = ["model.dropout_rate=0", "model.metadata_dropout=0"]
    return load_config(None, [*common, *network, *no_dropout, "training.gradient_clip_val=5", *settings])


def model_of(config, dataset, device):
    torch.manual_seed(1)
    return BERT4Rec(config.model, NUM_ITEMS, "test", Metadata.of(config.model, dataset.items(), None)).to(device)


def trained(config, dataset, device, epochs, model=None, states=None):
    """The model, the state of its training, and the loss of each epoch."""
    windows = training_windows(Windows.from_sequences(dataset.sequences()), config.data)
    model = model or model_of(config, dataset, device)
    optimizers = make_optimizers(model, config.training)
    scaler = torch.amp.GradScaler(device, enabled=config.training.precision == "16-mixed")
    if states is not None:
        for optimizer, state in zip(optimizers, states[0], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(states[1])
    worker = Worker(device=torch.device(device))
    losses = [train_epoch(model, windows, config, epoch, optimizers, scaler, worker)["train_loss"] for epoch in epochs]
    return model, ([optimizer.state_dict() for optimizer in optimizers], scaler.state_dict()), losses


def first_loss_and_gradients(config, dataset, device, loss):
    windows = training_windows(Windows.from_sequences(dataset.sequences()), config.data)
    model, dtype = model_of(config, dataset, device), DTYPES[config.training.precision]
    model.loss = loss
    step = next(iter_steps(windows, config.data, config.model, NUM_ITEMS, 0, 0, 1, 10**6, torch.device(device)))
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        value = sum(model(batch) for batch in step.batches) / step.num_targets
    (SCALE * value).backward()
    return value.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]) / SCALE


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_that_of_the_cpu(dataset, loss, features):
    settings = FEATURES[features]
    expected, gradients = first_loss_and_gradients(config_of(*settings), dataset, "cpu", LOSSES[loss])
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 2e-2), ("16-mixed", 3e-3)):
        config = config_of(*settings, f"training.precision={precision}")
        found, own = first_loss_and_gradients(config, dataset, "cuda", LOSSES[loss])
        assert found == pytest.approx(expected, rel=tolerance / 10)
        assert (own - gradients).norm() < tolerance * gradients.norm()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
@pytest.mark.parametrize("precision", DTYPES)
def test_a_training_learns_what_it_does_on_the_cpu_and_goes_on_where_it_was(dataset, optimizer, precision):
    settings = [f"training.optimizer={optimizer}", "training.lr=0.003"]
    _, _, expected = trained(config_of(*settings), dataset, "cpu", range(3))
    config = config_of(*settings, f"training.precision={precision}")
    _, _, losses = trained(config, dataset, "cuda", range(3))
    assert losses == pytest.approx(expected, rel=1e-4 if precision == "32-true" else 1e-2)
    model, states, _ = trained(config, dataset, "cuda", range(1))
    again = model_of(config, dataset, "cuda")
    again.load_state_dict(model.state_dict())
    assert trained(config, dataset, "cuda", range(1, 3), again, states)[2] == losses[1:]


@pytest.mark.parametrize("features", FEATURES)
def test_rankings_are_those_of_the_cpu(dataset, features, tmp_path):
    config = config_of(*FEATURES[features])
    gpu, _, _ = trained(config, dataset, "cuda", range(2))
    gpu.eval().save_pretrained(str(tmp_path))
    cpu, read = BERT4Rec.from_pretrained(str(tmp_path)), dataset.sequences()
    found, expected = (
        validate(model, Windows.from_sequences(read), config, Worker(device=model.output_bias.device))
        for model in (gpu, cpu)
    )
    assert found == pytest.approx(expected, rel=1e-3)
    inference = InferenceConfig(topk=10, batch_size=100)
    tables = [
        pa.concat_tables(
            each.table for each in Recommender(model, dataset.items()).rank(read, inference, Ranking.of(inference))
        )
        for model in (gpu, cpu)
    ]
    assert tables[0]["user"] == tables[1]["user"]
    np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], rtol=1e-4, atol=1e-5)
    history = torch.randint(1, NUM_ITEMS + 1, (9, 30))
    scores = export_program(ScoringFunction(gpu)).module()(history.cuda()).cpu()
    torch.testing.assert_close(scores, ScoringFunction(cpu).eval()(history), rtol=1e-4, atol=1e-5)


def test_batches_are_those_of_the_cpu_in_fewer_groups(dataset):
    config = config_of("data.batch_size=200")
    windows = training_windows(Windows.from_sequences(dataset.sequences()), config.data)
    cpu, gpu = (
        [
            step
            for epoch in range(2)
            for step in iter_steps(windows, config.data, config.model, NUM_ITEMS, epoch, 0, 1, 10**6, device)
        ]
        for device in (torch.device("cpu"), torch.device("cuda"))
    )
    for ours, theirs in zip(gpu, cpu, strict=True):
        (few,), (many,) = ours.batches, theirs.batches
        assert len(few.groups) < len(many.groups)
        real = [batch.tokens[batch.tokens > 0].tolist() for batch in (few, many)]
        asked = [batch.labels[batch.wanted].tolist() for batch in (few, many)]
        assert real[0] == real[1]
        assert asked[0] == asked[1]
        assert (ours.num_targets, ours.num_tokens) == (theirs.num_targets, theirs.num_tokens)


def test_matrices_go_to_muon_in_stacks(dataset):
    config = config_of("training.optimizer=muon")
    assert isinstance(make_optimizers(model_of(config, dataset, "cuda"), config.training)[1], BFloat16Muon)


def test_a_new_shape_costs_no_kernel_of_its_own(dataset):
    config = config_of("training.precision=bf16-mixed", "data.batch_size=16")
    windows = training_windows(Windows.from_sequences(dataset.sequences()), config.data)
    model = model_of(config, dataset, "cuda")
    steps = iter_steps(windows, config.data, config.model, NUM_ITEMS, 0, 0, 1, 10**6, torch.device("cuda"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for step in itertools.islice(steps, 4):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                sum(model(batch) for batch in step.batches).backward()
    kernels = {event.key for event in profiled.key_averages()}
    assert kernels
    assert not [kernel for kernel in kernels if "cudnn" in kernel and "sdpa" in kernel]
