import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bert4rec import storage
from bert4rec.config import DataConfig, ModelConfig
from bert4rec.errors import InputError
from bert4rec.model import batches, layers, network
from bert4rec.model.network import WEIGHTS, BERT4Rec
from tests.helpers.datasets import random_histories
from tests.twins import reference
from tests.unit.model.test_batches import rows_of, windows_of

pytestmark = pytest.mark.unit

NUM_ITEMS = 30


def make_model(num_items=NUM_ITEMS, **settings):
    torch.manual_seed(0)
    config = ModelConfig(**{"hidden_units": 16, "num_heads": 4, "num_layers": 2, "max_len": 12, **settings})
    model = BERT4Rec(config, num_items, "catalogue").eval()
    for parameter in model.parameters():  # weights of 0.02 would hide mistakes behind nearly uniform attention
        if parameter.ndim > 1:
            parameter.data.mul_(10)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def packed(tokens):
    """A batch that asks for the states of all real positions."""
    return batches.pack(tokens, tokens, torch.device("cpu"))


@pytest.fixture(params=["oneDNN", "MKL"])
def either_library(request, monkeypatch):
    """Both ways to a product, whatever this processor takes."""
    monkeypatch.setattr(layers, "USES_ONEDNN", request.param == "oneDNN" and torch.backends.mkldnn.is_available())


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("position_encoding", ["learned", "rotary"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_hidden_states_equal_the_slow_network(num_layers, position_encoding, attention):
    model = make_model(num_layers=num_layers, position_encoding=position_encoding, attention=attention)
    histories = sorted(random_histories(30, NUM_ITEMS).values(), key=len, reverse=True)
    batch = packed(torch.tensor(reference.last_items(histories, 12)))
    assert len({group.length for group in batch.groups}) > 1
    assert any(group.is_padded for group in batch.groups)
    expected = torch.cat([reference.hidden_states(model, history[-12:]) for history in histories])
    torch.testing.assert_close(model.encode(batch), expected, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing():
    model = make_model()
    tokens = torch.tensor([[3, 9, 4, 31]])
    padded = torch.tensor([[1, 2, 3, 4, 5], [0, 3, 9, 4, 31]])
    assert [group.is_padded for group in packed(padded).groups] == [True]
    torch.testing.assert_close(model.encode(packed(padded))[5:], model.encode(packed(tokens)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_attention_goes_both_ways_or_back_alone(attention):
    model = make_model(attention=attention)
    first, second = (model.encode(packed(torch.tensor([tokens]))) for tokens in ([3, 9, 4], [3, 9, 5]))
    assert torch.equal(first[:2], second[:2]) == (attention == "causal")
    assert not torch.allclose(first[2], second[2], atol=1e-3)


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_embeddings": False},
        {"position_encoding": "rotary", "output_transform": False, "attention": "causal"},
    ],
)
def test_a_step_has_the_loss_and_gradients_of_the_slow_way(settings):
    """Micro-batches by length, logits at targets only, the last block at targets only: the same arithmetic."""
    model = make_model(dropout_rate=0.0, random_mask_prob=0.4, **settings)
    data = DataConfig(batch_size=16)
    windows = windows_of(list(random_histories(16, NUM_ITEMS, longest=20).values()))
    device = torch.device("cpu")

    (step,) = batches.iter_steps(windows, data, model.config, NUM_ITEMS, 0, 0, 1, 40, device)
    assert len(step.batches) > 2
    total = sum(model(batch) for batch in step.batches) / step.num_targets
    total.backward()
    fast = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    (whole,) = batches.iter_steps(windows, data, model.config, NUM_ITEMS, 0, 0, 1, 10**9, device)
    (batch,) = whole.batches
    rows, labels = zip(*rows_of(batch), strict=True)
    model.zero_grad()
    slow = reference.loss(model, rows, labels)
    slow.backward()
    torch.testing.assert_close(total, slow, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        if name == "items.embedding.weight":
            expected[0] = 0
        torch.testing.assert_close(fast[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_rotary_attention_sees_distances_alone():
    """A block, which the learned embedding is no part of, has the same states for a sequence that ends elsewhere."""
    model = make_model(position_encoding="rotary")
    block = model.blocks[0]
    x, turns = torch.randn(5, 16), model.turns[:, None]
    group = [batches.Group(1, 5, 5, False)]
    early, late = (block(x, group, [None], [turns[first : first + 5].flip(0)] * 2) for first in (0, 7))
    torch.testing.assert_close(early, late, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(early, block(x, group, [None], (turns[:5], turns[:5])), atol=1e-2)  # before is not after


def test_attention_that_prepares_a_kernel_for_each_shape_is_off(monkeypatch):
    model, plain, allowed = make_model(), F.scaled_dot_product_attention, []

    def attention(*arguments, **named):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*arguments, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model.encode(packed(torch.tensor([[3, 9, 4]])))
    assert allowed == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_no_target_adds_no_loss_and_breaks_nothing():
    model = make_model()
    tokens = torch.tensor([[1, 2], [0, 3]])
    loss = model(batches.pack(tokens, torch.zeros_like(tokens), torch.device("cpu")))
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_initial_weights():
    model = BERT4Rec(ModelConfig(hidden_units=64, num_heads=2), 5000)
    assert not model.items.embedding.weight[0].any()
    assert abs(model.items.embedding.weight[1:].std().item() - 0.02) < 0.0005
    assert model.output_weights()[0].shape == (5000, 64)
    assert not model.output_bias.any()


@pytest.mark.parametrize("settings", [{}, {"share_embeddings": False}, {"position_encoding": "rotary"}])
def test_saved_and_read_again_it_scores_the_same(tmp_path, settings):
    model = make_model(**settings)
    model.item_counts += torch.arange(NUM_ITEMS)
    model.save_pretrained(str(tmp_path / "m"))
    again = BERT4Rec.from_pretrained(str(tmp_path / "m"))
    assert torch.equal(again.item_counts, torch.arange(NUM_ITEMS))
    assert (again.num_items, again.catalogue, again.config) == (NUM_ITEMS, "catalogue", model.config)
    tokens = torch.tensor([[3, 9, 4, 31]])
    torch.testing.assert_close(again.encode(packed(tokens)), model.encode(packed(tokens)), rtol=0, atol=0)


def test_a_large_model_is_mapped_into_memory(tmp_path, monkeypatch):
    model = BERT4Rec(ModelConfig(hidden_units=8, num_heads=2, position_encoding="rotary"), 30)
    model.save_pretrained(str(tmp_path))
    monkeypatch.setattr(network, "_MAPPED_BYTES", 0)
    read = BERT4Rec.from_pretrained(str(tmp_path))
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f"{tmp_path}/{WEIGHTS}")
    ]
    assert mapped
    for (name, one), (own, other) in zip(model.state_dict().items(), read.state_dict().items(), strict=True):
        assert name == own
        assert torch.equal(one, other), name
    assert torch.equal(read.turns, model.turns)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x99")
    with pytest.raises(InputError, match=f"{WEIGHTS}: its content is not what was written"):
        BERT4Rec.from_pretrained(str(tmp_path))


def test_a_damaged_model_directory_is_named(tmp_path):
    directory = tmp_path / "m"
    make_model().save_pretrained(str(directory))
    weights = (directory / "model.safetensors").read_bytes()
    for content in (weights[:-100], weights[:-1] + bytes([weights[-1] ^ 1])):  # truncated; one bit is another
        (directory / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors: its content is not what was written"):
            BERT4Rec.from_pretrained(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        BERT4Rec.from_pretrained(str(directory))
    (directory / "model.safetensors").write_bytes(weights)
    content = storage.read_sealed(str(directory / "config.json"))
    altered = (directory / "config.json").read_text().replace('"held_out": 0', '"held_out": 1')
    (directory / "config.json").write_text(altered)  # still a valid model, which would be evaluated on what it has seen
    with pytest.raises(InputError, match=r"config\.json: was altered or is damaged \(checksum"):
        BERT4Rec.from_pretrained(str(directory))
    del content["num_items"]
    storage.write_sealed(str(directory / "config.json"), content)
    with pytest.raises(InputError, match="num_items"):
        BERT4Rec.from_pretrained(str(directory))
    with pytest.raises(InputError, match="no such file"):
        BERT4Rec.from_pretrained(str(tmp_path / "other"))
