"""Linear layers, dropout and cross-entropy with the arithmetic of torch's own, in a form that costs less here.

Shapes: N targets, D hidden_units, V items, K negatives; S rows, I inputs, O outputs of a linear layer.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert4rec.config import TrainingConfig

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""loss(hidden [N, D], weights [V, D], bias [V], labels [N] from 0) -> sum over the targets."""

_CPU_LOGIT_BYTES = 4 * 2**20  # what caches hold...
_FEWEST_ROWS, _MOST_CPU_LOGIT_BYTES = 128, 256 * 2**20  # ...but all weights are read for each few rows
_GPU_LOGIT_BYTES = 512 * 2**20


def _uses_onednn() -> bool:
    """Whether float32 products go to oneDNN: MKL, which torch takes, has no AVX-512 for processors of other makers."""
    cpu = torch.cpu.get_capabilities()
    lacks_avx512 = bool(cpu.get("avx512_f")) and "Intel" not in cpu.get("cpu_name", "Intel")
    return lacks_avx512 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call, no-any-return]


USES_ONEDNN = _uses_onednn()
if USES_ONEDNN:  # read when the first kernel is built; with its 1024, half of a training's are built again and again
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")


def full_size(rows: int) -> int:
    """Rows to take for `rows`: with oneDNN up to 6% more, 16 sizes an octave, as each has a kernel of its own."""
    step = 1 << max(rows.bit_length() - 5, 0) if USES_ONEDNN else 1
    return -(-rows // step) * step


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """[M, K], [N, K], [N] -> [M, N] = a @ b.T + bias, without gradients.

    Parameters
    ----------
    out : Tensor
        [M, N], contiguous, that nobody needs any more: the result may take its place.
    """
    if USES_ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32 and a.numel():
        # The operator of torch.compile; there is no public way to a float32 product of oneDNN. It takes nothing empty.
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return result
    result = torch.mm(a, b.t(), out=out)
    return result if bias is None else result.add_(bias)  # linear() adds no faster


class Linear(nn.Linear):
    """As nn.Linear."""

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
    # The wide one last is up to twice as fast.
    return product(a.t(), b.t()) if a.shape[1] <= b.shape[1] else product(b.t(), a.t()).t()


def add_product_over_rows(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a.T @ b to `total`, [M, N] float32."""
    if (USES_ONEDNN and a.device.type == "cpu") or a.dtype != total.dtype:
        total += product_over_rows(a, b)
    else:
        torch.addmm(total, a.t(), b, out=total)


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
            row_bytes = 4 * len(weights)
            if hidden.device.type == "cpu":
                rows = max(_CPU_LOGIT_BYTES // row_bytes, min(_FEWEST_ROWS, _MOST_CPU_LOGIT_BYTES // row_bytes), 16)
            else:
                rows = max(_GPU_LOGIT_BYTES // row_bytes, 16)
            for low in range(0, len(states), rows):
                part, target = states[low : low + rows], labels[low : low + rows, None]
                count = len(part)
                part = F.pad(part, (0, 0, 0, full_size(count) - count))
                log_probability = torch.log_softmax(product(part, matrix, bias.to(dtype)).float(), dim=1)
                loss -= log_probability[:count].gather(1, target).sum()
                grad_logits = log_probability.exp_()
                grad_logits[:count].scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
                grad_logits[count:] = 0
                grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                grad_states[low : low + rows] = product(grad_logits, matrix.t())[:count]
                add_product_over_rows(grad_weights, grad_logits, part)
        ctx.save_for_backward(grad_states.to(hidden.dtype), grad_weights.to(weights.dtype), grad_bias.to(bias.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        grad_hidden, grad_weights, grad_bias = ctx.saved_tensors
        return grad_hidden * grad, grad_weights * grad, grad_bias * grad, None


def make_loss(training: TrainingConfig, counts: Tensor | None = None) -> Loss:
    """The configured loss.

    Parameters
    ----------
    counts : Tensor
        [V] interactions of each item, for negatives drawn by popularity.
    """
    if training.loss == "cross-entropy":
        return linear_cross_entropy
    k = training.num_negatives

    def draw(num_items: int, device: torch.device) -> Tensor:
        if training.negative_sampling == "uniform":
            return torch.randint(num_items, (k,), device=device)
        assert counts is not None
        return torch.multinomial(counts.to(device), k, replacement=True)

    if training.loss == "gbce":
        return lambda hidden, weights, bias, labels: gbce(
            hidden, weights, bias, labels, draw(len(weights), hidden.device), training.gbce_t
        )

    def sampled(hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        negatives = draw(len(weights), hidden.device)
        log_q = hidden.new_full((k,), -math.log(len(weights)), dtype=torch.float32)
        if training.negative_sampling == "popularity" and counts is not None:
            log_q = (counts / counts.sum()).log().to(hidden.device, torch.float32)[negatives]
        return sampled_softmax(hidden, weights, bias, labels, negatives, log_q)

    return sampled


def sampled_softmax(
    hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor, negatives: Tensor, log_q: Tensor
) -> Tensor:
    """Sum over targets of the cross-entropy against sampled items, which with more of them comes to the full one's.

    The sum over all other items in the softmax's denominator is estimated by negatives weighted with 1 / (K q)
    (Bengio and Senecal 2008); a negative that is the target itself counts nothing.

    Parameters
    ----------
    negatives : Tensor
        [K] int64 items, drawn with replacement, the same for all targets.
    log_q : Tensor
        [K] log of the probability of each in one draw.
    """
    target, others = _sampled_logits(hidden, weights, bias, labels, negatives)
    others = others - (log_q + math.log(len(negatives)))
    others = others.masked_fill(labels[:, None] == negatives, -torch.inf)
    return (torch.logsumexp(torch.cat([target[:, None], others], dim=1), dim=1) - target).sum()


def gbce(
    hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor, negatives: Tensor, calibration: float
) -> Tensor:
    """Sum over targets of the generalised binary cross-entropy (gBCE, Petrov and Macdonald 2023, arXiv 2308.07192).

    (-beta log sigmoid(s+) - sum over negatives of log(1 - sigmoid(s-))) / (K + 1), with beta = a (t (1 - 1/a) + 1/a)
    for the share a = K / (V - 1) of the items that are drawn. A negative that is the target itself counts nothing.

    Parameters
    ----------
    negatives : Tensor
        [K] int64 items, drawn evenly, the same for all targets.
    calibration : float
        t.
    """
    target, others = _sampled_logits(hidden, weights, bias, labels, negatives)
    share = min(1.0, len(negatives) / max(len(weights) - 1, 1))
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    against = F.softplus(others).masked_fill(labels[:, None] == negatives, 0)
    return (-beta * F.logsigmoid(target).sum() + against.sum()) / (len(negatives) + 1)


def _sampled_logits(
    hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """[N] of the targets and [N, K] of the negatives, float32."""
    target = (hidden * weights.index_select(0, labels)).sum(1) + bias.index_select(0, labels)
    others = F.linear(hidden, weights.index_select(0, negatives), bias.index_select(0, negatives))
    return target.float(), others.float()
