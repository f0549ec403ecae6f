"""Muon (Jordan et al. 2024) for all matrices at once, where torch's own is slow.

torch's takes the matrices one by one, in bfloat16. On a CPU without arithmetic for bfloat16 that is tens of times
slower; on a GPU, and for small matrices on any CPU, the calls cost more than the arithmetic.
"""

import math
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of torch's Newton-Schulz iteration, s -> A s + B s^3 + C s^5
ITERATIONS = 5
SMALL = 128
"""Width up to which float32 is faster than torch's own Muon on a CPU with bfloat16 (docs/results/muon.md)."""


def muon_for(device: torch.device, width: int) -> type[torch.optim.Muon]:
    """The one that is fastest for matrices of `width`, their shorter side, on `device`."""
    if device.type != "cpu":
        return BFloat16Muon
    cpu = torch.cpu.get_capabilities()
    has_bfloat16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.optim.Muon if has_bfloat16 and width > SMALL else Float32Muon


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
        for parameters, update in zip(of_shape, self.orthogonalised(updates), strict=True):
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            scale = -0.2 * math.sqrt(max(parameters[0].shape)) * rate
            torch._foreach_add_(parameters, list(update), alpha=scale)

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        return average

    def orthogonalised(self, stacks: list[Tensor]) -> list[Tensor]:
        """The singular values of matrices brought near one, in five steps of a quintic Newton-Schulz iteration.

        The iteration multiplies a matrix X by a polynomial of X'X, so that all of it is done on the smaller of X'X and
        XX', and X multiplied once: for M = 4 N half of the arithmetic. (torch's does it on X.)

        Parameters
        ----------
        stacks : list of Tensor
            [K, M, N] each: K matrices of one shape.
        """
        scaled = [_scaled(x) for x in stacks]
        grams = [x.mT @ x if _is_tall(x) else x @ x.mT for x in scaled]
        factors = _together(grams, _polynomials)
        return [x @ factor if _is_tall(x) else factor @ x for x, factor in zip(scaled, factors, strict=True)]


class BFloat16Muon(Float32Muon):
    """The same with torch's arithmetic, in bfloat16."""

    def orthogonalised(self, stacks: list[Tensor]) -> list[Tensor]:
        """By torch's five steps."""
        wide = _together([(x.mT if _is_tall(x) else x).bfloat16() for x in stacks], _iterated)
        return [each.mT if _is_tall(x) else each for x, each in zip(stacks, wide, strict=True)]


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _scaled(x: Tensor) -> Tensor:
    scaled: Tensor = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    return scaled


def _together(stacks: list[Tensor], function: Any) -> list[Tensor]:  # noqa: ANN401 - [K, M, N] -> [K, M, N]
    """What `function` makes of each stack; it is called once for all matrices of a shape."""
    results: list[Tensor] = list(stacks)
    for shape in {stack.shape[1:] for stack in stacks}:
        places = [place for place, stack in enumerate(stacks) if stack.shape[1:] == shape]
        parts = function(torch.cat([stacks[place] for place in places]))
        for place, part in zip(places, parts.split([len(stacks[place]) for place in places]), strict=True):
            results[place] = part
    return results


def _polynomials(gram: Tensor) -> Tensor:
    """[K, D, D] products of matrices with themselves -> [K, D, D] the polynomials to multiply those matrices by."""
    total = gram
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        total = factor if iteration == 0 else total @ factor  # all commute
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    return total


def _iterated(x: Tensor) -> Tensor:
    """[K, M, N] -> [K, M, N], M <= N."""
    x = _scaled(x)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
