"""Losses over the output layer.

Shapes: N targets, D hidden_units, V items, K negatives.
"""

import math
from collections.abc import Callable
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from bert4rec.config import TrainingConfig
from bert4rec.model.layers import add_product_over_rows, full_size, product
from bert4rec.model.rows import OutputRows

Loss = Callable[[Tensor, Any, Any, Tensor], Tensor]
"""loss(hidden [N, D], weights [V, D], bias [V], labels [N] from 0) -> sum of the losses of all targets.

Weights and bias are tensors. A loss that samples items also takes `rows.OutputRows`."""
Rows = Tensor | OutputRows


_CPU_LOGIT_BYTES = 4 * 2**20  # fits into the caches...


_FEWEST_ROWS, _MOST_CPU_LOGIT_BYTES = 128, 256 * 2**20  # ...but each pass over a few rows reads all weights


_GPU_LOGIT_BYTES = 512 * 2**20


def linear_cross_entropy(hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Sum over targets of the cross-entropy of softmax(hidden @ weights.T + bias), without [N, V] in memory.

    The forward pass computes logits and their gradients for a few rows at a time, as Liger-Kernel does.

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


def smoothed_cross_entropy(hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Sum over targets of the cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567): the target
    has 1 - smoothing of the probability, and all items share the rest alike.

    This is the plain cross-entropy plus smoothing times (the target's logit - the mean of all logits), and the mean of
    all logits is the logit of the mean weights.
    """
    states = hidden.float()
    target = (states * weights.index_select(0, labels)).sum() + bias.index_select(0, labels).sum()
    mean = (states.sum(0) * weights.float().mean(0)).sum() + len(hidden) * bias.float().mean()
    return linear_cross_entropy(hidden, weights, bias, labels) + smoothing * (target - mean)


def logit_rows(num_items: int, device: torch.device) -> int:
    """How many rows of logits to make at a time."""
    row_bytes = 4 * num_items
    if device.type == "cpu":
        return max(_CPU_LOGIT_BYTES // row_bytes, min(_FEWEST_ROWS, _MOST_CPU_LOGIT_BYTES // row_bytes), 16)
    return max(_GPU_LOGIT_BYTES // row_bytes, 16)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, bias: Tensor, labels: Tensor) -> Tensor:  # noqa: ANN401
        # Gradients of rare items underflow in float16.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            states, matrix = hidden.to(dtype), weights.to(dtype)
            grad_states = torch.empty_like(states)
            grad_weights: Tensor | None = None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
            loss = torch.zeros((), device=hidden.device)
            rows = logit_rows(len(weights), hidden.device)
            for low in range(0, len(states), rows):
                part, target = states[low : low + rows], labels[low : low + rows, None]
                count = len(part)
                part = F.pad(part, (0, 0, 0, full_size(count, hidden.device.type) - count))
                log_probability = torch.log_softmax(product(part, matrix, bias.to(dtype)).float(), dim=1)
                loss -= log_probability[:count].gather(1, target).sum()
                grad_logits = log_probability.exp_()
                grad_logits[:count].scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
                grad_logits[count:] = 0
                grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                grad_states[low : low + rows] = product(grad_logits, matrix.t())[:count]
                grad_weights = add_product_over_rows(grad_weights, grad_logits, part)
            if grad_weights is None:
                grad_weights = torch.zeros_like(weights, dtype=torch.float32)
        ctx.save_for_backward(grad_states.to(hidden.dtype), grad_weights.to(weights.dtype), grad_bias.to(bias.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        grad_hidden, grad_weights, grad_bias = ctx.saved_tensors
        return grad_hidden * grad, grad_weights.mul_(grad), grad_bias * grad, None


def make_loss(training: TrainingConfig, counts: Tensor | None = None) -> Loss:
    """Return the configured loss.

    Parameters
    ----------
    counts : Tensor
        [V] interactions of each item, for negatives drawn by popularity.
    """
    k = training.num_negatives

    def uniform(num_items: int, device: torch.device) -> Tensor:
        return torch.randint(num_items, (k,), device=device)

    def sampled(hidden: Tensor, weights: Rows, bias: Rows, labels: Tensor) -> Tensor:
        match training.negative_sampling:
            case "uniform":
                negatives = uniform(len(weights), hidden.device)
                log_q = hidden.new_full((k,), -math.log(len(weights)), dtype=torch.float32)
            case "popularity":
                assert by_popularity is not None
                negatives, log_q = by_popularity(k, hidden.device)
            case _:
                assert_never(training.negative_sampling)
        return sampled_softmax(hidden, weights, bias, labels, negatives, log_q)

    by_popularity = None if counts is None else ByPopularity(counts)

    match training.loss:
        case "cross-entropy":
            if not training.label_smoothing:
                return linear_cross_entropy
            return lambda hidden, weights, bias, labels: smoothed_cross_entropy(
                hidden, weights, bias, labels, training.label_smoothing
            )
        case "sampled-softmax":
            return sampled
        case "gbce":
            return lambda hidden, weights, bias, labels: gbce(
                hidden, weights, bias, labels, uniform(len(weights), hidden.device), training.gbce_t
            )
        case _:
            assert_never(training.loss)


class ByPopularity:
    """Draws items in proportion to `counts` [V]; a draw takes as long for many items as for few."""

    def __init__(self, counts: Tensor) -> None:
        counts = counts.double()
        self.until = torch.cumsum(counts, 0)  # [V]
        self.total = float(self.until[-1])
        self.log_q = (counts / self.total).log().float()  # [V]

    def __call__(self, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[K] int64 items, counted from 0, and [K] the log probability of each."""
        if self.until.device != device:  # once: a copy in each step would wait for the device
            self.until, self.log_q = self.until.to(device), self.log_q.to(device)
        place = self.total * torch.rand(k, dtype=torch.float64, device=device)
        # The product of the largest number below 1 may round to the total.
        drawn = torch.searchsorted(self.until, place, right=True).clamp(max=len(self.until) - 1)
        return drawn, self.log_q[drawn]


def sampled_softmax(
    hidden: Tensor, weights: Rows, bias: Rows, labels: Tensor, negatives: Tensor, log_q: Tensor
) -> Tensor:
    """Sum over targets of the cross-entropy against sampled items. It approaches the full loss as K grows.

    Negatives, weighted with 1 / (K q), estimate the sum over all other items in the denominator of the softmax (Bengio
    and Senecal 2008). A negative that equals the target does not count.

    Parameters
    ----------
    negatives : Tensor
        [K] int64 items, drawn with replacement and shared by all targets.
    log_q : Tensor
        [K] log probability of each negative in one draw.
    """
    target, others = _sampled_logits(hidden, weights, bias, labels, negatives)
    others = others - (log_q + math.log(len(negatives)))
    others = others.masked_fill(labels[:, None] == negatives, -torch.inf)
    return (torch.logsumexp(torch.cat([target[:, None], others], dim=1), dim=1) - target).sum()


def gbce(hidden: Tensor, weights: Rows, bias: Rows, labels: Tensor, negatives: Tensor, calibration: float) -> Tensor:
    """Sum over targets of the generalised binary cross-entropy (gBCE, Petrov and Macdonald 2023, arXiv 2308.07192).

    (-beta log sigmoid(s+) - sum over negatives of log(1 - sigmoid(s-))) / (K + 1), with beta = a (t (1 - 1/a) + 1/a)
    for the share a = K / (V - 1) of sampled items. A negative that equals the target does not count.

    Parameters
    ----------
    negatives : Tensor
        [K] int64 items, drawn uniformly and shared by all targets.
    calibration : float
        t.
    """
    target, others = _sampled_logits(hidden, weights, bias, labels, negatives)
    share = min(1.0, len(negatives) / max(len(weights) - 1, 1))
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    against = F.softplus(others).masked_fill(labels[:, None] == negatives, 0)
    return (-beta * F.logsigmoid(target).sum() + against.sum()) / (len(negatives) + 1)


def _sampled_logits(
    hidden: Tensor, weights: Rows, bias: Rows, labels: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """Float32 logits: [N] of the targets and [N, K] of the negatives."""
    target = (hidden * weights.index_select(0, labels)).sum(1) + bias.index_select(0, labels)
    others = F.linear(hidden, weights.index_select(0, negatives), bias.index_select(0, negatives))
    return target.float(), others.float()
