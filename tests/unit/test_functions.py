import pytest
import torch
import torch.nn.functional as F

from bert4rec import functions
from bert4rec.functions import Dropout, linear_cross_entropy

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("logit_bytes", [1, 10**9])
def test_linear_cross_entropy_equals_torchs(monkeypatch, logit_bytes):
    monkeypatch.setattr(functions, "_CPU_LOGIT_BYTES", logit_bytes)
    torch.manual_seed(0)
    tensors = [torch.randn(50, 8), torch.randn(30, 8), torch.randn(30)]
    labels = torch.randint(0, 30, (50,))
    ours, theirs = ([tensor.double().requires_grad_() for tensor in tensors] for _ in range(2))
    got = linear_cross_entropy(*ours, labels) * 0.3
    expected = F.cross_entropy(F.linear(*theirs), labels, reduction="sum") * 0.3
    got.backward()
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_in_half_precision(dtype):
    torch.manual_seed(0)
    hidden, weights, bias = torch.randn(40, 8), torch.randn(30, 8), torch.randn(30)
    labels = torch.randint(0, 30, (40,))
    half = hidden.to(dtype).requires_grad_()
    weights.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(half, weights, bias, labels)
    loss.backward()
    reference = weights.detach().clone().requires_grad_()
    expected = F.cross_entropy(F.linear(hidden, reference, bias), labels, reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert half.grad.dtype == dtype
    torch.testing.assert_close(weights.grad, reference.grad, rtol=0.1, atol=0.1)


def test_no_target_gives_no_loss_and_no_gradient():
    weights = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(torch.empty(0, 4, requires_grad=True), weights, torch.zeros(5), torch.empty(0).long())
    loss.backward()
    assert loss.item() == 0
    assert not weights.grad.any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_each_place_with_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    layer = Dropout(p)
    x = torch.ones(4001, 101, requires_grad=True)
    y = layer(x)
    kept = y != 0
    for lane in range(4):  # four elements share one random word
        share = kept.flatten()[lane::4].float().mean().item()
        assert abs(share - (1 - p)) < 4 * (p * (1 - p) / (x.numel() / 4)) ** 0.5 + 2**-16
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    neighbours = (kept.flatten()[:-1] & kept.flatten()[1:]).float().mean().item()
    assert abs(neighbours - (1 - p) ** 2) < 0.01


def test_dropout_is_seeded_and_off_in_evaluation():
    layer, x = Dropout(0.5), torch.randn(3, 7)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)
