"""BERT4Rec (Sun et al. 2019, arXiv 1904.06690, Section 3): the whole network, and its directory on disk.

Shapes: S positions of a packed batch (see `batches.pack`), made of groups of B users with L positions and M queried
positions each; N wanted positions in all, D hidden_units, H heads, V items.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert4rec import storage
from bert4rec.config import DataConfig, ModelConfig
from bert4rec.data.dataset import PADDING
from bert4rec.errors import InputError
from bert4rec.model.batches import Batch, Group
from bert4rec.model.item_vectors import PROJECTED, ItemVectors, Metadata
from bert4rec.model.layers import Dropout, Linear, full_size
from bert4rec.model.losses import Loss, linear_cross_entropy
from bert4rec.model.rows import OutputRows, RowTable
from bert4rec.model.shard_files import PartFile, check_sha256, file_of, read_parts, write_part
from bert4rec.model.shards import ItemShards, Shard, ShardedEmbedding, from_all
from bert4rec.model.times import TimeEncoding, follows

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of a model in shards, instead of the former
CONFIG = "config.json"
AVERAGE_OF = "average_of"  # in the latter, of an average of models (`average.py`)
_TITLES = "items.titles"
_MAPPED_BYTES = 2**28


class Block(nn.Module):
    """Post-norm transformer block (Sections 3.2 and 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_units
        self.num_heads = config.num_heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.attention_output = Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))
        self.output_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout_rate)

    def forward(
        self,
        x: Tensor,
        groups: list[Group],
        keep: list[Tensor | None],
        turns: tuple[Tensor, Tensor] | None = None,
        query: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states of all positions, or only of the positions in `query`.

        Parameters
        ----------
        x : Tensor
            [S, D].
        keep : list
            For each group [B, 1, 1, L] bool, false at padding, or None if the group has no padding; or, with a bias by
            time, [B, H, L, L] to add to the scaled products, -inf at padding ([B, H, M, L] with `query`).
        turns : (Tensor, Tensor)
            [S, 1, D/2H] complex factors that rotate queries, and those of keys, with rotary positions or times.
        query, wanted : Tensor
            [Q] positions to attend from, and [N] places in `query` that have a label. The block then does all work
            after the keys and values only for these.

        Returns
        -------
        Tensor
            [S, D], or [N, D] with `query`.
        """
        x_query = x if query is None else x.index_select(0, query)  # (Q, D)
        queries = [group.rows * (group.length if query is None else group.queries) for group in groups]
        keys = [group.rows * group.length for group in groups]
        q = self.query(x_query)
        k, v = self.key_value(x).chunk(2, dim=-1)
        if turns is not None:
            of_queries, of_keys = turns
            q, k = turned(q, of_queries if query is None else of_queries[query]), turned(k, of_keys)
        attended = []
        for group, mask, *parts in zip(
            groups,
            keep,
            torch.split(q[: sum(queries)], queries),
            torch.split(k[: sum(keys)], keys),
            torch.split(v[: sum(keys)], keys),
            strict=True,
        ):
            query_heads, key_heads, value_heads = (
                part.view(group.rows, -1, self.num_heads, part.shape[1] // self.num_heads).transpose(1, 2)
                for part in parts
            )
            mixed = F.scaled_dot_product_attention(query_heads, key_heads, value_heads, attn_mask=mask)
            attended.append(mixed.transpose(1, 2).reshape(parts[0].shape))  # (B, H, M, D/H) -> (B*M, D)
        attended.append(x_query.new_zeros(len(x_query) - sum(queries), x_query.shape[1]))
        context = torch.cat(attended)
        if wanted is not None:
            x_query, context = x_query.index_select(0, wanted), context.index_select(0, wanted)  # (N, D)
        x_query = self.attention_norm(x_query + self.dropout(self.attention_output(context)))
        hidden: Tensor = self.output_norm(x_query + self.dropout(self.feed_forward(x_query)))
        return hidden


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Switch off cuDNN's attention inside this block. It takes a tenth of a second for each new shape."""
    is_on = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_on)


