import pytest
import torch

from bert4rec.config import load_config
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import make_optimizers
from bert4rec.training.muon import BFloat16Muon, Float32Muon, muon_for

pytestmark = pytest.mark.unit


def orthogonalised(*matrices: torch.Tensor) -> list[torch.Tensor]:
    """Each of some matrices, in stacks of one."""
    muon = Float32Muon([torch.nn.Parameter(torch.zeros(2, 2))])
    return [stack[0] for stack in muon.orthogonalised([matrix[None] for matrix in matrices])]


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
    found = orthogonalised(matrix)[0].double()
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
    if decades == 0 and min(shape) == 1:
        assert 0.6 < float(found.norm()) < 1.3


def test_no_gradient_is_no_update():
    assert torch.equal(orthogonalised(torch.zeros(4, 6))[0], torch.zeros(4, 6))


def test_matrices_taken_together_are_those_taken_alone():
    torch.manual_seed(5)
    matrices = [torch.randn(shape) for shape in ((16, 8), (8, 8), (8, 24), (12, 12), (8, 8), (9, 12))]
    for together, alone in zip(orthogonalised(*matrices), matrices, strict=True):
        torch.testing.assert_close(together, orthogonalised(alone)[0])


@pytest.mark.parametrize("kind", [Float32Muon, BFloat16Muon])
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
    ("capabilities", "width", "kind"),
    [
        ({"avx2": True, "avx512_bf16": False}, 256, Float32Muon),
        ({"avx512_bf16": True}, 256, torch.optim.Muon),
        ({"avx512_bf16": True}, 128, Float32Muon),
        ({}, 256, Float32Muon),
    ],
)
def test_the_fastest_kind_is_taken(monkeypatch, capabilities, width, kind):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = load_config(None, [f"model.hidden_units={width}", "model.num_layers=1", "training.optimizer=muon"])
    assert type(make_optimizers(BERT4Rec(config.model, 20), config.training)[1]) is kind
    assert muon_for(torch.device("cuda"), width) is BFloat16Muon
