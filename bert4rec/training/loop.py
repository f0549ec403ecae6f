"""Optimiser, step, epoch and validation, without Ray. They run in one process or in each of several DDP workers."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple, Protocol, assert_never, cast

import torch
import torch.distributed
from torch import Tensor, nn

from bert4rec import storage
from bert4rec.config import Config, TrainingConfig
from bert4rec.data.dataset import Sequences
from bert4rec.data.windows import Before, Windows, held_out, held_out_users
from bert4rec.errors import InputError
from bert4rec.evaluation.metrics import RankCounts
from bert4rec.inference.ranking import Exclusions, NextScores, next_item_states, rank_of_target, score_next
from bert4rec.inference.rules import Rules
from bert4rec.model.batches import Step, append_mask, iter_steps, steps_ahead
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import ItemShards, from_all
from bert4rec.training.muon import muon_for
from bert4rec.training.rowwise import RowwiseAdam

DDP_OPTIONS = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
"""The model's tables never change, and a gradient need not lie in memory twice."""
VALIDATION_USERS = 512
"""Users ranked at once in validation."""
PASS_TOKENS = {"cpu": 8_192, "cuda": 131_072}
"""Tokens in one forward and backward pass: small enough for the caches of a CPU, large enough to fill a GPU."""


class Worker(NamedTuple):
    """One of the processes that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = Worker()


class Place(NamedTuple):
    """How far a worker is in an epoch."""

    epoch: int
    """From 0."""
    step: int
    """Steps done."""
    num_steps: int
    num_tokens: int
    seconds: float
    """Spent on the epoch so far, also before the run was stopped."""


class Saver(Protocol):
    """Who decides after each step whether to save in the middle of the epoch, the same on all workers."""

    def is_due(self, place: Place) -> bool:
        """Whether to save after this step."""

    def save(self, place: Place, state: dict[str, Any]) -> None:
        """Save what `train_epoch` needs as its `begin_at` to go on from here."""


def learning_rate(training: TrainingConfig, epochs_done: float) -> float:
    """The learning rate after `epochs_done` epochs, fractions included."""
    if epochs_done < training.warmup_epochs:
        return training.lr * epochs_done / training.warmup_epochs
    share = (epochs_done - training.warmup_epochs) / max(training.num_epochs - training.warmup_epochs, 1e-9)
    share = min(share, 1.0)
    match training.scheduler:
        case "constant":
            return training.lr
        case "linear":
            return training.lr * (1 - share)
        case "cosine":
            return training.lr * ((1 + math.cos(math.pi * share)) / 2)
        case _:
            assert_never(training.scheduler)


def make_optimizers(model: BERT4Rec, training: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The configured optimiser, or optimisers, of all parameters of `model`."""
    muon = [
        p
        for name, p in model.named_parameters()
        if training.optimizer == "muon" and p.ndim == 2 and ("blocks." in name or "output_transform." in name)
    ]
    by_muon = {id(p) for p in muon}
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and id(p) not in by_muon]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]  # biases and norms are not decayed
    kind: type[torch.optim.Adam]
    match training.optimizer:
        case "adam":
            kind = torch.optim.Adam
        case "adamw" | "muon":
            kind = torch.optim.AdamW
        case _:
            assert_never(training.optimizer)
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [kind(groups, lr=training.lr, fused=True)]
    if muon:
        # Its steps are scaled to the size of AdamW's, so that one learning rate suits both (Liu et al. 2025).
        decay, scaled = training.weight_decay, "match_rms_adamw"
        kind_of_muon = muon_for(muon[0].device, min(min(p.shape) for p in muon))
        optimizers.append(kind_of_muon(muon, lr=training.lr, weight_decay=decay, adjust_lr_fn=scaled))
    if model.row_tables:
        optimizers.append(RowwiseAdam(model.row_tables, training.lr, training.weight_decay))
    elif model.shards is not None:
        own = ([model.shards.table], training.weight_decay), ([model.shards.bias], 0.0)
        groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in own]
        optimizers.append(kind(groups, lr=training.lr, fused=True))
    return optimizers


