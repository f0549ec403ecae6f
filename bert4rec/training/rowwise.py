"""Adam for tables of which a step touches a few rows (`training.item_optimizer=rowwise`).

Shapes: V rows of a table, N rows that a step touches, D hidden_units.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from bert4rec.model.rows import RowTable

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch's own of Adam and AdamW
_CATCH_UP_ROWS = 65_536


class RowwiseAdam(torch.optim.Optimizer):
    """AdamW that reads and writes the touched rows alone, so that a step takes as long for many rows as for few.

    A row that no step touches keeps its place. Both moments decay in each step, and so does the weight; a row catches
    up when a step touches it next. AdamW on the whole table does the same, except that it moves an untouched row
    further along its first moment. Where each step touches all rows, the two are equal.
    """

    def __init__(self, tables: Sequence[RowTable], lr: float, weight_decay: float) -> None:
        self.tables = tables
        matrices = [each.table for each in tables if each.table.ndim > 1]
        vectors = [each.table for each in tables if each.table.ndim == 1]  # biases are not decayed
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
        groups += [{"params": vectors, "weight_decay": 0.0}]
        super().__init__(groups, {"lr": lr, "step": 0, "log_decay": 0.0})
        self._gradients: dict[Tensor, tuple[Tensor, Tensor]] = {}

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
            group["step"] += 1
            group["log_decay"] += math.log1p(-group["lr"] * group["weight_decay"])
            for table in group["params"]:
                self._update(table, group, *self._gradients.pop(table))

    def _update(self, table: Tensor, group: dict[str, Any], rows: Tensor, gradient: Tensor) -> None:
        state, step = self._state_of(table, group), group["step"]
        if rows.device.type != "cpu":  # the last row repeats, and must be written alike
            gradient = gradient[torch.searchsorted(rows, rows)]
        pause = _column(step - state["touched"][rows], table).float()
        mean = state["exp_avg"][rows].mul_(torch.pow(BETA1, pause)).add_(gradient, alpha=1 - BETA1)
        square = state["exp_avg_sq"][rows].mul_(torch.pow(BETA2, pause)).addcmul_(gradient, gradient, value=1 - BETA2)
        weight = self._decayed(table, group, rows)
        denominator = square.sqrt().div_(math.sqrt(1 - BETA2**step)).add_(EPSILON)
        weight.addcdiv_(mean, denominator, value=-group["lr"] / (1 - BETA1**step))
        for whole, own in ((table, weight), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            whole.index_copy_(0, rows, own)
        state["touched"].index_fill_(0, rows, step)

    def _state_of(self, table: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[table]
        if not state:
            # Written at once: torch.zeros would take a page of memory whenever a row is the first to be touched there.
            state |= {"exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
            state["touched"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)
            if group["weight_decay"]:
                state["log_decay"] = torch.zeros(len(table), dtype=torch.float64, device=table.device)
        return state

    def _decayed(self, table: Tensor, group: dict[str, Any], rows: Tensor) -> Tensor:
        """[N, ...] rows of the table after the weight decay of all steps until now, which is noted."""
        weight = table[rows]
        if group["weight_decay"]:
            state = self._state_of(table, group)
            weight *= _column((group["log_decay"] - state["log_decay"][rows]).exp(), table).to(weight.dtype)
            state["log_decay"].index_fill_(0, rows, group["log_decay"])
        return weight

    @torch.no_grad()
    def catch_up(self) -> None:
        """Decay the weights of all rows to the last step: call it before the table is read as a whole."""
        for group in self.param_groups:
            if not group["weight_decay"]:
                continue
            for table in group["params"]:
                for rows in torch.split(torch.arange(len(table), device=table.device), _CATCH_UP_ROWS):
                    table.index_copy_(0, rows, self._decayed(table, group, rows))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """As of any optimiser; but torch would turn all tensors into the type of the parameter."""
        super().load_state_dict(state_dict)
        tables = [table for group in self.param_groups for table in group["params"]]
        for number, saved in state_dict["state"].items():
            for name in {"touched", "log_decay"} & set(saved):
                self.state[tables[number]][name] = saved[name].to(tables[number].device)


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
