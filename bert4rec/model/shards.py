"""The item table in shards (`training.shard_items`): each of W workers keeps every W-th row of it, and of the output
bias.

Items have their tokens by falling number of interactions, so ranges of rows would give one worker almost all look-ups.
Each worker reads users of its own. It asks the others for the rows of its items, and sends their gradients back. For
the loss, every worker compares the targets of all workers with the items of its shard.

Shapes: V items, D hidden_units, W workers, V/W items of a shard; N targets of all workers in a pass, n of them of this
one; K negatives of a shard.
"""

import math
from typing import Any, Literal, NamedTuple, assert_never, cast

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from bert4rec.config import SAMPLED_LOSSES, ShardedLoss, TrainingConfig
from bert4rec.data.dataset import PADDING
from bert4rec.model.batches import Batch, pack
from bert4rec.model.layers import add_product_over_rows, full_size, product
from bert4rec.model.losses import ByPopularity, logit_rows
from bert4rec.model.rows import RowTable

_DRAWN_ROWS = 65_536  # a multiple of 16: torch draws normal numbers in sixteens


class Shard(NamedTuple):
    """Which rows one of W workers keeps: those of the tokens rank, rank + W, rank + 2 W and so on."""

    rank: int
    world_size: int
    num_items: int

    @property
    def num_rows(self) -> int:
        """Of the table, with the special tokens that are among them."""
        return len(range(self.rank, self.num_items + 2, self.world_size))

    @property
    def first(self) -> int:
        """The row of the first item: padding, token 0, is before it."""
        return int(self.rank == 0)

    @property
    def own_items(self) -> slice:
        """The rows of items; each has an element of the output bias."""
        has_mask = (self.num_items + 1) % self.world_size == self.rank
        return slice(self.first, self.num_rows - int(has_mask))

    @property
    def size(self) -> int:
        """Number of items."""
        return len(range(self.first_token, self.num_items + 1, self.world_size))

    def columns(self, device: torch.device | str = "cpu") -> Tensor:
        """[V/W] int64 the items, counted from 0, ascending."""
        return torch.arange(self.first_token, self.num_items + 1, self.world_size, device=device) - 1

    @property
    def first_token(self) -> int:
        """The token of the first item."""
        return self.rank if self.rank > 0 else self.world_size

    @property
    def starts(self) -> dict[str, int]:
        """By name of a sharded parameter: the place of the first of its rows in the whole parameter."""
        return {"items.embedding.weight": self.rank, "output_bias": self.first_token - 1}


