"""Linear layers and dropout that compute the same as torch's own, but faster.

Shapes: N targets, D hidden_units, V items, K negatives; S rows, I inputs, O outputs of a linear layer.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn


def _uses_onednn() -> bool:
    """Whether to use oneDNN for float32 products. Torch's default, MKL, uses AVX-512 on Intel processors only."""
    cpu = torch.cpu.get_capabilities()
    lacks_avx512 = bool(cpu.get("avx512_f")) and "Intel" not in cpu.get("cpu_name", "Intel")
    return lacks_avx512 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call, no-any-return]


USES_ONEDNN = _uses_onednn()
if (
    USES_ONEDNN
):  # oneDNN reads this with its first kernel. With the default of 1024, it rebuilds half of a training's kernels
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")


def full_size(rows: int, device: str = "cpu") -> int:
    """Round `rows` up, by at most 6%, to one of 16 sizes per octave, so that sizes recur.

    oneDNN builds a kernel for each size, and a GPU starts a product sooner if its size occurred before.
    """
    step = 1 << max(rows.bit_length() - 5, 0) if USES_ONEDNN or device != "cpu" else 1
    return -(-rows // step) * step


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """[M, K], [N, K], [N] -> [M, N] = a @ b.T + bias, without gradients.

    Parameters
    ----------
    out : Tensor
        [M, N], contiguous, whose content may be overwritten with the result.
    """
    if USES_ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32 and a.numel():
        # torch.compile uses this operator; torch has no public function for it. It does not accept empty tensors.
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return result
    result = torch.mm(a, b.t(), out=out)
    return result if bias is None else result.add_(bias)  # linear() would not add faster


class Linear(nn.Linear):
    """Computes the same as nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """[S, I] -> [S, O]."""
        is_plain = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if not USES_ONEDNN or x.device.type != "cpu" or is_plain:
            return super().forward(x)
        result: Tensor = _OneDnnLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # noqa: ANN401
        x, weight = ctx.saved_tensors
        return product(grad, weight.t()), product_over_rows(grad, x), grad.sum(0)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """[S, M], [S, N] -> [M, N] = a.T @ b."""
    # With the wide matrix last, the product is up to twice as fast.
    return product(a.t(), b.t()) if a.shape[1] <= b.shape[1] else product(b.t(), a.t()).t()


def add_product_over_rows(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add a.T @ b to `total`, [M, N] float32, or start a total if it is None."""
    if total is None:
        return product_over_rows(a, b).float()
    if (USES_ONEDNN and a.device.type == "cpu") or a.dtype != total.dtype:
        total += product_over_rows(a, b)
    else:
        torch.addmm(total, a.t(), b, out=total)
    return total


class Dropout(nn.Module):
    """Dropout like nn.Dropout. On a CPU, it draws 16 random bits per element, a quarter of torch's.

    The random generator of a CPU runs on one core and takes a large part of a training step. With 16 bits, p is rounded
    to a multiple of 2^-16.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to a tensor of any shape."""
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
