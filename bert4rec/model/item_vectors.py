"""An item's input vector: its id embedding, fused with its metadata.

The model looks up metadata by the input token. The token [MASK] has none, so a masked position cannot see the metadata
of its own item; padding has none either. Shapes: U tokens, V items, D hidden_units, F features (the item itself first),
W width of title embeddings.

Title embeddings are the largest of all tables, and do not change. In a training they stay where they were read, in
memory or on disk, and each look-up projects its own rows. A model directory has the projected rows instead.
"""

from typing import NamedTuple, assert_never, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert4rec import storage
from bert4rec.config import ModelConfig
from bert4rec.data.dataset import PADDING, ItemTable, Ragged
from bert4rec.data.features import FEATURES
from bert4rec.model.layers import Dropout
from bert4rec.model.rows import RowTable
from bert4rec.model.shards import ItemShards, Shard, ShardedEmbedding

PROJECTED = "items.projected_titles", "items.has_title"
"""What a model directory has in place of title embeddings."""
_ROWS_AT_ONCE = 65_536
_BYTES_ON_GPU = 2**30


class Metadata(NamedTuple):
    """Metadata of items 1..V, for the features that the model uses."""

    listed: dict[str, tuple[int, Ragged]]
    """By feature: the size of its vocabulary, and the values of each item."""
    titles: np.ndarray | None
    """[V, W] float32; a row is zero if the item has no title embedding."""

    @classmethod
    def none(cls) -> "Metadata":
        """No metadata: the item id is the only feature."""
        return cls({}, None)

    @classmethod
    def of(cls, config: ModelConfig, items: ItemTable, titles: np.ndarray | None) -> "Metadata":
        """The features that `config` uses."""
        listed = {name: items.listed[name] for name in FEATURES if getattr(config, f"use_{name}_emb")}
        return cls(listed, titles if config.use_title_emb else None)

    @property
    def shape(self) -> dict[str, list[int]]:
        """The sizes that `ItemVectors` needs if its tables are loaded later."""
        sizes = {feature: [size, len(ragged.values)] for feature, (size, ragged) in self.listed.items()}
        return sizes | ({} if self.titles is None else {"title": [self.titles.shape[1]]})


class TitleRows:
    """Title embeddings, which lie where they were read. A GPU gets a copy of small ones, or else the rows it needs."""

    def __init__(self, rows: np.ndarray) -> None:
        """Of rows [V, W], for the items 1..V."""
        self._rows = torch.from_numpy(rows)
        self._on_gpu: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """[U] -> [U, W]; zeros for padding and [MASK]."""
        rows = self._rows
        if tokens.device.type != "cpu" and rows.nbytes <= _BYTES_ON_GPU:
            if self._on_gpu is None or self._on_gpu.device != tokens.device:
                with torch.inference_mode(False):  # training looks it up later
                    self._on_gpu = rows.to(tokens.device)
            rows = self._on_gpu
        place = (tokens - 1).clamp(0, len(rows) - 1).to(rows.device)
        found = rows.index_select(0, place).to(tokens.device)
        return found.masked_fill(((tokens == PADDING) | (tokens > len(rows)))[:, None], 0)


