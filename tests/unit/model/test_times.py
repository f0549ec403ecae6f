"""What the network reads of times, against the slow network."""

import pytest
import torch

from bert4rec.config import ModelConfig
from bert4rec.errors import InputError
from bert4rec.model import batches
from bert4rec.model.times import LONGEST, octave, rotary_periods
from tests.helpers.datasets import random_histories
from tests.twins import reference
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

ENCODINGS = ["rotary", "gap", "bias", "calendar", "rotary+gap+bias+calendar"]
HISTORIES = sorted(random_histories(30, NUM_ITEMS).values(), key=len, reverse=True)


def times_of(histories, seed=0):
    """Rising Unix times of each item: some at once, some years apart."""
    generator = torch.Generator().manual_seed(seed)
    times = []
    for history in histories:
        gaps = 2 ** (26 * torch.rand(len(history), generator=generator, dtype=torch.float64)) - 1
        times.append((1_000_000_000 + torch.cumsum(gaps.long(), 0)).tolist())
    return times


def timed_model(encoding, **settings):
    model = make_model(time_encoding=encoding, **settings)
    if model.times.bias is not None:
        model.times.bias.data.copy_(torch.randn(model.times.bias.shape))  # it begins as zeros
    return model


def packed(histories, times, max_len=12):
    tokens = torch.tensor(reference.last_items(histories, max_len))
    return batches.pack(tokens, tokens, torch.device("cpu"), torch.tensor(reference.last_items(times, max_len)))


@pytest.mark.parametrize("position_encoding", ["learned", "rotary"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hidden_states_equal_the_slow_network(encoding, num_layers, position_encoding):
    model = timed_model(encoding, num_layers=num_layers, position_encoding=position_encoding)
    times = times_of(HISTORIES)
    batch = packed(HISTORIES, times)
    assert len({group.length for group in batch.groups}) > 1
    assert any(group.is_padded for group in batch.groups)
    both = zip(HISTORIES, times, strict=True)
    expected = torch.cat([reference.hidden_states(model, items[-12:], own[-12:]) for items, own in both])
    torch.testing.assert_close(model.encode(batch), expected, rtol=1e-4, atol=1e-5)
    others = model.encode(packed(HISTORIES, times_of(HISTORIES, seed=1)))
    assert not torch.allclose(others, expected, atol=1e-2)