def rotary_turns(max_len: int, size: int) -> Tensor:
    """[max_len, size/2] complex: e^(i p / 10000^(2j/size)) for distance p from the end (RoPE, arXiv 2104.09864)."""
    cpu = torch.device("cpu")  # also where a model without weights is made, to be filled
    angles = torch.arange(max_len, device=cpu)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2, device=cpu) / size)
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """[S, D]: pairs of neighbouring columns of each head, as complex numbers, multiplied by `turns` [S, 1, D/2H]."""
    pairs = torch.view_as_complex(x.float().view(len(x), -1, turns.shape[-1], 2))
    return torch.view_as_real(pairs * turns).flatten(1).to(x.dtype)


def _causal(query: Tensor, key: Tensor, keep: Tensor | None) -> Tensor:
    """[B, 1, M, L] whether a place sees another, by their distances from the end; padding too sees itself, since the
    softmax of nothing is no number."""
    before = key > query
    return (before if keep is None else before & keep) | (key == query)


class BERT4Rec(nn.Module):
    """The bidirectional transformer over item sequences.

    Positions count from the end of the sequence (0 is the last item), so padding on the left changes nothing.
    """

    unrankable: Tensor
    """[V] bool: items with neither interactions nor metadata."""

    def __init__(
        self,
        config: ModelConfig,
        num_items: int,
        catalogue: str = "",
        metadata: Metadata | dict[str, list[int]] | None = None,
        num_new_items: int = 0,
        shard: Shard | None = None,
    ) -> None:
        """Make the network for a catalogue.

        Parameters
        ----------
        metadata : Metadata or dict
            The tables, or only their shape if they are loaded later.
        num_new_items : int
            Number of items without interactions, the last of the catalogue. Their id embedding is zero and stays zero.
        shard : Shard
            The rows of the item table that this process keeps, instead of all. The output layer then shares the table.
        """
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.num_new_items = num_new_items
        self.catalogue = catalogue
        self.loss: Loss = linear_cross_entropy  # training sets another one
        self.held_out = 0  # last items of each user that training did not see; training sets it
        self.trained_before: int | None = None  # temporal split: Unix time from which on training saw nothing
        self.metadata_shape = metadata.shape if isinstance(metadata, Metadata) else metadata or {}
        width = config.hidden_units
        self.items = ItemVectors(config, num_items, self.metadata_shape, shard)
        self.register_buffer("unrankable", torch.zeros(num_items, dtype=torch.bool))
        self.register_buffer("item_counts", torch.zeros(num_items, dtype=torch.int64))  # training fills it
        if isinstance(metadata, Metadata):
            self.items.set_tables(metadata)
        if isinstance(metadata, Metadata) and num_new_items:
            new = torch.arange(num_items - num_new_items, num_items)
            self.unrankable[new] = ~self.items.have_metadata(new + 1)
        self.position_embedding = nn.Embedding(config.max_len, width)
        self.is_causal = config.attention == "causal"
        self.is_rotary = config.position_encoding == "rotary"
        if self.is_rotary:
            turns = rotary_turns(config.max_len, width // config.num_heads)
            self.register_buffer("turns", turns, persistent=False)
        self.times = TimeEncoding(config) if config.time_parts else None
        self.dropout = Dropout(config.dropout_rate)
        self.embedding_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.output_transform = Linear(width, width) if config.output_transform else None
        self.row_tables: list[RowTable] = []  # `train_by_rows` fills it
        self._fused: Tensor | None = None  # the fused item vectors, kept while the weights do not change
        self.shards: ItemShards | None = None
        if isinstance(self.items.embedding, ShardedEmbedding):
            self.shards = self.items.rows = ItemShards(self.items.embedding.shard, self.items.embedding, self)
            # DDP would give all workers the rows of the first.
            self._ddp_params_and_buffers_to_ignore = list(self.shards.shard.starts)
        self.output_bias = nn.Parameter(torch.zeros(num_items if shard is None else shard.size), shard is None)
        if not config.share_embeddings:
            self.output_embedding = nn.Parameter(torch.empty(num_items, width))
        self.apply(_initialise)
        self.items.favour_item_in_gate()
        if not config.share_embeddings:
            nn.init.normal_(self.output_embedding, std=0.02)
        if num_new_items:
            with torch.no_grad():
                self.items.embedding.weight[num_items + 1 - num_new_items : num_items + 1] = 0

    def encode(self, batch: Batch) -> Tensor:
        """[N, D] final hidden states at the queries that have a label, in the order of the queries."""
        x = self.items(batch.tokens, batch.distinct) + self.position_embedding(batch.position)  # (S, D)
        item_times = None
        if self.times is not None:
            assert batch.times is not None, f"model.time_encoding={self.config.time_encoding} needs times"
            before, is_first = batch.times.roll(1), ~follows(batch.tokens, batch.position)
            gaps = (batch.times - before).clamp(min=0).masked_fill(is_first, -1)
            embedded = self.times.embedded(batch.times, gaps)
            x = x if embedded is None else x + embedded
            item_times = torch.where(is_first, batch.times, before) if self.is_causal else batch.times
        x = self.embedding_norm(self.dropout(x))
        turns = self._turns(batch, item_times)
        keep = [
            (tokens != PADDING)[:, None, None, :] if group.is_padded else None
            for group, tokens in zip(batch.groups, batch.rectangles(), strict=True)
        ]
        wanted, count = batch.wanted, len(batch.wanted)
        wanted = F.pad(wanted, (0, full_size(count, x.device.type) - count))
        with without_cudnn_attention():
            last = len(self.blocks) - 1
            for layer, block in enumerate(self.blocks[:-1]):
                x = block(x, batch.groups, self._masks(layer, batch, keep, item_times), turns)
            keep = self._masks(last, batch, keep, item_times)
            hidden: Tensor = self.blocks[last](x, batch.groups, keep, turns, batch.query, wanted)
        return hidden[:count]

    def _turns(self, batch: Batch, item_times: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """[S, 1, D/2H] complex factors of queries and of keys for `Block`: by place, by time, or half and half.

        Parameters
        ----------
        item_times : Tensor
            [S] int64 Unix seconds of the item at each place.
        """
        by_place = self.get_buffer("turns")[batch.position] if self.is_rotary else None

        def with_times(times: Tensor) -> Tensor:
            assert self.times is not None
            by_time = self.times.turns(times)
            rest = self.config.hidden_units // self.config.num_heads // 2 - by_time.shape[1]
            others = torch.ones_like(by_time[:, :1]).expand(-1, rest) if by_place is None else by_place[:, :rest]
            return torch.cat([others, by_time], dim=1)[:, None]

        if self.times is not None and self.times.turns_by_time and batch.times is not None and item_times is not None:
            of_queries = with_times(batch.times)
            return of_queries, with_times(item_times) if self.is_causal else of_queries
        return None if by_place is None else (by_place[:, None], by_place[:, None])

    def _masks(
        self, layer: int, batch: Batch, keep: list[Tensor | None], item_times: Tensor | None
    ) -> list[Tensor | None]:
        """The masks `keep` of one layer, without later places where attention is causal, and with the bias by time
        where the model has one."""

        def asking(flat: Tensor) -> list[Tensor]:
            """Each group's part of `flat` [S] at the places that attend."""
            return batch.at_queries(flat) if layer == len(self.blocks) - 1 else batch.rectangles(flat)

        if self.is_causal:
            places = zip(asking(batch.position), batch.rectangles(batch.position), keep, strict=True)
            keep = [_causal(query[:, None, :, None], own[:, None, None, :], mask) for query, own, mask in places]
        if self.times is None or self.times.bias is None or batch.times is None or item_times is None:
            return keep
        times = zip(asking(batch.times), batch.rectangles(item_times), strict=True)
        biases = [self.times.attention_bias(layer, query, own) for query, own in times]
        return [
            bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            for bias, mask in zip(biases, keep, strict=True)
        ]

    @property
    def num_parameters(self) -> int:
        """Numbers that training learns, those of all shards together."""
        own = sum(parameter.numel() for parameter in self.parameters())
        if self.shards is None:
            return own
        shard, width = self.shards.shard, self.config.hidden_units
        return own + (self.num_items + 2 - shard.num_rows) * width + self.num_items - shard.size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output_bias.device

    @property
    def reads_times(self) -> bool:
        """Whether it needs the times of a history."""
        return self.times is not None

    @property
    def usual_gap(self) -> int:
        """`windows.usual_gap` of the training data, in seconds; 0 of a model that reads no times."""
        return 0 if self.times is None else int(self.times.get_buffer("usual_gap"))

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, D]: the dense layer with GELU in equation 7, if the model has it. The product with
        `output_weights` gives the logits."""
        return hidden if self.output_transform is None else F.gelu(self.output_transform(hidden))

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch does, and forget the fused item vectors, which may change."""
        self._fused = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._fused = None  # moved to another device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def output_weights(self, popularity_discount: float = 0) -> tuple[Tensor, Tensor]:
        """Weights [V, D] and `discounted_bias` [V]. Special tokens have none, so the model never predicts them."""
        assert self.shards is None, "the weights are in shards"
        bias = self.discounted_bias(popularity_discount)
        if self.config.output_features == "fused":
            fused = self._fused
            if fused is None:
                fused = self.items.fuse(torch.arange(1, self.num_items + 1, device=bias.device))
                self._fused = fused if torch.is_inference_mode_enabled() else None
            # A new item without metadata has an untrained vector, so nothing can score it.
            return fused, bias.masked_fill(self.unrankable, -torch.inf)
        return self.items.embedding.weight[1:-1] if self.config.share_embeddings else self.output_embedding, bias

    def discounted_bias(self, popularity_discount: float) -> Tensor:
        """[V] the output bias minus `popularity_discount` t times log(1 + n), for an item's n training interactions.

        This turns log p(item | history) into log p(item | history) - t log p(item) (Menon et al. 2021, equation 8).

        Raises
        ------
        InputError
            If the discount is not zero and the model comes from a version that did not store the interactions.
        """
        if not popularity_discount:
            return self.output_bias
        counts = self.get_buffer("item_counts")
        if not counts.any():
            raise InputError(
                "inference.popularity_discount needs the number of interactions of each item, and this "
                "model is of an earlier version, which did not keep that; train it again under another run.name"
            )
        return self.output_bias - popularity_discount * counts.float().log1p()

    def check_is_held_out(self, split: str, data: DataConfig, cutoffs: dict[str, int], source: str) -> None:
        """Check that training has not seen the targets of `split`, "validation" or "test".

        Parameters
        ----------
        cutoffs : dict
            Cut-offs of the prepared dataset, used for a temporal split.
        source : str
            Name of the model in the message.

        Raises
        ------
        InputError
            If training may have seen them.
        """
        if data.split == "temporal":
            cutoff = cutoffs[split]
            if self.trained_before is None or self.trained_before > cutoff:
                until = "at any time" if self.trained_before is None else f"until {self.trained_before}"
                raise InputError(
                    f"{source}: was trained on interactions {until}, so it may have seen what came after the {split} "
                    f"cut-off {cutoff} (Unix time); expected one trained with data.split=temporal and this "
                    "data.split_time"
                )
        elif self.held_out < data.holdout:
            raise InputError(
                f"{source}: was trained with the last {self.held_out} items of each user held out, so it has seen the "
                f"{split} item of data.holdout={data.holdout}; expected one trained with that holdout"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the loss over all targets."""
        known = self.num_items - self.num_new_items  # training would only push down an item that is never a target
        states = self.project(self.encode(batch))  # (N, D)
        labels = batch.labels.index_select(0, batch.wanted)
        if self.shards is not None:
            return self.shards.loss(states, labels - 1)
        if self.row_tables:
            biases = self.row_tables[1]
            return self.loss(states, OutputRows(known, self._output_row), OutputRows(known, biases), labels - 1)
        weights, bias = self.output_weights()
        if self.num_new_items:  # only then, since a slice costs a copy of the gradient
            weights, bias = weights[:known], bias[:known]
        return self.loss(states, weights, bias, labels - 1)

    def train_by_rows(self) -> None:
        """Keep gradients of the item embedding and the output layer by row, for a loss that samples items. Call it
        before the model is wrapped in DDP."""
        self.items.rows = RowTable(self.items.embedding, "weight", PADDING)
        self.row_tables = [self.items.rows, RowTable(self, "output_bias")]
        if not self.config.share_embeddings:
            self.row_tables.append(RowTable(self, "output_embedding"))

    def _output_row(self, items: Tensor) -> Tensor:
        """[N] items, counted from 0 -> [N, D] their output weights, looked up by row."""
        if not self.config.share_embeddings:
            return self.row_tables[2](items)
        return self.items.fuse(items + 1) if self.config.output_features == "fused" else self.row_tables[0](items + 1)

    def save_pretrained(self, directory: str) -> None:
        """Write weights and architecture into a model directory, in formats that readers need neither Ray nor pickle
        for.

        Where the item table is in shards, every worker calls it, and writes its own part of the directory.
        """
        os.makedirs(directory, exist_ok=True)
        content: dict[str, Any] = {
            "architecture": "BERT4Rec",
            "num_items": self.num_items,
            "num_new_items": self.num_new_items,
            "held_out": self.held_out,
            "trained_before": self.trained_before,
            "catalogue": self.catalogue,
            "model": self.config.model_dump(),
            "metadata": self.metadata_shape,
        }
        if self.shards is None:
            state = self.state_dict() | self.items.project_titles(torch.arange(self.num_items + 2))
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            file, unfinished = (os.path.join(directory, name) for name in (WEIGHTS, f"{WEIGHTS}.unfinished"))
            safetensors.torch.save_file(state, unfinished)
            os.replace(unfinished, file)
        else:
            index, file = self._save_shard(directory, self.shards.shard), os.path.join(directory, INDEX)
            if self.shards.shard.rank > 0:
                return
            content["num_shards"] = self.shards.shard.world_size
            storage.write_bytes(file, index)
        content["weights_sha256"] = storage.sha256(file)
        storage.write_sealed(storage.join(directory, CONFIG), content)

    def _save_shard(self, directory: str, shard: Shard) -> bytes:
        """Write this worker's file; the index of all, in the format of the hub."""
        titles = self.items.project_titles(torch.arange(shard.rank, self.num_items + 2, shard.world_size))
        starts = shard.starts | dict.fromkeys(titles, shard.rank)
        state = self.state_dict() | titles
        if shard.rank > 0:
            state = {name: state[name] for name in starts}
        file = file_of("model", shard.rank, shard.world_size)
        written = write_part(os.path.join(directory, file), state, starts, shard.world_size)
        files = dict(from_all((file, written)))
        metadata = {
            "total_size": sum(each["bytes"] for each in files.values()),
            "files": {name: {"sha256": each["sha256"], "bytes": each["bytes"]} for name, each in files.items()},
        }
        weight_map = {tensor: name for name, each in files.items() for tensor in each["tensors"]}
        return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1).encode()

    @classmethod
    def from_pretrained(cls, directory: str) -> Self:
        """Read a model directory and return the model in evaluation mode.

        Raises
        ------
        InputError
            If a file is missing or damaged, or it is of an average of models.
        """
        content = storage.read_sealed(storage.join(directory, CONFIG))
        if AVERAGE_OF in content:
            raise InputError(f"{directory}: is an average of models; expected a single one")
        try:
            with torch.device("meta"):  # without weights
                model = cls(
                    ModelConfig.model_validate(content["model"]),
                    content["num_items"],
                    content["catalogue"],
                    content["metadata"],
                    content["num_new_items"],
                )
                model.items.expect_projected_titles()
            model.held_out = content["held_out"]
            model.trained_before = content.get("trained_before")
            if "num_shards" in content:
                state = _from_parts(directory, _files(_read_weights(directory, content)), model)
            else:
                state = _from_file(directory, content)
                state.setdefault("item_counts", torch.zeros(model.num_items, dtype=torch.int64))  # of earlier versions
            if _TITLES in state:  # of earlier versions
                model.items.expect_titles(state.pop(_TITLES))
            model.load_state_dict(state, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(f"{directory}: not a model directory of this version ({error})") from None
        return model.eval()

    def read_shard(self, directory: str) -> None:
        """Fill this worker's shard, and all that is not in shards, from a model directory of any number of shards.

        Raises
        ------
        InputError
            If it is not in shards, or a file is missing or damaged.
        """
        assert self.shards is not None
        shard, content = self.shards.shard, storage.read_sealed(storage.join(directory, CONFIG))
        if "num_shards" not in content:
            raise InputError(f"{directory}: this model is not in shards; it was trained without training.shard_items")
        files = _files(_read_weights(directory, content))
        read_parts(directory, files, self.state_dict(), shard.starts, shard.world_size)


def _read_weights(directory: str, content: dict[str, Any]) -> bytes:
    """The weights, or the index of their files; checked."""
    file = INDEX if "num_shards" in content else WEIGHTS
    try:
        weights = storage.read_bytes(storage.join(directory, file))
    except FileNotFoundError:
        raise InputError(f"{directory}: {file} is missing; this is no whole model directory") from None
    check_sha256(storage.join(directory, file), hashlib.sha256(weights).hexdigest(), content["weights_sha256"])
    return weights


def _from_file(directory: str, content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model in one file; a large one is mapped into memory, which several processes then share."""
    path = storage.join(directory, WEIGHTS)
    if storage.size(path) < _MAPPED_BYTES:
        return safetensors.torch.load(_read_weights(directory, content))
    with storage.on_local_disk(path) as local:
        check_sha256(path, storage.sha256(local), content["weights_sha256"])
        return safetensors.torch.load_file(local)


def _from_parts(directory: str, files: dict[str, PartFile], model: BERT4Rec) -> dict[str, Tensor]:
    """The tensors of a model in shards, of which `model` has the shapes. A large one is put together in a file on the
    local disk, which is mapped into memory."""
    state, like = {}, model.state_dict()
    if any(_TITLES in each["tensors"] for each in files.values()):  # of earlier versions
        like = {name: tensor for name, tensor in like.items() if name not in PROJECTED}
        like[_TITLES] = torch.empty(model.num_items + 2, *model.metadata_shape["title"], device="meta")
    for name, tensor in like.items():
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
        state[name] = torch.from_numpy(storage.empty(tuple(tensor.shape), kind, tensor.nbytes < _MAPPED_BYTES))
    read_parts(directory, files, state, {})
    return state


def _files(index: bytes) -> dict[str, PartFile]:
    """The files of a model in shards."""
    content = json.loads(index)
    tensors: dict[str, list[str]] = {}
    for tensor, file in content["weight_map"].items():
        tensors.setdefault(file, []).append(tensor)
    return {
        name: {"sha256": said["sha256"], "bytes": said["bytes"], "tensors": tensors[name]}
        for name, said in content["metadata"]["files"].items()
    }


def weights_of(directory: str) -> str:
    """SHA-256 of the weights in a model directory, which `from_pretrained` checks, as 64 hex digits."""
    return str(storage.read_sealed(storage.join(directory, CONFIG))["weights_sha256"])


def _initialise(module: nn.Module) -> None:
    """Draw weights from normal(0, 0.02), and set biases to zero. Section 3.6 truncates the same normal distribution."""
    if isinstance(module, ShardedEmbedding):
        module.draw(0.02)
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0
