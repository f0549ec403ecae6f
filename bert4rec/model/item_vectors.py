"""What stands for an item at the network's input: its id embedding, fused with its metadata.

Metadata are looked up by the input token: padding, [MASK] and items without metadata have none, so that a masked
position cannot see its own item's. Shapes: U tokens, V items, D hidden_units, F features (the item itself first), W
width of title embeddings.
"""

from typing import NamedTuple, assert_never, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert4rec.config import ModelConfig
from bert4rec.data.dataset import PADDING, ItemTable, Ragged
from bert4rec.data.features import FEATURES
from bert4rec.model.layers import Dropout


class Metadata(NamedTuple):
    """Tables by token, for items 1..V; the values of each feature that the model uses."""

    listed: dict[str, tuple[int, Ragged]]
    """Feature -> size of its vocabulary, and the values of each item."""
    titles: np.ndarray | None
    """[V, W] float32, rows of zeros where an item has no title embedding."""

    @classmethod
    def none(cls) -> "Metadata":
        """No feature but the item itself."""
        return cls({}, None)

    @classmethod
    def of(cls, config: ModelConfig, items: ItemTable, titles: np.ndarray | None) -> "Metadata":
        """The features that `config` uses."""
        listed = {name: items.listed[name] for name in FEATURES if getattr(config, f"use_{name}_emb")}
        return cls(listed, titles if config.use_title_emb else None)

    @property
    def shape(self) -> dict[str, list[int]]:
        """What `ItemVectors` must know to be built before its tables are loaded."""
        sizes = {feature: [size, len(ragged.values)] for feature, (size, ragged) in self.listed.items()}
        return sizes | ({} if self.titles is None else {"title": [self.titles.shape[1]]})


class ItemVectors(nn.Module):
    """Tokens -> input vectors.

    Fusions (`model.metadata_fusion`): concat, a linear layer over all features; add, their sum; gate, their sum
    weighted by softmax(linear(all features)) over the features that the item has.
    """

    def __init__(self, config: ModelConfig, num_items: int, shape: dict[str, list[int]]) -> None:
        super().__init__()
        width = config.hidden_units
        self.features = ["item", *shape]
        self.fusion = config.metadata_fusion
        self.embedding = nn.Embedding(num_items + 2, width, padding_idx=PADDING)
        self.dropout = Dropout(config.metadata_dropout)
        self.listed = nn.ModuleDict()
        for feature in FEATURES:
            if feature in shape:
                size, num_values = shape[feature]
                self.listed[feature] = nn.Embedding(max(size, 1), width)
                self.register_buffer(f"{feature}_values", torch.zeros(num_values, dtype=torch.int64))
                self.register_buffer(f"{feature}_offsets", torch.zeros(num_items + 3, dtype=torch.int64))
        if "title" in shape:
            self.register_buffer("titles", torch.zeros(num_items + 2, shape["title"][0]))
            self.title_projection = nn.Linear(shape["title"][0], width)
        if shape and self.fusion == "concat":
            self.concat = nn.Linear(len(self.features) * width, width)
        if shape and self.fusion == "gate":
            self.gate = nn.Linear(len(self.features) * width, len(self.features))

    def let_item_lead(self) -> None:
        """Begin with most of the gate on the item: equal gates left 2 of 3 trainings at the level of popularity."""
        if self.features != ["item"] and self.fusion == "gate":
            with torch.no_grad():
                self.gate.bias[0] = 2

    def set_tables(self, metadata: Metadata) -> None:
        """Fill the tables; the first and the last token, padding and [MASK], have no values."""
        for feature, (_, ragged) in metadata.listed.items():
            offsets = np.concatenate([[0], ragged.offsets, ragged.offsets[-1:]])
            self.get_buffer(f"{feature}_values").copy_(torch.from_numpy(ragged.values))
            self.get_buffer(f"{feature}_offsets").copy_(torch.from_numpy(offsets))
        if metadata.titles is not None:
            self.get_buffer("titles")[1:-1] = torch.from_numpy(metadata.titles)

    @torch.no_grad()
    def have_metadata(self, tokens: Tensor) -> Tensor:
        """[U] -> [U] bool."""
        return self._features(tokens)[1][:, 1:].any(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Any shape of tokens -> [..., D]. Metadata are fused once for each distinct token."""
        if self.features == ["item"]:
            vectors: Tensor = self.embedding(tokens)
            return vectors
        distinct, place = torch.unique(tokens, return_inverse=True)
        return F.embedding(place, self._fuse(distinct))

    def gates(self, tokens: Tensor) -> Tensor:
        """[U] -> [U, F]: the weight of each feature, summing to 1; a feature that the item lacks has 0."""
        return self._gates(*self._features(tokens))

    def _fuse(self, tokens: Tensor) -> Tensor:
        """[U] -> [U, D]."""
        vectors, present = self._features(tokens)
        match self.fusion:
            case "concat":
                fused: Tensor = self.concat(vectors.flatten(1))
                return fused.masked_fill((tokens == PADDING)[:, None], 0)
            case "add":
                return vectors.sum(1)
            case "gate":
                return (self._gates(vectors, present)[:, :, None] * vectors).sum(1)
            case _:
                assert_never(self.fusion)

    def _gates(self, vectors: Tensor, present: Tensor) -> Tensor:
        logits: Tensor = self.gate(vectors.flatten(1))
        return logits.masked_fill(~present, -torch.inf).softmax(1)

    def _features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[U] -> [U, F, D] vectors, zero where an item has none, and [U, F] bool where it has one."""
        vectors = [self.embedding(tokens)]
        present = [torch.ones_like(tokens, dtype=torch.bool)]
        for feature, embedding in cast(dict[str, nn.Embedding], self.listed).items():
            offsets = self.get_buffer(f"{feature}_offsets")
            start, length = offsets[tokens], offsets[tokens + 1] - offsets[tokens]
            bags = torch.cumsum(length, 0) - length
            row = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), length)
            place = (start - bags)[row] + torch.arange(len(row), device=tokens.device)
            values = self.get_buffer(f"{feature}_values")[place]
            pooled = F.embedding_bag(values, embedding.weight, bags, mode="mean")  # an empty bag gives zeros
            vectors.append(self.dropout(pooled))
            present.append(length > 0)
        if "title" in self.features:
            titles = self.get_buffer("titles")[tokens]
            has_title = titles.any(1)
            vectors.append(self.dropout(self.title_projection(titles)) * has_title[:, None])
            present.append(has_title)
        return torch.stack(vectors, 1), torch.stack(present, 1)
