"""Dropout and cross-entropy with the arithmetic of torch's own, in a form that costs less here.

Shapes: N targets, D hidden_units, V items.
"""

from typing import Any

import torch
from torch import Tensor, nn

_CPU_LOGIT_BYTES = 4 * 2**20
_GPU_LOGIT_BYTES = 512 * 2**20


class Dropout(nn.Module):
    """As nn.Dropout; on a CPU it draws 16 random bits an element (so p is a multiple of 2^-16), a fourth of torch's.

    There the generator runs on one core, and takes a large part of a training step.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        dropped: Tensor = _CpuDropout.apply(x, self.p)  # type: ignore[no-untyped-call]
        return dropped


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:  # noqa: ANN401 - torch's context
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
        keep = (words.view(torch.int16)[: x.numel()] >= round(p * 2**16) - 2**15).view(x.shape)
        factor = keep * torch.tensor(1 / (1 - p), dtype=x.dtype)  # a product with booleans would convert them each time
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ANN401
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def linear_cross_entropy(hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Sum over targets of the cross-entropy of softmax(hidden @ weights.T + bias), without [N, V] in memory.

    Logits and their gradients are made for a few rows at a time, in the forward pass, as in Liger-Kernel.

    Parameters
    ----------
    hidden : Tensor
        [N, D].
    weights, bias : Tensor
        [V, D] and [V].
    labels : Tensor
        [N] int64, from 0.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weights, bias, labels)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor) -> Tensor:  # noqa: ANN401
        # Gradients of rare items underflow in float16.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            states, matrix = hidden.to(dtype), weights.to(dtype)
            grad_states = torch.empty_like(states)
            grad_weights = torch.zeros_like(weights, dtype=torch.float32)
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
            loss = torch.zeros((), device=hidden.device)
            logit_bytes = _CPU_LOGIT_BYTES if hidden.device.type == "cpu" else _GPU_LOGIT_BYTES
            rows = max(16, logit_bytes // (4 * len(weights)))
            for low in range(0, len(states), rows):
                part, target = states[low : low + rows], labels[low : low + rows, None]
                log_probability = torch.log_softmax(torch.addmm(bias.to(dtype), part, matrix.t()).float(), dim=1)
                loss -= log_probability.gather(1, target).sum()
                grad_logits = log_probability.exp_()
                grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
                grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                torch.mm(grad_logits, matrix, out=grad_states[low : low + rows])
                if dtype == torch.float32:
                    torch.addmm(grad_weights, grad_logits.t(), part, out=grad_weights)
                else:
                    grad_weights += (grad_logits.t() @ part).float()
        ctx.save_for_backward(grad_states.to(hidden.dtype), grad_weights.to(weights.dtype), grad_bias.to(bias.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        grad_hidden, grad_weights, grad_bias = ctx.saved_tensors
        return grad_hidden * grad, grad_weights * grad, grad_bias * grad, None
