"""BERT4Rec (Sun et al. 2019, arXiv 1904.06690, Section 3): the whole network, and its directory on disk.

Shapes: B users, L positions, M queried positions a user, N queried positions in all, D hidden_units, H heads, V items.
"""

import os
from collections.abc import Callable
from typing import Any, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from bert4rec import storage
from bert4rec.config import ModelConfig
from bert4rec.dataset import PADDING
from bert4rec.functions import Dropout, linear_cross_entropy
from bert4rec.items import ItemVectors, Metadata
from bert4rec.storage import InputError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Block(nn.Module):
    """Post-norm transformer block (Sections 3.2 and 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_units
        self.num_heads = config.num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.output_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor, keep: Tensor, query: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """Hidden states of all positions, or of some only.

        Parameters
        ----------
        x : Tensor
            [B, L, D].
        keep : Tensor
            [B, 1, 1, L] bool, false at padding.
        query, wanted : Tensor
            [B, M] columns whose states are wanted, and whether they really are: all work after the keys and values is
            then done for those alone.

        Returns
        -------
        Tensor
            [B, L, D], or [N, D] with `query`.
        """
        x_query = x if query is None else torch.take_along_dim(x, query[:, :, None], dim=1)  # (B, M, D)
        key, value = self.key_value(x).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(  # (B, H, M, D/H)
            self._heads(self.query(x_query)), self._heads(key), self._heads(value), attn_mask=keep
        )
        attended = attended.transpose(1, 2).flatten(2)  # (B, M, D)
        if wanted is not None:
            x_query, attended = x_query[wanted], attended[wanted]  # (N, D)
        x_query = self.attention_norm(x_query + self.dropout(self.attention_output(attended)))
        hidden: Tensor = self.output_norm(x_query + self.dropout(self.feed_forward(x_query)))
        return hidden

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, L, D/H)


class BERT4Rec(nn.Module):
    """The bidirectional transformer over item sequences.

    Positions count from the end of the sequence (0 is the last), so that padding on the left changes nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_items: int,
        catalogue: str = "",
        metadata: Metadata | dict[str, list[int]] | None = None,
        num_new_items: int = 0,
    ) -> None:
        """The network for a catalogue.

        Parameters
        ----------
        metadata : Metadata or dict
            The tables, or their shape alone where they are loaded afterwards.
        num_new_items : int
            Items, the last of the catalogue, without interactions: their id embedding is zero and stays so.
        """
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.num_new_items = num_new_items
        self.catalogue = catalogue
        self.held_out = 0  # last items of each user that training did not see; set by who trains
        self.metadata_shape = metadata.shape if isinstance(metadata, Metadata) else metadata or {}
        width = config.hidden_units
        self.items = ItemVectors(config, num_items, self.metadata_shape)
        self.register_buffer("unrankable", torch.zeros(num_items, dtype=torch.bool))
        if isinstance(metadata, Metadata):
            self.items.set_tables(metadata)
            new = torch.arange(1, num_items + 1) > num_items - num_new_items
            self.get_buffer("unrankable").copy_(new & ~self.items.have_metadata(torch.arange(1, num_items + 1)))
        self.position_embedding = nn.Embedding(config.max_len, width)
        self.dropout = Dropout(config.dropout_rate)
        self.embedding_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.output_transform = nn.Linear(width, width)
        self._fused: Tensor | None = None  # kept between calls while the weights do not change
        self.output_bias = nn.Parameter(torch.zeros(num_items))
        if not config.share_embeddings:
            self.output_embedding = nn.Parameter(torch.empty(num_items, width))
        self.apply(_initialise)
        self.items.let_item_lead()
        if not config.share_embeddings:
            nn.init.normal_(self.output_embedding, std=0.02)
        with torch.no_grad():
            self.items.embedding.weight[num_items + 1 - num_new_items : num_items + 1] = 0

    def encode(self, tokens: Tensor, query: Tensor, wanted: Tensor) -> Tensor:
        """Final hidden states at the queried positions.

        Parameters
        ----------
        tokens : Tensor
            [B, L] int64, padded on the left, at least one token a row.
        query : Tensor
            [B, M] int64 columns.
        wanted : Tensor
            [B, M] bool, which of them count.

        Returns
        -------
        Tensor
            [N, D], row after row.
        """
        length = tokens.shape[1]
        position = torch.arange(length - 1, -1, -1, device=tokens.device)
        x = self.items(tokens) + self.position_embedding(position)  # (B, L, D)
        x = self.embedding_norm(self.dropout(x))
        keep = (tokens != PADDING)[:, None, None, :]
        for block in self.blocks[:-1]:
            x = block(x, keep)
        hidden: Tensor = self.blocks[-1](x, keep, query, wanted)
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, D]: the dense layer with GELU of equation 7; its product with `output_weights` gives logits."""
        return F.gelu(self.output_transform(hidden))

    def train(self, mode: bool = True) -> Self:
        """As in torch; the output vectors are computed anew afterwards."""
        self._fused = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._fused = None  # moved to another device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def output_weights(self) -> tuple[Tensor, Tensor]:
        """Weights [V, D] and bias [V] of the output layer; special tokens have none and are never predicted."""
        if self.config.output_features == "fused":
            fused = self._fused
            if fused is None:
                fused = self.items(torch.arange(1, self.num_items + 1, device=self.output_bias.device))
                self._fused = fused if torch.is_inference_mode_enabled() else None
            # A new item without any metadata has nothing to be scored by.
            return fused, self.output_bias.masked_fill(self.get_buffer("unrankable"), -torch.inf)
        weights = self.items.embedding.weight[1:-1] if self.config.share_embeddings else self.output_embedding
        return weights, self.output_bias

    def forward(self, tokens: Tensor, query: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropy over all targets (labels [B, M], 0 for none); see `encode` for the others."""
        wanted = labels != PADDING
        weights, bias = self.output_weights()
        known = self.num_items - self.num_new_items  # an item that is never a target would only learn to be avoided
        states = self.project(self.encode(tokens, query, wanted))  # (N, D)
        return linear_cross_entropy(states, weights[:known], bias[:known], labels[wanted] - 1)

    def save_pretrained(self, directory: str) -> None:
        """Write a model directory: weights and architecture, nothing that needs Ray or pickle to be read."""
        os.makedirs(directory, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(state, os.path.join(directory, WEIGHTS))
        content: dict[str, Any] = {
            "architecture": "BERT4Rec",
            "num_items": self.num_items,
            "num_new_items": self.num_new_items,
            "held_out": self.held_out,
            "catalogue": self.catalogue,
            "model": self.config.model_dump(),
            "metadata": self.metadata_shape,
        }
        storage.write_json(storage.join(directory, CONFIG), content)

    @classmethod
    def from_pretrained(cls, directory: str) -> Self:
        """Read a model directory, in evaluation mode.

        Raises
        ------
        InputError
            If a file is missing or damaged.
        """
        content = storage.read_json(storage.join(directory, CONFIG))
        try:
            model = cls(
                ModelConfig.model_validate(content["model"]),
                content["num_items"],
                content["catalogue"],
                content["metadata"],
                content["num_new_items"],
            )
            model.held_out = content["held_out"]
            model.load_state_dict(safetensors.torch.load(storage.read_bytes(storage.join(directory, WEIGHTS))))
        except FileNotFoundError:
            raise InputError(f"{directory}: {WEIGHTS} is missing; this is no whole model directory") from None
        except (KeyError, TypeError, ValidationError, RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(f"{directory}: not a model directory of this version ({error})") from None
        return model.eval()


def _initialise(module: nn.Module) -> None:
    """Weights normal(0, 0.02) (Section 3.6 uses the truncated normal of the same width), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0
