"""Adam for tables of which a step touches a few rows (`training.item_optimizer=rowwise`).

Shapes: V rows of a table, N rows that a step touches, D hidden_units.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from bert4rec.model.rows import RowTable

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch's own of Adam and AdamW
_CATCH_UP_ROWS = 65_536
_MOVING_STEPS = 256  # a resting row's first moment then moves it no longer: BETA1 ** 256 is 2e-12


class RowwiseAdam(torch.optim.Optimizer):
    """AdamW of the whole table that reads and writes the touched rows alone, so that a step takes as long for many rows
    as for few.

    In AdamW each step changes each row: one without a gradient moves on along its first moment, which decays, and its
    weight decays. Here, such a row rests until it is looked up next, and then makes up for all these steps at once.
    Therefore the two train alike, but for epsilon in the steps of a resting row.
    """

    def __init__(self, tables: Sequence[RowTable], lr: float, weight_decay: float) -> None:
        self.tables = tables
        matrices = [each.table for each in tables if each.table.ndim > 1]
        vectors = [each.table for each in tables if each.table.ndim == 1]  # biases are not decayed
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
        groups += [{"params": vectors, "weight_decay": 0.0}]
        # [n + 1] of the moment before and each of the n steps since the last `catch_up`: the logarithm of all weight
        # decay until then, and how far a row that rests since then moves if its first moment is the root of the second.
        past = torch.zeros(1, dtype=torch.float64, device=tables[0].table.device)
        super().__init__(groups, {"lr": lr, "step": 0, "log_decay": past, "path": past})
        self._gradients: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for each in tables:
            each.before_look_up = functools.partial(self._bring_up_to_date, each)

    @torch.no_grad()
    def collect(self, world_size: int = 1) -> list[Tensor]:
        """Sum up the gradients of the look-ups since the last step, by row; over workers take the mean, as DDP does.

        Returns
        -------
        list of Tensor
            [N, ...] gradient of each table, which the caller may scale in place. Rows of zeros may follow the last one.
        """
        for each in self.tables:
            rows, gradients = _summed(*each.take_gradients())
            if world_size > 1:
                rows, gradients = _summed(*_of_all_workers(rows, gradients, world_size))
                gradients /= world_size
            if each.padding is not None:
                gradients.masked_fill_((rows == each.padding)[:, None], 0)
            self._gradients[each.table] = rows, gradients
        return [gradients for _, gradients in self._gradients.values()]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the rows that `collect` found."""
        for group in self.param_groups:
            for table in group["params"]:
                self._update(table, group, *self._gradients.pop(table))
            group["step"] += 1
            decay, size = math.log1p(-group["lr"] * group["weight_decay"]), _step_size(group["lr"], group["step"])
            resting, moving = group["path"][:-_MOVING_STEPS], group["path"][-_MOVING_STEPS:]
            pauses = torch.arange(len(moving), 0, -1, dtype=moving.dtype, device=moving.device)
            moving = moving * math.exp(decay) + size * torch.pow(BETA1 / math.sqrt(BETA2), pauses)
            group["path"] = torch.cat([resting, moving, torch.zeros_like(moving[:1])])
            group["log_decay"] = torch.cat([group["log_decay"], group["log_decay"][-1:] + decay])

    def _update(self, table: Tensor, group: dict[str, Any], rows: Tensor, gradient: Tensor) -> None:
        """Make the next step of rows with a gradient."""
        if rows.device.type != "cpu":  # the last row repeats, and must be written alike
            gradient = gradient[torch.searchsorted(rows, rows)]
        step = group["step"] + 1
        weight, mean, square = self._caught_up(table, group, rows)
        mean.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
        square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, square.sqrt().add_(_epsilon(step)), value=-_step_size(group["lr"], step))
        self._write(table, rows, step, weight, mean, square)

    def _state_of(self, table: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[table]
        if not state:
            # Written at once: torch.zeros would take a page of memory whenever a row is the first to be touched there.
            state |= {"exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
            state["touched"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        return state

    def _caught_up(self, table: Tensor, group: dict[str, Any], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, ...] weights and both moments of rows after the last step."""
        state, log_decay = self._state_of(table), group["log_decay"]
        last = len(log_decay) - 1
        touched = state["touched"][rows] - (group["step"] - last)  # counted as the past steps are
        weight, mean, square = table[rows], state["exp_avg"][rows], state["exp_avg_sq"][rows]
        path = group["path"][touched] * (log_decay[-1] - log_decay[(touched + _MOVING_STEPS).clamp(max=last)]).exp()
        weight.mul_(_column((log_decay[-1] - log_decay[touched]).exp(), table))
        weight.sub_(mean.div(square.sqrt().add_(_epsilon(group["step"]))).mul_(_column(path, table)))
        pause = _column(last - touched, table).float()
        return weight, mean.mul_(torch.pow(BETA1, pause)), square.mul_(torch.pow(BETA2, pause))

    def _write(self, table: Tensor, rows: Tensor, step: int, weight: Tensor, mean: Tensor, square: Tensor) -> None:
        state = self._state_of(table)
        for whole, own in ((table, weight), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            whole.index_copy_(0, rows, own)
        state["touched"].index_fill_(0, rows, step)

    @torch.no_grad()
    def _bring_up_to_date(self, looked_up: RowTable, rows: Tensor) -> None:
        table = looked_up.table
        group = next(each for each in self.param_groups if any(own is table for own in each["params"]))
        if len(group["path"]) > 1:
            self._write(table, rows, group["step"], *self._caught_up(table, group, rows))

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring all rows to the last step: call it before the table is read as a whole."""
        for each in self.tables:
            for rows in torch.split(torch.arange(len(each.table), device=each.table.device), _CATCH_UP_ROWS):
                self._bring_up_to_date(each, rows)
        for group in self.param_groups:
            group["log_decay"] = group["path"] = torch.zeros_like(group["path"][:1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """As of any optimiser; but torch would turn all tensors into the type of the parameter, and not move those of
        groups."""
        super().load_state_dict(state_dict)
        tables = [table for group in self.param_groups for table in group["params"]]
        for number, saved in state_dict["state"].items():
            self.state[tables[number]]["touched"] = saved["touched"].to(tables[number].device)
        for group in self.param_groups:
            for name in ("log_decay", "path"):
                group[name] = group[name].to(tables[0].device)


def _step_size(rate: float, step: int) -> float:
    """How far Adam moves for a first moment as large as the root of the second."""
    return rate * math.sqrt(1 - BETA2**step) / (1 - BETA1**step)


def _epsilon(step: int) -> float:
    """Adam's epsilon beside the root of the second moment before its bias is corrected."""
    return EPSILON * math.sqrt(1 - BETA2 ** max(step, 1))


def _column(values: Tensor, table: Tensor) -> Tensor:
    """[N] -> [N, 1, ...], to be multiplied with rows of the table."""
    return values.view(-1, *[1] * (table.ndim - 1))


def _summed(rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """[N] distinct rows, ascending, and [N, ...] the sum of the gradients of each.

    Only a CPU knows without waiting how many there are. On a GPU, the last row repeats up to the length of the input,
    with gradients of zero.
    """
    ordered, order = rows.sort(stable=True)
    is_new = ordered[1:] != ordered[:-1]
    place = torch.cat([rows.new_zeros(min(len(rows), 1)), torch.cumsum(is_new, 0)])
    count = int(place[-1]) + 1 if rows.device.type == "cpu" and len(rows) else len(rows)
    sums = gradients.new_zeros(count, *gradients.shape[1:]).index_add_(0, place, gradients[order])
    distinct = ordered[-1:].repeat(count).scatter_(0, place, ordered)
    return distinct, sums


def _of_all_workers(rows: Tensor, gradients: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """The rows and gradients of all workers, one after another in the same order everywhere."""
    counts = [torch.empty(1, dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = torch.cat(counts).tolist()
    gathered = []
    for own in (rows, gradients):
        parts = [own.new_empty(max(lengths), *own.shape[1:]) for _ in lengths]
        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own
        torch.distributed.all_gather(parts, padded)
        gathered.append(torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]))
    return gathered[0], gathered[1]
