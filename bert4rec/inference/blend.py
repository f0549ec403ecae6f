"""Adds an item-item model's scores to the network's (`inference.blend`).

The score of an item becomes m + w · d · (e - mean) / deviation: m is the network's score, e the item-item model's, w
the weight; d is the deviation of m, and mean and deviation are those of e, over all items that the network can score.
This ranks as the sum of both scores does, each standardised, and leaves scores in the network's unit.

Means and deviations are over the catalogue, not over what this user may get. So the score depends on the history alone:
it is the same for validation, evaluation and recommendation, and a rule never changes the order of what it leaves.

Shapes: B users, V items, A items that are scored, D hidden_units, S stored weights that the histories reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from bert4rec import storage
from bert4rec.config import ItemModel
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.model.average import Model
from bert4rec.model.network import weights_of

if TYPE_CHECKING:
    import scipy.sparse

    from bert4rec.inference.item_item import ItemWeights

BLEND = "blend.json"
"""Beside the model: what its item-item model was fitted to, the file of its weights, and the chosen weight."""
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Blend:
    """`inference.blend`."""

    model: ItemModel
    wanted: float | Literal["auto"]
    weight: float | None = None
    """None: not chosen yet."""
    fitted_to: str = ""
    """Fingerprint of what the item-item model, and a chosen weight, depend on; empty: nobody has looked."""
    path: str = ""
    """File of the item-item model's weights; empty: not fitted yet."""
    _made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What this process has read and computed."""

    @classmethod
    def of(cls, wanted: Mapping[ItemModel, float | Literal["auto"]]) -> "Blend | None":
        """The blend of a config; None without one, and for the weight 0, which adds nothing."""
        for model, weight in wanted.items():
            if weight:
                return cls(model, weight, None if weight == "auto" else weight)
        return None

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Another process reads the weights itself."""
        return type(self), (self.model, self.wanted, self.weight, self.fitted_to, self.path)

    def identity(self) -> dict[str, Any]:
        """In the form of the config."""
        return {self.model: self.wanted}

    def described(self) -> dict[str, Any]:
        """For results: the model, its weight, and whether validation chose it."""
        return {"model": self.model, "weight": self.weight, "is_chosen": self.wanted == "auto"}

    def tensors(self) -> dict[str, Tensor]:
        """The stored weights: `weights` [V, V], or `offsets` [V+1], `items` and `values` of a sparse one's rows."""
        if "tensors" not in self._made:
            assert self.path, "a blend is read or fitted before it ranks"
            if storage.is_local(self.path):
                self._made["tensors"] = safetensors.torch.load_file(storage.open_store(self.path)[1])  # shared pages
            else:
                self._made["tensors"] = safetensors.torch.load(storage.read_bytes(self.path))
        found: dict[str, Tensor] = self._made["tensors"]
        return found

    def item_weights(self) -> "ItemWeights":
        """The item-item model as it was fitted."""
        found = self.tensors()
        return found["weights"].numpy() if "weights" in found else self._matrix(len(found["offsets"]) - 1).tocsc()

    def _matrix(self, num_items: int) -> "scipy.sparse.csr_array":
        import scipy.sparse

        if "matrix" not in self._made:
            arrays = (self.tensors()[name].numpy() for name in ("values", "items", "offsets"))
            self._made["matrix"] = scipy.sparse.csr_array(tuple(arrays), shape=(num_items, num_items))
        return self._made["matrix"]

    def added(
        self,
        network: tuple[Model, float],
        histories: Windows,
        states: Tensor,
        output: tuple[Tensor, Tensor],
        columns: Tensor | None = None,
    ) -> "Added":
        """What is added to the scores of B users.

        Parameters
        ----------
        network : tuple
            The model and its popularity discount, by which to know `output` again.
        states, output : Tensor
            [B, D], and weights [V, D] with biases [V], whose product the network's scores are.
        columns : Tensor or None
            [A] the items that are scored; None: all.
        """
        scored = torch.isfinite(output[1])
        own = self._deviation(network, states, output, scored)
        if "weights" in self.tensors():
            return self._dense(histories, own, scored, columns)
        return self._sparse(histories, own, scored, columns)

    def _deviation(
        self, network: tuple[Model, float], states: Tensor, output: tuple[Tensor, Tensor], scored: Tensor
    ) -> Tensor:
        """[B] float64 deviation of the network's scores."""
        made = self._made.get("covariance")
        if made is None or made[0] is not network[0] or made[1] != network[1]:
            made = self._made["covariance"] = (*network, _covariance(*output, scored))
        covariance = made[2].to(states.device)
        extended = torch.cat([states, torch.ones_like(states[:, :1])], dim=1).double()
        return ((extended @ covariance) * extended).sum(1).clamp(min=0).sqrt()

    def _dense(self, histories: Windows, own: Tensor, scored: Tensor, columns: Tensor | None) -> "Added":
        device = own.device
        if "on device" not in self._made or self._made["on device"].device != device:
            self._made["on device"] = self.tensors()["weights"].to(device)
        weights = self._made["on device"]
        row, item = _distinct(histories, len(weights))
        offsets = torch.searchsorted(row, torch.arange(len(histories), device=device))
        scores = F.embedding_bag(item, weights, offsets, mode="sum")  # (B, V)
        variance, mean = torch.var_mean(scores if scored.all() else scores[:, scored], dim=1, correction=0)
        deviation = variance.double().sqrt()
        factor = torch.where(deviation > 0, own / deviation, 0.0).float()[:, None]
        scores = scores if columns is None else scores[:, columns]
        dense = scores.sub_(mean[:, None]).mul_(factor)
        none = torch.empty(0, dtype=torch.int64, device=device)
        shift = torch.zeros_like(factor)
        return Added(self._weight, shift, dense, Pairs(none, none, none.float()))

    def _sparse(self, histories: Windows, own: Tensor, scored: Tensor, columns: Tensor | None) -> "Added":
        from bert4rec.inference.item_item import user_item  # scipy takes a while to import

        device, num_items = own.device, len(scored)
        product = (user_item(histories.to(torch.device("cpu")), num_items) @ self._matrix(num_items)).tocsc()
        row, item = torch.from_numpy(product.indices).long(), _repeated(torch.from_numpy(product.indptr).long())
        value = torch.from_numpy(product.data)
        row, item, value = row.to(device), item.to(device), value.to(device)
        counted = torch.where(scored[item], value, 0.0).double()
        mean, squares = (
            torch.zeros_like(own).index_add_(0, row, each) / scored.sum() for each in (counted, counted.square())
        )
        deviation = (squares - mean.square()).clamp(min=0).sqrt()
        factor = torch.where(deviation > 0, own / deviation, 0.0)
        pairs = Pairs(row, item, (value * factor[row]).float())
        pairs = pairs if columns is None else pairs.within(columns)
        return Added(self._weight, (-mean * factor).float()[:, None], None, pairs)

    @property
    def _weight(self) -> float:
        assert self.weight is not None, "a weight is chosen before it ranks"
        return self.weight


