import pytest
import torch

from bert4rec.config import load_config
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import make_optimizers
from bert4rec.training.muon import Float32Muon, StackedMuon, muon_for, orthogonalised, uses_float32

pytestmark = pytest.mark.unit


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The same polynomial of each singular value of the normed matrix, in float64."""
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (16, 16), (64, 16), (16, 64), (33, 20)])
@pytest.mark.parametrize("decades", [0, 5])
def test_singular_values_come_near_one(shape, decades):
    torch.manual_seed(3)
    matrix = torch.randn(shape) * torch.logspace(0, -decades, shape[1])
    expected = by_singular_values(matrix)
    found = orthogonalised(matrix).double()
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
    if decades == 0 and min(shape) == 1:
        assert 0.6 < float(found.norm()) < 1.3


def test_no_gradient_is_no_update():
    assert torch.equal(orthogonalised(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("kind", [Float32Muon, StackedMuon])
def test_steps_are_those_of_torch_and_so_is_the_state(kind):
    torch.manual_seed(4)
    shapes = ((24, 8), (8, 8), (8, 24), (8, 8))
    ours, theirs = [[torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2)]
    unused = torch.nn.Parameter(torch.ones(8, 8))
    arguments = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [kind([*ours, unused], **arguments), torch.optim.Muon([*theirs, unused], **arguments)]
    for step in range(4):
        if step == 3:  # each goes on with the state of the other, as a run does that goes on elsewhere
            states = [optimizer.state_dict() for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
            optimizer.step()
        for our, their in zip(ours, theirs, strict=True):
            assert torch.equal(
                optimizers[0].state[our]["momentum_buffer"], optimizers[1].state[their]["momentum_buffer"]
            )
            assert float((our - their).detach().norm()) < 0.02 * float(
                (their.detach() - 1).norm()
            )  # theirs is in bfloat16
    assert torch.equal(unused, torch.ones(8, 8))


@pytest.mark.parametrize(
    ("capabilities", "kind"),
    [({"avx2": True, "avx512_bf16": False}, Float32Muon), ({"avx512_bf16": True}, torch.optim.Muon), ({}, Float32Muon)],
)
def test_float32_where_the_processor_has_no_bfloat16(monkeypatch, capabilities, kind):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = load_config(None, ["model.hidden_units=8", "training.optimizer=muon"])
    assert type(make_optimizers(BERT4Rec(config.model, 20), config.training)[1]) is kind
    assert not uses_float32(torch.device("cuda"))
    assert muon_for(torch.device("cuda")) is StackedMuon
