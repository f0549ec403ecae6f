"""Tables of which a step needs a few rows: the gradient of the whole table, zero but for these, is never made."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RowTable:
    """Looks up rows of a parameter [V, ...] of a module. Each look-up is a leaf of the graph with its own gradient."""

    def __init__(self, module: nn.Module, name: str, padding: int | None = None) -> None:
        """Take the parameter out of autograd, DDP and the optimisers of whole parameters.

        Parameters
        ----------
        padding : int
            A row that never changes.
        """
        self._module, self._name, self.padding = module, name, padding
        self.before_look_up: Callable[[Tensor], None] = lambda index: None  # an optimiser may bring the rows up to date
        self._looked_up: list[tuple[Tensor, Tensor]] = []
        self._added: list[tuple[Tensor, Tensor]] = []
        self.table.requires_grad_(False)

    @property
    def table(self) -> nn.Parameter:
        """The parameter, wherever the module lies now."""
        parameter = self._module.get_parameter(self._name)
        return parameter

    def __call__(self, index: Tensor) -> Tensor:
        """[N] int64 -> [N, ...]."""
        if not torch.is_grad_enabled():
            return self.table.index_select(0, index)
        self.before_look_up(index)
        rows = self.table.index_select(0, index).requires_grad_()
        self._looked_up.append((index, rows))
        return rows

    def add(self, index: Tensor, gradients: Tensor) -> None:
        """Note [N, ...] gradients of the rows `index` [N], which somebody else has looked up."""
        self._added.append((index, gradients))

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """[N] int64 rows and [N, ...] gradients of all look-ups, and those added, since the last call; a row may occur
        several times."""
        known = [(index, rows.grad) for index, rows in self._looked_up if rows.grad is not None] + self._added
        self._looked_up, self._added = [], []
        return torch.cat([index for index, _ in known]), torch.cat([gradient for _, gradient in known])


class OutputRows(NamedTuple):
    """The output weights, or biases, of `num_items` items for a loss that looks up some of them."""

    num_items: int
    look_up: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return self.num_items

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """As of a tensor: [N] int64 items, counted from 0 -> [N, ...]."""
        assert dim == 0
        return self.look_up(index)
