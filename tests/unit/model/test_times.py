"""What the network reads of times, against the slow network."""

import pytest
import torch

from bert4rec.config import load_config
from bert4rec.errors import InputError
from bert4rec.model import batches
from bert4rec.model.times import OCTAVES, octave, phases, rotary_periods
from tests.helpers.datasets import random_histories, random_times
from tests.twins import reference
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

ENCODINGS = ["rotary", "gap", "bias", "calendar", "rotary+gap+bias+calendar"]
HISTORIES = sorted(random_histories(16, NUM_ITEMS).values(), key=len, reverse=True)
TIMES = list(random_times(dict(enumerate(HISTORIES))).values())


def timed_model(encoding, **settings):
    model = make_model(time_encoding=encoding, **settings)
    if model.times.bias is not None:
        model.times.bias.data.copy_(torch.randn(model.times.bias.shape))  # it begins as zeros
    return model


def packed(histories, times, max_len=12):
    tokens = torch.tensor(reference.last_items(histories, max_len))
    return batches.pack(tokens, tokens, torch.device("cpu"), times=torch.tensor(reference.last_items(times, max_len)))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("position_encoding", ["learned", "rotary"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hidden_states_equal_the_slow_network(encoding, position_encoding, attention):
    settings = {"position_encoding": position_encoding, "attention": attention}
    model = timed_model(encoding, num_layers=1 if encoding == "bias" else 2, **settings)
    batch = packed(HISTORIES, TIMES)
    assert len({group.length for group in batch.groups}) > 1
    assert any(group.is_padded for group in batch.groups)
    both = zip(HISTORIES, TIMES, strict=True)
    expected = torch.cat([reference.hidden_states(model, items[-12:], own[-12:]) for items, own in both])
    torch.testing.assert_close(model.encode(batch), expected, rtol=1e-4, atol=1e-5)
    others = model.encode(packed(HISTORIES, list(random_times(dict(enumerate(HISTORIES)), seed=1).values())))
    assert not torch.allclose(others, expected, atol=1e-2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_place_of_causal_attention_sees_no_later_time(encoding):
    """Neither the time that a later place asks for, nor that of a later item."""
    model, tokens, times = timed_model(encoding, attention="causal"), [[3, 1, 4, 2]], [[0, 400, 9_000, 90_000]]
    states = model.encode(packed(tokens, times))
    later = model.encode(packed(tokens, [[0, 400, 700, 990_000]]))
    assert torch.equal(states[:2], later[:2])
    assert (states[2:] - later[2:]).abs().amax(1).min() > 1e-3


def test_octaves_by_hand():
    seconds = torch.tensor([0, 1, 2, 3, 6, 7, 62, 63, 2**20 - 2, 2**20 - 1, 2**31 - 2, 2**31 - 1, 2**40])
    assert octave(seconds).tolist() == [0, 1, 1, 2, 2, 3, 5, 6, 19, 20, 30, 31, OCTAVES - 1]
    every = torch.arange(100_000)
    assert octave(every).tolist() == [(n + 1).bit_length() - 1 for n in range(100_000)]


def test_periods_and_angles_by_hand():
    assert rotary_periods(1).tolist() == [60]
    assert rotary_periods(3).tolist() == [60, 43_499, 31_536_000]  # sqrt(60 * 31,536,000) = 43,498.97
    quarter = phases(torch.tensor([1_700_000_000 // 60 * 60 + 15]), torch.tensor([60]))
    assert quarter.tolist() == [[torch.tensor(torch.pi / 2).item()]]


def test_only_the_time_between_matters_but_for_the_calendar():
    later = [[time + 987_654 * 3600 + 61 for time in own] for own in TIMES]
    for encoding in ("gap", "bias", "rotary"):
        model = timed_model(encoding)
        same = torch.allclose(model.encode(packed(HISTORIES, TIMES)), model.encode(packed(HISTORIES, later)), atol=1e-4)
        assert same
    week = [[time + 7 * 86_400 for time in own] for own in TIMES]
    model = timed_model("calendar")
    assert torch.equal(model.encode(packed(HISTORIES, TIMES)), model.encode(packed(HISTORIES, week)))
    assert not torch.allclose(model.encode(packed(HISTORIES, TIMES)), model.encode(packed(HISTORIES, later)), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ["model.time_encoding=rotary+clock"],
            "model.time_encoding=rotary.clock: expected none, or some of rotary, gap",
        ),
        (["model.time_encoding=none+gap"], "model.time_encoding=none.gap: expected none, or some of"),
        (
            ["model.time_encoding=rotary", "model.hidden_units=10", "model.num_heads=5"],
            "heads of an even width of 4 or more.*gives 2",
        ),
        (["inference.at=yesterday"], "'yesterday' is no time; expected a Unix time in seconds, or an ISO date"),
        (["inference.at=1700000000000"], "1700000000000 is no Unix time in seconds"),
        (["inference.at=true"], "True is no time"),
    ],
)
def test_bad_settings_are_one_message(settings, problem):
    with pytest.raises(InputError, match=problem):
        load_config(None, settings)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2026-01-01", 1_767_225_600),
        ("2026-01-01T01:30", 1_767_231_000),
        ("2026-01-01T01:30:00+01:30", 1_767_225_600),
        ("1767225600", 1_767_225_600),
        ("1767225600.9", 1_767_225_600),
        ("now", "now"),
        ("null", None),
    ],
)
def test_moments_by_hand(written, seconds):
    assert load_config(None, [f"inference.at={written}"]).inference.at == seconds


def test_a_date_in_a_yaml_file_is_a_moment(tmp_path):
    (tmp_path / "c.yaml").write_text("inference:\n  at: 2026-01-01\n")
    assert load_config(str(tmp_path / "c.yaml")).inference.at == 1_767_225_600


def test_one_combination_has_one_spelling():
    names = ["gap+rotary", "rotary+gap", " rotary + gap"]
    assert {load_config(None, [f"model.time_encoding={name}"]).model.time_encoding for name in names} == {"rotary+gap"}