class Pairs(NamedTuple):
    """Numbers of some users and items; by item, where blocks are cut from them."""

    row: Tensor
    """[S] int64 user."""
    item: Tensor
    """[S] int64 item, counted from 0."""
    value: Tensor
    """[S] float32."""

    def within(self, columns: Tensor) -> "Pairs":
        """Those of the items in `columns` [A], ascending, counted by their place there."""
        inside, place = places_in(columns, self.item)
        return Pairs(self.row[inside], place, self.value[inside])

    def of_users(self, users: Tensor) -> "Pairs":
        """Those of the users in `users`, ascending."""
        inside, place = places_in(users, self.row)
        return Pairs(place, self.item[inside], self.value[inside])


@dataclass(frozen=True)
class Added:
    """What is added to the scores of B users, times a weight."""

    weight: float
    shift: Tensor
    """[B, 1] to all items."""
    dense: Tensor | None
    """[B, A] to each item."""
    sparse: Pairs
    """To some items."""

    def add_to(self, block: Tensor, low: int, high: int) -> None:
        """Add to scores [B, high-low], in place."""
        if self.dense is not None:
            block.add_(self.dense[:, low:high], alpha=self.weight)
            return
        block.add_(self.shift, alpha=self.weight)
        ends = torch.tensor([low, high], device=block.device)
        begin, end = torch.searchsorted(self.sparse.item, ends).tolist()
        row, item, value = (each[begin:end] for each in self.sparse)
        block[row, item - low] += self.weight * value  # each pair is there once

    def of_users(self, users: Tensor) -> "Added":
        """Those of the users in `users`, ascending."""
        dense = None if self.dense is None else self.dense[users]
        return Added(self.weight, self.shift[users], dense, self.sparse.of_users(users))


