"""Muon in float32, for CPUs that compute bfloat16, which torch's own Muon is written in, tens of times slower."""

import math

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of torch's Newton-Schulz iteration, s -> A s + B s^3 + C s^5
ITERATIONS = 5


def uses_float32(device: torch.device) -> bool:
    """Whether `device` is a CPU without arithmetic for bfloat16."""
    cpu = torch.cpu.get_capabilities()
    return device.type == "cpu" and not (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


class Float32Muon(torch.optim.Muon):
    """As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and all else at its defaults, its state included."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalised(parameter.grad.lerp(average, momentum))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * math.sqrt(max(parameter.shape)) * rate)


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