class ShardedEmbedding(nn.Module):
    """The shard's rows of an `nn.Embedding` with padding."""

    def __init__(self, shard: Shard, width: int) -> None:
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(shard.num_rows, width), requires_grad=False)
        self.draw(1.0)  # as `nn.Embedding` does, so that what is drawn next is the same

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """Draw weights from normal(0, std): the rows that the whole table would have, drawn block by block."""
        rank, size, num_items = self.shard
        width, low = self.weight.shape[1], 0
        while low < num_items + 2:
            rest = num_items + 2 - low
            # torch draws fewer than 16 numbers in another way, so a last block is not so short
            count = _DRAWN_ROWS if rest >= _DRAWN_ROWS + 16 else rest
            block = torch.empty(count, width).normal_(0, std)[(rank - low) % size :: size]
            place = -(-(low - rank) // size) if low > rank else 0
            self.weight[place : place + len(block)] = block
            low += count
        if rank == 0:
            self.weight[PADDING] = 0


class ItemShards:
    """This worker's shard of a model's item table and output bias: look-ups, loss and gradients.

    Every worker calls each method equally often, at the same points of the training.
    """

    def __init__(self, shard: Shard, embedding: ShardedEmbedding, model: nn.Module) -> None:
        self.shard = shard
        self._embedding, self._model = embedding, model
        self._training: TrainingConfig | None = None
        self._by_popularity: ByPopularity | None = None
        self._by_rows: list[RowTable] = []
        self._found = self._rows = self._order = self._asked = torch.empty(0)
        self._sent: list[int] = []
        self._received: list[int] = []
        self._of_loss: list[Tensor] = []  # gradients of the whole shard: of the table, of the bias
        self._of_rows: list[tuple[Tensor, Tensor, Tensor]] = []  # items of the shard, their gradients, of their biases

    @property
    def table(self) -> nn.Parameter:
        """[V/W + special tokens, D]."""
        return self._embedding.weight

    @property
    def bias(self) -> nn.Parameter:
        """[V/W]."""
        return self._model.get_parameter("output_bias")

    @property
    def weights(self) -> Tensor:
        """[V/W, D] output weights."""
        return self.table.detach()[self.shard.own_items]

    def prepare(self, training: TrainingConfig, counts: Tensor) -> list[RowTable]:
        """Take the settings of a training.

        Parameters
        ----------
        counts : Tensor
            [V] interactions of each item, for negatives drawn by popularity.

        Returns
        -------
        list of RowTable
            The tables for a row-wise optimiser, if the training has one.
        """
        self._training = training
        if training.negative_sampling == "popularity":
            self._by_popularity = ByPopularity(counts[self.shard.columns(counts.device)])
        if training.item_optimizer == "rowwise":
            padding = PADDING if self.shard.rank == 0 else None
            self._by_rows = [RowTable(self._embedding, "weight", padding), RowTable(self._model, "output_bias")]
        return self._by_rows

    # Look-ups

    def begin(self, batches: list[Batch]) -> list[Batch]:
        """Fetch the rows that a step reads; the step's batches, with some that have no targets before them, so that all
        workers make equally many passes."""
        device, mask = batches[0].tokens.device, self.shard.num_items + 1
        tokens = torch.cat([each.tokens for each in batches] + [torch.full((1,), mask, device=device)])
        missing = self.fetch(tokens, len(batches)) - len(batches)
        if not missing:
            return batches
        alone = torch.full((1, 1), mask)
        none = torch.zeros_like(alone)
        empty = pack(alone, none, device, batches[0].distinct is not None, None if batches[0].times is None else none)
        return [*[empty] * missing, *batches]

    def fetch(self, tokens: Tensor, number: int = 0) -> int:
        """Fetch the rows of `tokens`, which look-ups then find; the largest `number` of all workers."""
        rank, size, _ = self.shard
        self._found = torch.unique(tokens)
        owner = self._found % size
        self._order = torch.argsort(owner, stable=True)
        self._sent = torch.bincount(owner, minlength=size).tolist()
        told = self._told([*self._sent, number])
        self._received = [counts[rank] for counts in told]
        self._asked = self._exchange(self._found[self._order], self._sent, self._received) // size
        if self._by_rows and torch.is_grad_enabled():
            self._by_rows[0].before_look_up(self._asked)
        rows = self._exchange(self.table.detach()[self._asked], self._received, self._sent)
        self._rows = torch.empty_like(rows).index_copy_(0, self._order, rows)
        if torch.is_grad_enabled():
            self._rows.requires_grad_()
        return max(counts[-1] for counts in told)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[...] tokens that were fetched -> [..., D]."""
        return F.embedding(torch.searchsorted(self._found, tokens), self._rows)

    # The loss

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the loss over this worker's targets.

        Parameters
        ----------
        hidden : Tensor
            [n, D] states at them.
        labels : Tensor
            [n] int64 their items, counted from 0.
        """
        loss: Tensor = _LossOverShards.apply(hidden, labels, self)  # type: ignore[no-untyped-call]
        return loss

    def of_all_workers(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of this worker's targets, and [n, D] the gradient by `hidden`.

        The gradients by the shard's rows are kept for `collect`.
        """
        assert self._training is not None
        kind: ShardedLoss = cast(Any, self._training.loss)  # the config refuses others
        negatives, log_q = self.negatives(hidden.device) if kind in SAMPLED_LOSSES else (labels[:0], hidden[:0, 0])
        told = self._told([len(hidden), len(negatives)])
        counts, num_negatives = [count for count, _ in told], sum(drawn for _, drawn in told)
        states, tokens = self._gather(hidden, counts), self._gather(labels + 1, counts)
        is_own = tokens % self.shard.world_size == self.shard.rank
        place = (tokens // self.shard.world_size - self.shard.first).masked_fill(~is_own, 0)
        match kind:
            case "cross-entropy":
                losses, gradient = self._cross_entropy(states, is_own, place)
            case "sampled-softmax" | "gbce":
                losses, gradient = self._sampled(kind, states, is_own, place, negatives, log_q, num_negatives)
            case _:
                assert_never(kind)
        of_shards = self._exchange(gradient, counts, [len(hidden)] * self.shard.world_size)
        begin = sum(counts[: self.shard.rank])
        return losses[begin : begin + len(hidden)].sum(), of_shards.view(
            self.shard.world_size, *hidden.shape
        ).float().sum(0)

    def _cross_entropy(self, states: Tensor, is_own: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Of all items, with the denominator summed up over the shards."""
        matrix, bias = self.weights.to(states.dtype), self.bias.detach().to(states.dtype)
        if not self._of_loss:
            self._of_loss = [torch.zeros_like(self.table), torch.zeros_like(self.bias)]
        grad_weights, grad_bias = self._of_loss[0][self.shard.own_items], self._of_loss[1]
        grad_states, losses = torch.empty_like(states), []
        largest = -(-self.shard.num_items // self.shard.world_size)  # the same on all workers
        rows = logit_rows(largest, states.device)
        for low in range(0, len(states), rows):
            part, own, at = states[low : low + rows], is_own[low : low + rows, None], place[low : low + rows, None]
            count = len(part)
            part = F.pad(part, (0, 0, 0, full_size(count, states.device.type) - count))
            logits = product(part, matrix, bias).float()
            target = logits[:count].gather(1, at).masked_fill(~own, 0)[:, 0]
            over_shards, of_target = self._of_all(torch.stack([logits[:count].logsumexp(1), target]))
            total = over_shards.logsumexp(0)
            losses.append(total - of_target.sum(0))
            logits[:count] -= total[:, None]
            grad_logits = logits.exp_()
            grad_logits[:count].scatter_add_(1, at, -own.float())
            grad_logits[count:] = 0
            grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(states.dtype)
            grad_states[low : low + rows] = product(grad_logits, matrix.t())[:count]
            add_product_over_rows(grad_weights, grad_logits, part)
        return torch.cat(losses) if losses else states.new_zeros(0, dtype=torch.float32), grad_states

    def negatives(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[K] int64 items of the shard, drawn with replacement, and [K] the log probability of each among the shard's.

        num_negatives is shared out to the shards evenly.
        """
        assert self._training is not None
        k, size = -(-self._training.num_negatives // self.shard.world_size), self.shard.size
        match self._training.negative_sampling:
            case "uniform":
                return torch.randint(size, (k,), device=device), torch.full((k,), -math.log(size), device=device)
            case "popularity":
                assert self._by_popularity is not None
                # Whoever has no interactions is never drawn.
                return self._by_popularity(k if self._by_popularity.total else 0, device)
            case _:
                assert_never(self._training.negative_sampling)

    def _sampled(
        self,
        kind: Literal["sampled-softmax", "gbce"],
        states: Tensor,
        is_own: Tensor,
        place: Tensor,
        negatives: Tensor,
        log_q: Tensor,
        num_negatives: int,
    ) -> tuple[Tensor, Tensor]:
        """Against the negatives of all shards.

        A shard's K negatives stand for its own items: weighted with 1 / (K q), q among these, they estimate its part of
        the denominator of the softmax, so the parts of all shards add up to an estimate of the whole one.
        """
        assert self._training is not None
        if self._by_rows:
            items = torch.cat([negatives, place])
            self._by_rows[0].before_look_up(items + self.shard.first)
            self._by_rows[1].before_look_up(items)
        weights, bias = self.weights, self.bias.detach()
        of_negatives, of_targets = weights[negatives].to(states.dtype), weights[place].to(states.dtype)
        is_target = is_own[:, None] & (place[:, None] == negatives)
        others = F.linear(states, of_negatives, bias[negatives].to(states.dtype)).float()
        target = ((states * of_targets).sum(1) + bias[place].to(states.dtype)).float().masked_fill(~is_own, 0)
        match kind:
            case "sampled-softmax":
                others = others - (log_q + math.log(max(len(negatives), 1)))
                others = others.masked_fill(is_target, -torch.inf)
                of_shard = others.logsumexp(1) if len(negatives) else others.new_full((len(states),), -torch.inf)
                over_shards, of_target = self._of_all(torch.stack([of_shard, target]))
                target = of_target.sum(0)
                total = torch.logaddexp(over_shards.logsumexp(0), target)
                losses = total - target
                grad_others, grad_target = (others - total[:, None]).exp(), (target - total).exp() - 1
            case "gbce":
                share = min(1.0, num_negatives / max(self.shard.num_items - 1, 1))
                beta = share * (self._training.gbce_t * (1 - 1 / share) + 1 / share)
                against = F.softplus(others).masked_fill(is_target, 0).sum(1)
                over_shards, of_target = self._of_all(torch.stack([against, target]))
                target = of_target.sum(0)
                losses = (over_shards.sum(0) - beta * F.logsigmoid(target)) / (num_negatives + 1)
                grad_others = others.sigmoid().masked_fill(is_target, 0) / (num_negatives + 1)
                grad_target = -beta * torch.sigmoid(-target) / (num_negatives + 1)
            case _:
                assert_never(kind)
        grad_target = grad_target.masked_fill(~is_own, 0)
        grad_rows = [
            product(grad_others.to(states.dtype).t(), states.t()).float(),
            (grad_target[:, None].to(states.dtype) * states).float(),
        ]
        self._of_rows.append(
            (torch.cat([negatives, place]), torch.cat(grad_rows), torch.cat([grad_others.sum(0), grad_target]))
        )
        grad_states = grad_others.to(states.dtype) @ of_negatives
        return losses, grad_states + grad_target[:, None].to(states.dtype) * of_targets

    # Gradients

    @torch.no_grad()
    def collect(self, num_targets: int) -> None:
        """Exchange the gradients of a step, whose mean over all targets they become."""
        own = self._rows.grad
        assert own is not None
        of_inputs = self._exchange(own[self._order], self._sent, self._received) / self.shard.world_size
        self._rows = torch.empty(0)
        scale, first = 1 / max(num_targets, 1), self.shard.first
        if self._by_rows:
            table, bias = self._by_rows
            table.add(self._asked, of_inputs)
            for items, gradients, of_biases in self._of_rows:
                table.add(items + first, gradients * scale)
                bias.add(items, of_biases * scale)
        else:
            grad, grad_bias = self._of_loss or [torch.zeros_like(self.table), torch.zeros_like(self.bias)]
            for items, gradients, of_biases in self._of_rows:
                grad.index_add_(0, items + first, gradients)
                grad_bias.index_add_(0, items, of_biases)
            grad *= scale
            grad_bias *= scale
            grad.index_add_(0, self._asked, of_inputs)
            if self.shard.rank == 0:
                grad[PADDING] = 0
            self.table.grad, self.bias.grad = grad, grad_bias
        self._of_loss, self._of_rows = [], []

    # What workers tell each other

    def _told(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of each worker, by rank."""
        own = torch.tensor(numbers, device=self.table.device)
        return self._of_all(own[None])[0].tolist()

    def _of_all(self, own: Tensor) -> Tensor:
        """[M, ...] -> [M, W, ...]: what each worker gives, which has the same shape."""
        if self.shard.world_size == 1:
            return own[:, None]
        parts = [torch.empty_like(own) for _ in range(self.shard.world_size)]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.stack(parts, 1)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first sent[0] rows to worker 0, the next sent[1] to worker 1 and so on; what this one gets."""
        if self.shard.world_size == 1:
            return rows
        out = rows.new_empty(sum(received), *rows.shape[1:])
        torch.distributed.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    def gather(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """The rows of all workers, by rank, and how many each has."""
        counts = [number for (number,) in self._told([len(rows)])]
        return self._gather(rows, counts), counts

    def _gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self._of_all(padded[None])[0]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all workers."""
        return self._of_all(values[None])[0].sum(0)


def from_all(own: Any) -> list[Any]:  # noqa: ANN401
    """What each worker gives, in the order of their ranks."""
    if not torch.distributed.is_initialized():
        return [own]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


class _LossOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, shards: ItemShards) -> Tensor:  # noqa: ANN401
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            loss, gradient = shards.of_all_workers(hidden.to(dtype), labels)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