def train_step(
    model: nn.Module,
    step: Step,
    optimizers: list[torch.optim.Optimizer],
    scaler: Any,  # noqa: ANN401 - torch.amp.GradScaler, which torch does not export
    training: TrainingConfig,
    world_size: int = 1,
) -> Tensor:
    """One optimiser step; [2] this worker's sum of the loss, and its number of targets.

    The gradient is the mean over the targets of the whole step: each worker's loss is its sum over their number, times
    the number of workers, over which DDP takes the mean.
    """
    is_distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    shards = _core(model).shards
    device = next(model.parameters()).device
    dtype = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[training.precision]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    batches = step.batches if shards is None else shards.begin(step.batches)
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with model.no_sync() if is_distributed and not is_last else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
                loss = model(batch)
            scaler.scale(loss * (world_size / max(step.num_targets, 1))).backward()
        sums += torch.stack([loss.detach(), (batch.labels > 0).sum()])
    if shards is not None:
        shards.collect(step.num_targets)
        world_size = 1  # each row is on one worker
    of_rows = [own for each in optimizers if isinstance(each, RowwiseAdam) for own in each.collect(world_size)]
    if training.gradient_clip_val is not None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None] + of_rows
        norm = nn.utils.get_total_norm(gradients) if shards is None else _norm_over_shards(gradients, of_rows, shards)
        torch._foreach_mul_(gradients, (training.gradient_clip_val / (norm + 1e-6)).clamp(max=1))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return sums


def _core(model: nn.Module) -> BERT4Rec:
    """The network itself, which DDP may wrap."""
    return cast(BERT4Rec, model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model)


def _norm_over_shards(gradients: list[Tensor], of_rows: list[Tensor], shards: ItemShards) -> Tensor:
    """The norm of all gradients, of which each worker has those of its own shard besides those that all have."""
    of_shard = of_rows or [own.grad for own in (shards.table, shards.bias) if own.grad is not None]
    of_all = [each for each in gradients if not any(each is own for own in of_shard)]
    squares = nn.utils.get_total_norm(of_all).square() + shards.summed(nn.utils.get_total_norm(of_shard).square())
    return squares.sqrt()


