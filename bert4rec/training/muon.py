"""Muon (Jordan et al. 2024) in float32, for all matrices at once.

torch's own Muon takes the matrices one by one, in bfloat16. A CPU without arithmetic for bfloat16 computes that in
software, tens of times slower; and on any CPU small matrices cost more in calls than in arithmetic.
"""

import math
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of torch's Newton-Schulz iteration, s -> A s + B s^3 + C s^5
ITERATIONS = 5
SMALL = 128
"""Width up to which this is faster than torch's own Muon on a CPU with bfloat16 (benchmarks/muon.py)."""


def uses_float32(device: torch.device, width: int) -> bool:
    """Whether matrices of `width` are better taken by `Float32Muon` than by torch's own."""
    cpu = torch.cpu.get_capabilities()
    return device.type == "cpu" and (width <= SMALL or not (cpu.get("avx512_bf16") or cpu.get("amx_bf16")))


class Float32Muon(torch.optim.Muon):
    """As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and all else at its defaults, its state included."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in (p for p in group["params"] if p.grad is not None):
                of_shape.setdefault(parameter.shape, []).append(parameter)
            self._step(group, list(of_shape.values()))

    def _step(self, group: dict[str, Any], of_shape: list[list[Tensor]]) -> None:
        rate, momentum = group["lr"], group["momentum"]
        updates = []
        for parameters in of_shape:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            averages = [self._average(parameter) for parameter in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            updates.append(torch.stack(torch._foreach_lerp(gradients, averages, momentum)))
        for parameters, update in zip(of_shape, orthogonalised(updates), strict=True):
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            scale = -0.2 * math.sqrt(max(parameters[0].shape)) * rate
            torch._foreach_add_(parameters, list(update), alpha=scale)

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        return average


def orthogonalised(stacks: list[Tensor]) -> list[Tensor]:
    """The singular values of matrices brought near one, in five steps of a quintic Newton-Schulz iteration.

    The iteration multiplies a matrix X by a polynomial of X'X, so that all of it is done on the smaller of X'X and XX',
    and X multiplied once: for M = 4 N half of the arithmetic. (Jordan et al. 2024; torch's does it on X.) Those of all
    matrices are taken together where they are of one size.

    Parameters
    ----------
    stacks : list of Tensor
        [K, M, N] each: K matrices of one shape.
    """
    scaled = [x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7) for x in stacks]
    grams = [x.mT @ x if _is_tall(x) else x @ x.mT for x in scaled]
    sizes = {gram.shape[-1] for gram in grams}
    factors: dict[int, Tensor] = {}
    for size in sizes:
        factors[size] = _iterated(torch.cat([gram for gram in grams if gram.shape[-1] == size]))
    result = []
    for x, gram in zip(scaled, grams, strict=True):
        size, count = gram.shape[-1], len(x)
        factor, factors[size] = factors[size][:count], factors[size][count:]
        result.append(x @ factor if _is_tall(x) else factor @ x)
    return result


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _iterated(gram: Tensor) -> Tensor:
    """[K, D, D] products of matrices with themselves -> [K, D, D] the polynomials to multiply those matrices by."""
    total = gram
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        total = factor if iteration == 0 else total @ factor  # all commute
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    return total
