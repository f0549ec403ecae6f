import pytest
import torch
import torch.nn.functional as F

from bert4rec.model import layers, losses
from bert4rec.model.layers import Dropout, Linear, product, product_over_rows
from bert4rec.model.losses import linear_cross_entropy

pytestmark = pytest.mark.unit


def assert_close(single, double):
    """float32 against float64, to float32's rounding."""
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["oneDNN", "MKL"])
def either_library(request, monkeypatch):
    """Both ways to a product, whatever this processor takes."""
    monkeypatch.setattr(layers, "USES_ONEDNN", request.param == "oneDNN" and torch.backends.mkldnn.is_available())


def test_few_sizes_recur(monkeypatch):
    monkeypatch.setattr(layers, "USES_ONEDNN", True)
    taken = [layers.full_size(rows) for rows in range(4096)]
    assert taken[:34] == [*range(33), 34]
    assert all(rows <= size <= rows * 17 / 16 for rows, size in enumerate(taken))
    assert len({size for size in taken if 1024 < size <= 2048}) == 16
    monkeypatch.setattr(layers, "USES_ONEDNN", False)
    assert layers.full_size(33) == 33
    assert layers.full_size(33, "cuda") == 34


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 9), (9, 6)])
def test_linear_layer_equals_torchs(rows, inputs, outputs):
    torch.manual_seed(0)
    ours, theirs = Linear(inputs, outputs), torch.nn.Linear(inputs, outputs).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(rows, inputs, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    factor = torch.randn(rows, outputs)
    (ours(x) * factor).sum().backward()
    (theirs(exact) * factor).sum().backward()
    assert_close(ours(x), theirs(exact))
    assert_close(x.grad, exact.grad)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one.grad, other.grad)
    with torch.inference_mode():
        assert_close(ours(x), theirs(exact))


@pytest.mark.usefixtures("either_library")
def test_products_of_slices_and_transposed():
    torch.manual_seed(0)
    a, b, bias = torch.randn(7, 5), torch.randn(20, 5), torch.randn(20)
    expected = a.double() @ b.double().t() + bias
    used = torch.full((7, 9), torch.nan)
    assert_close(product(a, b[3:12], bias[3:12], out=used), expected[:, 3:12])
    assert_close(product(a, b[:9].t().contiguous().t()), expected[:, :9] - bias[:9])
    narrow, wide = torch.randn(50, 3), torch.randn(50, 8)
    assert_close(product_over_rows(narrow, wide), narrow.double().t() @ wide.double())
    assert_close(product_over_rows(wide, narrow), wide.double().t() @ narrow.double())


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit_bytes", [1, 10**9])
def test_linear_cross_entropy_equals_torchs(monkeypatch, logit_bytes, dtype):
    monkeypatch.setattr(losses, "_CPU_LOGIT_BYTES", logit_bytes)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", 1)
    torch.manual_seed(0)
    tensors = [torch.randn(50, 8), torch.randn(30, 8), torch.randn(30)]
    labels = torch.randint(0, 30, (50,))
    ours, theirs = ([tensor.clone().to(kind).requires_grad_() for tensor in tensors] for kind in (dtype, torch.float64))
    got = linear_cross_entropy(*ours, labels) * 0.3
    expected = F.cross_entropy(F.linear(*theirs), labels, reduction="sum") * 0.3
    got.backward()
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


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
