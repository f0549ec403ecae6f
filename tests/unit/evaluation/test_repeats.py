"""Where users come back to what they know, evaluation says what its zeros are."""

import pytest
import torch

from bert4rec.config import load_config
from bert4rec.evaluation import evaluate
from tests.helpers.datasets import write_dataset
from tests.helpers.in_process import without_ray
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

REPEATING = {user: [user, user + 1, user + 2, user] for user in range(1, 9)}
OTHERS = {user: [1, 2, 3, 4] for user in range(9, 11)}


def notes_of(tmp_path, monkeypatch, histories, *overrides):
    without_ray(monkeypatch, evaluate)
    path = write_dataset(tmp_path / "d", histories, NUM_ITEMS)
    model = make_model()
    model.catalogue, model.held_out = "test", 1
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    model.save_pretrained(str(tmp_path / "m"))
    result = evaluate.evaluate(load_config(None, list(overrides)), path, str(tmp_path / "m"))
    return [note for note in result.notes if "WARNING" in note]


def test_most_targets_are_repeats(tmp_path, monkeypatch):
    assert notes_of(tmp_path, monkeypatch, REPEATING | OTHERS) == [
        "WARNING 8 of 10 targets (80%) repeat an item that the user has had before. Protocol all leaves them out, so "
        "that they count as missed. evaluation.exclude_seen=false ranks them, and inference.exclude_seen=false "
        "recommends them"
    ]


@pytest.mark.parametrize("override", ["evaluation.exclude_seen=false", "evaluation.protocols=uniform-100"])
def test_protocols_that_rank_them_need_no_word(tmp_path, monkeypatch, override):
    assert notes_of(tmp_path, monkeypatch, REPEATING | OTHERS, override) == []


def test_few_targets_are_repeats(tmp_path, monkeypatch):
    few = {user: history for user, history in REPEATING.items() if user > 6}
    assert notes_of(tmp_path, monkeypatch, few | OTHERS) == []
