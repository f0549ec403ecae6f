from typing import get_args

import pytest
import torch

from bert4rec.config import TrainingConfig
from bert4rec.model.losses import gbce, linear_cross_entropy, make_loss, sampled_softmax
from tests.unit.model.test_layers import scores_of_random_items

pytestmark = pytest.mark.unit

LOSSES = {
    "cross-entropy": lambda inputs, negatives: linear_cross_entropy(*inputs),
    "sampled-softmax": lambda inputs, negatives: sampled_softmax(*inputs, negatives, torch.full((4,), 1 / 9).log()),
    "gbce": lambda inputs, negatives: gbce(*inputs, negatives, 0.75),
}


def test_every_loss_has_an_entry_above():
    assert set(LOSSES) == set(get_args(TrainingConfig.model_fields["loss"].annotation))


@pytest.mark.parametrize("name", LOSSES)
def test_a_name_trains_its_own_loss(name):
    inputs = scores_of_random_items()
    torch.manual_seed(3)
    negatives = torch.randint(9, (4,))
    torch.manual_seed(3)
    got = make_loss(TrainingConfig(loss=name, num_negatives=4))(*inputs)
    values = {other: float(loss(inputs, negatives)) for other, loss in LOSSES.items()}
    assert got.item() == pytest.approx(values[name])
    assert len({round(value, 4) for value in values.values()}) == len(LOSSES)