class ItemVectors(nn.Module):
    """Turns tokens into input vectors.

    `model.metadata_fusion` chooses the fusion. concat: a linear layer over all features. add: their sum. gate: their
    sum weighted by softmax(linear(all features)) over the features that the item has."""

    def __init__(
        self, config: ModelConfig, num_items: int, shape: dict[str, list[int]], shard: Shard | None = None
    ) -> None:
        """Make the tables, of the item embedding only the `shard`'s rows if there is one."""
        super().__init__()
        width = config.hidden_units
        self.features = ["item", *shape]
        self.fusion = config.metadata_fusion
        self.embedding = (
            nn.Embedding(num_items + 2, width, padding_idx=PADDING) if shard is None else ShardedEmbedding(shard, width)
        )
        self.rows: RowTable | ItemShards | None = None  # of the embedding, where gradients are kept by row
        self.dropout = Dropout(config.metadata_dropout)
        self.listed = nn.ModuleDict()
        self._most_values: dict[str, int] = {}  # of an item, by feature
        for feature in FEATURES:
            if feature in shape:
                size, num_values = shape[feature]
                self.listed[feature] = nn.Embedding(max(size, 1), width)
                self.register_buffer(f"{feature}_values", torch.zeros(num_values, dtype=torch.int64))
                self.register_buffer(f"{feature}_offsets", torch.zeros(num_items + 3, dtype=torch.int64))
        if "title" in shape:
            self.titles: TitleRows | None = None
            self.title_projection = nn.Linear(shape["title"][0], width)
        if shape and self.fusion == "concat":
            self.concat = nn.Linear(len(self.features) * width, width)
        if shape and self.fusion == "gate":
            self.gate = nn.Linear(len(self.features) * width, len(self.features))

    def favour_item_in_gate(self) -> None:
        """Give the item most of the initial gate. With equal gates, 2 of 3 trainings never ranked above popularity."""
        if self.features != ["item"] and self.fusion == "gate":
            with torch.no_grad():
                self.gate.bias[0] = 2

    def set_tables(self, metadata: Metadata) -> None:
        """Fill the tables. The first and the last token, padding and [MASK], get no values."""
        self._most_values.clear()
        for feature, (_, ragged) in metadata.listed.items():
            offsets = np.concatenate([[0], ragged.offsets, ragged.offsets[-1:]])
            self.get_buffer(f"{feature}_values").copy_(torch.from_numpy(ragged.values))
            self.get_buffer(f"{feature}_offsets").copy_(torch.from_numpy(offsets))
        if metadata.titles is not None:
            self.titles = TitleRows(metadata.titles)

    def expect_projected_titles(self) -> None:
        """Make place for `PROJECTED`, if there are titles, to be filled from a model directory."""
        if "title" not in self.features:
            return
        num_tokens, width = self.embedding.weight.shape
        self.register_buffer("projected_titles", torch.zeros(num_tokens, width))
        self.register_buffer("has_title", torch.zeros(num_tokens, dtype=torch.bool))

    def expect_titles(self, titles: Tensor) -> None:
        """Take [V+2, W] title embeddings of a directory of an earlier version, instead of `PROJECTED`."""
        del self.projected_titles, self.has_title
        self.titles = TitleRows(titles[1:-1].numpy())

    @torch.no_grad()
    def project_titles(self, tokens: Tensor) -> dict[str, Tensor]:
        """[U] on the CPU -> what `PROJECTED` names, [U, D] and [U] bool; nothing without title embeddings.

        The rows lie in memory, or in a file on the local disk where they are many.
        """
        if "title" not in self.features:
            return {}
        width, device = self.embedding.weight.shape[1], self.embedding.weight.device
        is_small = len(tokens) <= _ROWS_AT_ONCE
        rows = torch.from_numpy(storage.empty((len(tokens), width), np.float32, in_memory=is_small))
        has_title = torch.empty(len(tokens), dtype=torch.bool)
        for places in torch.split(torch.arange(len(tokens)), _ROWS_AT_ONCE):
            projected, has = self._titles(tokens[places].to(device))
            rows[places], has_title[places] = (projected * has[:, None]).cpu(), has.cpu()
        return dict(zip(PROJECTED, (rows, has_title), strict=True))

    @torch.no_grad()
    def have_metadata(self, tokens: Tensor) -> Tensor:
        """[U] -> [U] bool: whether each item has any metadata."""
        return torch.cat([self._features(part)[1][:, 1:].any(1) for part in torch.split(tokens, _ROWS_AT_ONCE)])

    def forward(self, tokens: Tensor, distinct: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens of any shape [...] -> [..., D]. Metadata are fused once per distinct token.

        Parameters
        ----------
        distinct : tuple of Tensor
            `torch.unique(tokens, return_inverse=True)`, where it is known. A GPU would have to be waited for.
        """
        if self.features == ["item"]:
            return self.fuse(tokens)
        found, place = distinct or torch.unique(tokens, return_inverse=True)
        return F.embedding(place, self.fuse(found))

    def gates(self, tokens: Tensor) -> Tensor:
        """[U] -> [U, F]: the weight of each feature. The weights sum to 1; a feature that the item lacks has weight
        0."""
        return torch.cat([self._gates(*self._features(part)) for part in torch.split(tokens, _ROWS_AT_ONCE)])

    def fuse(self, tokens: Tensor) -> Tensor:
        """[U] -> [U, D], of each token by itself."""
        if self.features == ["item"]:
            return self._embed(tokens)
        if not torch.is_grad_enabled() and len(tokens) > _ROWS_AT_ONCE:
            whole = self.fuse(tokens[:1]).new_empty(len(tokens), self.embedding.weight.shape[1])
            for own, part in zip(torch.split(whole, _ROWS_AT_ONCE), torch.split(tokens, _ROWS_AT_ONCE), strict=True):
                own.copy_(self.fuse(part))
            return whole
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

    def _embed(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.embedding(tokens) if self.rows is None else self.rows(tokens)
        return vectors

    def _num_values(self, feature: str, length: Tensor) -> int:
        """How many values to read for items with `length` [U] of them. The true number would have to wait for a GPU,
        which gets the largest possible one."""
        if length.device.type == "cpu":
            return int(length.sum())
        if feature not in self._most_values:
            self._most_values[feature] = int(self.get_buffer(f"{feature}_offsets").diff().max())
        return len(length) * self._most_values[feature]

    def _features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[U] -> [U, F, D] vectors, zero if an item lacks the feature, and [U, F] bool: whether it has the feature."""
        vectors = [self._embed(tokens)]
        present = [torch.ones_like(tokens, dtype=torch.bool)]
        for feature, embedding in cast(dict[str, nn.Embedding], self.listed).items():
            offsets = self.get_buffer(f"{feature}_offsets")
            start, length = offsets[tokens], offsets[tokens + 1] - offsets[tokens]
            ends = torch.cumsum(length, 0)
            number = torch.arange(self._num_values(feature, length), device=tokens.device)
            row = torch.searchsorted(ends, number, right=True).clamp(max=len(tokens) - 1)
            values = self.get_buffer(f"{feature}_values")
            place = (start - (ends - length))[row] + number
            bags = torch.cat([ends - length, ends[-1:]])  # the last one has what is beyond all items
            # An empty bag gives zeros.
            pooled = F.embedding_bag(values[place.clamp(max=len(values) - 1)], embedding.weight, bags, mode="mean")
            vectors.append(self.dropout(pooled[:-1]))
            present.append(length > 0)
        if "title" in self.features:
            projected, has_title = self._titles(tokens)
            vectors.append(self.dropout(projected) * has_title[:, None])
            present.append(has_title)
        return torch.stack(vectors, 1), torch.stack(present, 1)

    def _titles(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[U] -> [U, D] projected title embeddings, and [U] bool: whether each item has one."""
        if self.titles is None:
            return self.get_buffer("projected_titles")[tokens], self.get_buffer("has_title")[tokens]
        if len(tokens) <= _ROWS_AT_ONCE:
            return self._project(tokens)
        # The backward pass reads the rows again: they would not all fit into memory.
        parts = [
            checkpoint(self._project, part, use_reentrant=False, preserve_rng_state=False)
            for part in torch.split(tokens, _ROWS_AT_ONCE)
        ]
        projected, has_title = (torch.cat(part) for part in zip(*parts, strict=True))
        return projected, has_title

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        assert self.titles is not None
        rows = self.titles(tokens)
        return self.title_projection(rows), rows.any(1)