def train_epoch(
    model: nn.Module,
    windows: Windows,
    config: Config,
    epoch: int,
    optimizers: list[torch.optim.Optimizer],
    scaler: Any,  # noqa: ANN401
    worker: Worker = ALONE,
    saver: Saver | None = None,
    begin_at: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train on every user once.

    Parameters
    ----------
    model : Module
        A `BERT4Rec`, bare or wrapped in DDP.
    epoch : int
        From 0; with the config's seed it decides all that is drawn.
    saver : Saver
        Asked after each step.
    begin_at : dict
        What the `saver` was given in the middle of this epoch, to go on from there.

    Returns
    -------
    dict
        epoch (from 1), train_loss (mean over all workers' targets), lr, tokens_per_second, seconds.

    Raises
    ------
    InputError
        If the loss is no finite number.
    """
    training, data = config.training, config.data
    core = _core(model)
    torch.manual_seed(data.seed + 1_000_003 * (epoch + 1) + worker.rank)  # dropout, the same in a resumed run
    began = time.monotonic()
    by_step: list[Tensor] = []  # [steps, 2] each: loss, targets
    num_done = num_tokens = 0
    after = None
    if begin_at is not None:
        began -= begin_at["seconds"]
        num_done, num_tokens, after = begin_at["step"], begin_at["num_tokens"], (begin_at["step"], begin_at["drawn"])
        sums = begin_at["sums"].to(worker.device)  # of all workers: one of them goes on with it
        by_step.append(sums if worker.rank == 0 else torch.zeros_like(sums))
        _set_random(begin_at["random"], worker)
    model.train()
    num_steps = math.ceil(len(windows) / data.batch_size)
    max_tokens = PASS_TOKENS[worker.device.type]

    def steps_of(rank: int, world_size: int, after: tuple[int, Tensor] | None = None) -> Iterator[Step]:
        drawn = (core.num_items, epoch, rank, world_size, max_tokens, worker.device, core.num_new_items)
        return iter_steps(windows, data, config.model, *drawn, after)

    def sum_up() -> Tensor:
        """[steps, 2] over all workers; only now and then, since every look waits for the device."""
        sums = _over_workers(torch.cat(by_step))
        _check_finite(sums, steps_of, training, epoch, num_steps)
        return sums

    steps = steps_of(worker.rank, worker.world_size, after)
    if worker.device.type == "cuda":  # on a CPU, the thread would take from the model what it gives
        steps = steps_ahead(steps, lambda: torch.cuda.set_device(core.output_bias.device))
    for index, step in enumerate(steps, num_done):
        rate = learning_rate(training, epoch + (index + 0.5) / num_steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        by_step.append(train_step(model, step, optimizers, scaler, training, worker.world_size)[None])
        num_tokens += step.num_tokens
        place = Place(epoch, index + 1, num_steps, num_tokens, time.monotonic() - began)
        if saver is not None and saver.is_due(place):
            state = {
                "step": place.step,
                "num_tokens": num_tokens,
                "seconds": place.seconds,
                "sums": sum_up(),
                "drawn": step.drawn,
                "random": from_all(_random(worker)),
            }
            saver.save(place, state)
    for optimizer in optimizers:
        if isinstance(optimizer, RowwiseAdam):
            optimizer.catch_up()
    total = sum_up().sum(0)
    seconds = time.monotonic() - began
    return {
        "epoch": epoch + 1,
        "train_loss": float(total[0] / total[1].clamp(min=1)),
        "lr": learning_rate(training, epoch + (num_steps - 0.5) / num_steps),
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
    }


def _check_finite(
    sums: Tensor,
    steps_of: Callable[[int, int], Iterator[Step]],
    training: TrainingConfig,
    epoch: int,
    num_steps: int,
) -> None:
    """Raise an `InputError` that names the first step whose loss is no finite number, if there is one."""
    total = sums.sum(0)
    loss = float(total[0] / total[1].clamp(min=1))
    if math.isfinite(loss):
        return
    bad = int((~torch.isfinite(sums[:, 0])).to(torch.uint8).argmax())  # the first
    batches = next(itertools.islice(steps_of(0, 1), bad, None)).batches
    batch = storage.fingerprint([[each.tokens.tolist(), each.labels.tolist()] for each in batches])
    raise InputError(
        f"training diverged: the loss of epoch {epoch + 1} is {loss} at learning rate "
        f"{learning_rate(training, epoch + (bad + 0.5) / num_steps):g}, first in step {bad + 1} of {num_steps} "
        f"(batch {batch}); earlier checkpoints are kept; try a smaller training.lr or training.gradient_clip_val=1"
    )


def validate(
    model: BERT4Rec,
    sequences: Windows,
    config: Config,
    worker: Worker = ALONE,
    before: Before | None = None,
    ruled: tuple[Rules, Sequences] | None = None,
) -> dict[str, float]:
    """Metrics over all users; each worker ranks its share, and the counts of ranks are summed, which is exact.

    `ruled`: the rules by which users may get items, if validation obeys them, and the histories that `sequences` shows.
    """
    rank, world_size, device = worker
    asked = config.evaluation.query_time, model.usual_gap
    histories, targets = held_out(sequences, config.data, "validation", before, *asked)
    parts = torch.split(torch.arange(rank, len(histories), world_size), VALIDATION_USERS)
    if ruled is not None:  # lists are read by ranges of users
        parts = torch.split(torch.arange(len(histories)).tensor_split(world_size)[rank], VALIDATION_USERS)
        index = held_out_users(sequences, config.data, "validation", before)
    elif model.shards is not None:  # each worker ranks the users of all
        parts = torch.split(torch.arange(len(histories)), world_size * VALIDATION_USERS)
    ranks = RankCounts.empty(model.num_items)
    token_counts = torch.zeros(model.num_items + 1, dtype=torch.int64)
    not_ranked = torch.zeros((), dtype=torch.int64)
    model.eval()
    for part in parts:
        users = part if model.shards is None else part[rank::world_size]
        batch = histories.users(users).to(device)
        if model.shards is not None:
            everyone = torch.cat([part[each::world_size] for each in range(world_size)])
            seen = histories.users(everyone).to(device) if config.evaluation.exclude_seen else None
            of_all = _ranks_over_shards(model, model.shards, batch, seen, targets[everyone].to(device))
            begin = sum(len(part[each::world_size]) for each in range(rank))
            found = of_all[begin : begin + len(users)]
        else:
            if ruled is None:
                exclusions = Exclusions.of(batch if config.evaluation.exclude_seen else None, device=device)
            else:
                rules, own = ruled[0], ruled[1].without_items(index[users].numpy())
                everyone = torch.arange(len(users))
                exclusions = rules.offer(batch, own, everyone, rules.lists_of(own), only_some=False).exclusions
            found = rank_of_target(score_next(model, batch), exclusions, targets[users].to(device), model.num_items)
        not_ranked += (found < 1).sum().cpu()  # a score that is no number is above nothing, not even itself
        ranks.add(found.clamp(min=1))
        if model.metadata_shape:
            read = replace(batch, start=torch.maximum(batch.start, batch.end - model.config.max_len + 1))
            token_counts += torch.bincount(read.flat()[1].cpu(), minlength=len(token_counts))
    _all_reduce(not_ranked)
    if not_ranked:
        raise InputError(
            f"training diverged: {int(not_ranked)} validation scores are no numbers; "
            "try a smaller training.lr or training.gradient_clip_val=1"
        )
    _all_reduce(ranks.counts)
    _all_reduce(token_counts)
    return ranks.metrics("val_") | _mean_gates(model, token_counts)


@torch.inference_mode()
def _ranks_over_shards(
    model: BERT4Rec, shards: ItemShards, own: Windows, seen: Windows | None, targets: Tensor
) -> Tensor:
    """[B] ranks of the targets of all workers, by rank of the worker: each counts the items of its shard.

    Parameters
    ----------
    own : Windows
        Histories of this worker's users.
    seen : Windows or None
        [B] what each user has seen, if that is not ranked.
    targets : Tensor
        [B] tokens.
    """
    shards.fetch(append_mask(own, model.config.max_len, model.num_items)[0] if len(own) else targets[:0])
    states, _ = shards.gather(next_item_states(model, own))
    shard, columns = shards.shard, shards.shard.columns(states.device)
    is_own = (targets - 1 - columns[0]) % shard.world_size == 0
    places = torch.where(is_own, torch.searchsorted(columns, targets - 1) + 1, 0)
    exclusions = Exclusions.of(seen, device=states.device).within(columns)
    scores = NextScores(states, shards.weights, shards.bias.detach())
    return rank_of_target(scores, exclusions, places, shard.size, over_shards=shards.summed)


@torch.inference_mode()
def _mean_gates(model: BERT4Rec, token_counts: Tensor) -> dict[str, float]:
    """val_gate/FEATURE: mean gate over the items that validation read, each as often as it was read."""
    if not model.metadata_shape or model.config.metadata_fusion != "gate":
        return {}
    tokens = torch.nonzero(token_counts).flatten()
    weights = token_counts[tokens].double() / token_counts.sum()
    if model.shards is not None:
        model.shards.fetch(tokens.to(model.shards.table.device))
    gates = model.items.gates(tokens.to(model.output_bias.device)).cpu().double()
    return {f"val_gate/{name}": float(mean) for name, mean in zip(model.items.features, weights @ gates, strict=True)}


def _over_workers(sums: Tensor) -> Tensor:
    """The sum over all workers, on the CPU; added in the order of their ranks, so that the last digit is always the
    same."""
    total: Tensor = reduce(torch.add, from_all(sums.cpu()))
    return total


def _random(worker: Worker) -> dict[str, Tensor]:
    """State of the random numbers of dropout and sampled negatives, of which each worker has its own."""
    state = {"cpu": torch.get_rng_state()}
    if worker.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(worker.device)
    return state


def _set_random(states: list[dict[str, Tensor]], worker: Worker) -> None:
    """Go on with this worker's random numbers. A worker that was not there before keeps those of its seed."""
    if worker.rank >= len(states):
        return
    own = states[worker.rank]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and worker.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], worker.device)


def _all_reduce(sums: Tensor) -> None:
    """Sum over all workers, in place."""
    if not torch.distributed.is_initialized():
        return
    is_nccl = torch.distributed.get_backend() == "nccl"
    on_device = sums.to(torch.device("cuda")) if is_nccl else sums.cpu()
    torch.distributed.all_reduce(on_device)
    sums.copy_(on_device)