def places_in(ascending: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[S] bool: which of `values` are in `ascending`; and the places there of those that are."""
    if not len(ascending):
        return torch.zeros_like(values, dtype=torch.bool), values[:0]
    place = torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)
    inside = ascending[place] == values
    return inside, place[inside]


def read(blend: Blend, checkpoint: str, model: Model, popularity_discount: float) -> Blend:
    """The blend with what is stored beside the model.

    Raises
    ------
    InputError
        If nothing is, or it belongs to another model.
    """
    once = f"; run `python -m jobs.evaluate` once with inference.blend={{{blend.model}: {blend.wanted}}}"
    found = stored(checkpoint)
    if found is None or found["matrix"]["model"] != blend.model:
        raise InputError(f"{checkpoint}: has no {blend.model} for inference.blend{once}")
    if found["matrix"]["catalogue"] != model.catalogue:
        raise InputError(f"{checkpoint}: its {blend.model} is of another catalogue than the model{once}")
    path = storage.join(checkpoint, found["file"])
    if not storage.exists(path) or storage.sha256(path) != found["sha256"]:
        raise InputError(f"{path}: is missing or damaged{once}")
    weight = blend.weight
    if blend.wanted == "auto":
        own = {"model": weights_of(checkpoint), "popularity_discount": popularity_discount}
        chosen = found.get("weight")
        if chosen is None or any(chosen["for"][key] != value for key, value in own.items()):
            raise InputError(f"{checkpoint}: no weight of {blend.model} is chosen for this model and discount{once}")
        weight = chosen["value"]
    return replace(blend, weight=weight, path=path, fitted_to=storage.fingerprint(found))


def stored(checkpoint: str) -> dict[str, Any] | None:
    """What lies beside the model, if anything does."""
    path = storage.join(checkpoint, BLEND)
    return storage.read_sealed(path) if storage.exists(path) else None


def _covariance(weights: Tensor, bias: Tensor, scored: Tensor) -> Tensor:
    """[D+1, D+1] float64 covariance of the output weights and biases over the items that can be scored."""
    kept = scored.nonzero().flatten()
    parts = torch.split(kept, _ROWS_AT_ONCE)

    def rows(part: Tensor) -> Tensor:
        return torch.cat([weights[part], bias[part, None]], dim=1).double()

    mean = torch.stack([rows(part).sum(0) for part in parts]).sum(0) / max(len(kept), 1)
    total = torch.zeros((len(mean), len(mean)), dtype=torch.float64, device=weights.device)
    for part in parts:
        centred = rows(part) - mean
        total += centred.T @ centred
    return total / max(len(kept), 1)


def _distinct(histories: Windows, num_items: int) -> tuple[Tensor, Tensor]:
    """[S] row, ascending, and [S] item, counted from 0, of what the histories have, each once."""
    row, tokens = histories.flat()
    pair = torch.unique(row * num_items + tokens.long() - 1)
    return pair // num_items, pair % num_items


def _repeated(offsets: Tensor) -> Tensor:
    """[S] number of the slice that each place lies in, given the offsets of the slices."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
