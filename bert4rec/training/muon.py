"""Muon where torch's own is slow: on CPUs without bfloat16, which it is written in, and on GPUs, matrix by matrix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of torch's Newton-Schulz iteration, s -> A s + B s^3 + C s^5
ITERATIONS = 5


def uses_float32(device: torch.device) -> bool:
    """Whether `device` is a CPU without arithmetic for bfloat16."""
    cpu = torch.cpu.get_capabilities()
    return device.type == "cpu" and not (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def muon_for(device: torch.device) -> type[torch.optim.Muon]:
    """The one that is fastest there."""
    if device.type == "cuda":
        return StackedMuon
    return Float32Muon if uses_float32(device) else torch.optim.Muon


class Float32Muon(torch.optim.Muon):
    """As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and all else at its defaults, its state included."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
            averages = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            updates = self.orthogonalised(torch._foreach_lerp(gradients, averages, momentum))
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.add_(update, alpha=-0.2 * math.sqrt(max(parameter.shape)) * rate)

    def orthogonalised(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Each by `orthogonalised`."""
        return [orthogonalised(matrix) for matrix in matrices]


class StackedMuon(Float32Muon):
    """The same with torch's arithmetic, in bfloat16, for all matrices of a shape, or of its transpose, at once.

    A GPU takes less time for a product of matrices of this size than for its launch.
    """

    def orthogonalised(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Each by torch's five steps."""
        wide = [matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
        places: dict[torch.Size, list[int]] = {}
        for place, matrix in enumerate(wide):
            places.setdefault(matrix.shape, []).append(place)
        results = list(matrices)
        for same in places.values():
            x = torch.stack([wide[place] for place in same]).bfloat16()  # (n, M, N), M <= N
            x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
            for _ in range(ITERATIONS):
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
            for place, matrix in zip(same, x, strict=True):
                results[place] = matrix if wide[place] is matrices[place] else matrix.t()
        return results


def orthogonalised(matrix: Tensor) -> Tensor:
    """The singular values of a matrix [M, N] brought near one, in five steps of a quintic Newton-Schulz iteration.

    The iteration multiplies the matrix X by a polynomial of X'X, so that all of it is done on the smaller of X'X and
    XX', and X multiplied once: for M = 4 N half of the arithmetic. (Jordan et al. 2024; torch's does it on X.)
    """
    x = matrix / matrix.norm().clamp(min=1e-7)
    is_tall = x.shape[0] > x.shape[1]
    gram = x.t() @ x if is_tall else x @ x.t()
    total = torch.eye(len(gram), device=gram.device)
    for iteration in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal().add_(A)
        total = factor if iteration == 0 else total @ factor  # all commute
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    result: Tensor = x @ total if is_tall else total @ x
    return result
