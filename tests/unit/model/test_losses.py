import math
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from bert4rec.config import SAMPLED_LOSSES, Loss, TrainingConfig, load_config
from bert4rec.errors import InputError
from bert4rec.model.losses import gbce, linear_cross_entropy, make_loss, sampled_softmax

pytestmark = pytest.mark.unit

LOSSES = {
    "cross-entropy": lambda inputs, negatives: linear_cross_entropy(*inputs),
    "sampled-softmax": lambda inputs, negatives: sampled_softmax(*inputs, negatives, torch.full((4,), 1 / 9).log()),
    "gbce": lambda inputs, negatives: gbce(*inputs, negatives, 0.75),
}


def scores_of_random_items(num_targets=6, num_items=9):
    generator = torch.Generator().manual_seed(0)
    hidden, weights = (torch.randn(size, 4, generator=generator) for size in (num_targets, num_items))
    bias = torch.randn(num_items, generator=generator)
    return hidden, weights, bias, torch.randint(num_items, (num_targets,), generator=generator)


def test_every_loss_has_an_entry_above():
    assert set(LOSSES) == set(get_args(Loss))
    described = TrainingConfig.model_fields["loss"].description
    assert all(re.search(rf"{name}\b", described) for name in LOSSES)


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


@pytest.mark.parametrize("num_targets", [0, 1, 6])
def test_smoothed_labels_are_torchs(num_targets):
    """The same sum and gradients as torch's label smoothing, whose input is the logits."""
    *inputs, labels = scores_of_random_items(num_targets)
    ours, theirs = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
    got = make_loss(TrainingConfig(label_smoothing=0.2))(*ours, labels)
    logits = F.linear(*theirs)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum")
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    got.backward()
    expected.backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", ["training.loss=gbce", "training.shard_items=true"])
def test_labels_are_smoothed_only_in_the_full_cross_entropy(other):
    with pytest.raises(InputError, match=r"label_smoothing=0\.1 needs training\.loss=cross-entropy and"):
        load_config(None, ["training.label_smoothing=0.1", other])


@pytest.mark.parametrize("repeats", [[1] * 9, [5, 1, 1, 2, 3, 1, 1, 1, 1]])
def test_sampled_softmax_of_all_items_in_proportion_is_the_full_loss(repeats):
    """Item j drawn n_j times of K, with probability n_j / K: the estimate of the denominator is exact."""
    inputs = scores_of_random_items()
    times = torch.tensor(repeats)
    negatives = torch.repeat_interleave(torch.arange(9), times)
    log_q = (times / times.sum()).log()[negatives]
    got = sampled_softmax(*inputs, negatives, log_q)
    assert got.item() == pytest.approx(linear_cross_entropy(*inputs).item(), rel=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_sampled_softmax_comes_to_the_full_loss_with_many_negatives(sampling):
    inputs = scores_of_random_items()
    torch.manual_seed(0)
    training = TrainingConfig(loss="sampled-softmax", num_negatives=200_000, negative_sampling=sampling)
    got = make_loss(training, torch.arange(1.0, 10.0))(*inputs)
    assert got.item() == pytest.approx(linear_cross_entropy(*inputs).item(), rel=0.01)


def test_gbce_by_hand():
    hidden, weights, bias, labels = scores_of_random_items()
    negatives = torch.tensor([0, 3, 3, int(labels[0])])
    share = 4 / 8
    beta = share * (0.75 * (1 - 1 / share) + 1 / share)
    assert beta == 0.625
    expected = 0.0
    for state, label in zip(hidden, labels.tolist(), strict=True):
        probability = torch.sigmoid(weights @ state + bias)
        expected -= beta * math.log(probability[label])
        expected -= sum(math.log(1 - probability[j]) for j in negatives.tolist() if j != label)
    assert gbce(hidden, weights, bias, labels, negatives, 0.75).item() == pytest.approx(expected / 5, rel=1e-5)


def test_gbce_over_all_items_is_binary_cross_entropy_whatever_t():
    hidden, weights, bias, labels = scores_of_random_items()
    full = F.binary_cross_entropy_with_logits(hidden @ weights.T + bias, F.one_hot(labels, 9).float(), reduction="sum")
    for t in (0.0, 0.75, 1.0):
        got = gbce(hidden, weights, bias, labels, torch.arange(9), t)
        assert got.item() * 10 == pytest.approx(full.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sampled_loss_reads_and_trains_only_what_was_drawn(loss):
    hidden, weights, bias, labels = scores_of_random_items(num_targets=3, num_items=1000)
    weights.requires_grad_()
    torch.manual_seed(0)
    make_loss(TrainingConfig(loss=loss, num_negatives=5))(hidden, weights, bias, labels).backward()
    num_trained = int(weights.grad.any(1).sum())
    assert 3 <= num_trained <= 8 if loss in SAMPLED_LOSSES else num_trained == 1000
    assert weights.grad[labels].any(1).all()
