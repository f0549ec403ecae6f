"""Exports the scoring function with `torch.export` or as ONNX, as a program that does not need this package.

Shapes: B users, L tokens, D hidden_units, H heads, V items, K top-k.
"""

import contextlib
import csv
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert4rec import storage
from bert4rec.data.dataset import PADDING, ItemTable
from bert4rec.errors import InputError
from bert4rec.inference.ranking import NO_RULES, Ranking
from bert4rec.inference.rules import Rules
from bert4rec.inference.selection import Selection, list_of
from bert4rec.model.network import BERT4Rec
from bert4rec.model.times import phases

TORCH = "model.pt2"
ONNX = "model.onnx"
CATALOGUE = "items.csv"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_ONNX = 2**31 - 2**20  # size limit of an ONNX file; larger weights go into a second file


class ScoringFunction(nn.Module):
    """Scores the next item of each history, by plain operations on the weights of a `BERT4Rec`.

    The vectors of items, fused with their metadata, are computed once; the function then looks them up.

    Parameters
    ----------
    topk
        Return only this many best items, instead of the scores of all items.
    ranking
        The ranking rules. The program ignores exclude_future, because it knows no years. It uses exclude_seen, and all
        rules of a `Selection`, only with `topk`.
    items
        The catalogue, if a rule looks at it.

    Raises
    ------
    InputError
        If a rule has a list for each user, of whom a program knows nothing, or there is a blend.
    """

    def __init__(
        self,
        model: BERT4Rec,
        topk: int | None = None,
        ranking: Ranking = NO_RULES,
        items: ItemTable | None = None,
    ) -> None:
        super().__init__()
        refuse_blend(ranking, "a program has the network alone")
        for given in ranking.item_lists:
            if not given.is_for_all:
                raise InputError(
                    f"{given.source}: has a list for each user, and a program knows no users; export without "
                    f"{given.key}, or with a list for all"
                )
        self.num_heads, self.max_len = model.config.num_heads, model.config.max_len
        self.mask_token = model.num_items + 1
        self.is_causal = model.config.attention == "causal"
        self.topk, self.exclude_seen = topk, ranking.exclude_seen
        with torch.no_grad():
            every = torch.arange(model.num_items + 2, device=model.output_bias.device)
            vectors = model.items(every).clone()
            weights, bias = (tensor.detach() for tensor in ranking.output_weights(model))
        self.selection: Selection | None = None
        if items is not None:
            rules = Rules(ranking, items, bias.device)
            self.selection = rules.selection
            bias = bias if rules.forbidden is None else bias.masked_fill(rules.forbidden, -torch.inf)
            if self.selection.values is not None:
                self.register_buffer("feature_values", self.selection.values)
                self.register_buffer("caps", self.selection.caps)
        self.register_buffer("vectors", vectors)  # [V+2, D]
        self.register_buffer("bias", bias.clone())  # [V]
        self.is_tied = torch.equal(weights, vectors[1:-1])
        if not self.is_tied:
            self.register_buffer("weights", weights.clone())  # [V, D]
        self.position_embedding = model.position_embedding
        self.is_rotary = model.is_rotary
        if self.is_rotary:  # [max_len, D/H] cosines and sines, because ONNX has no complex numbers
            turns = model.get_buffer("turns")
            self.register_buffer("turns", torch.cat([turns.real, turns.imag], dim=1))
        self.times = model.times
        self.head_width = model.config.hidden_units // model.config.num_heads
        self.embedding_norm = model.embedding_norm
        self.blocks = model.blocks
        self.output_transform = model.output_transform

    def forward(
        self, history: Tensor, times: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the scores of all items, or the best items.

        Parameters
        ----------
        history : Tensor
            [B, L] int64 tokens, the latest last, padded with 0 on the left. Only the last max_len-1 count.
        times, at : Tensor
            [B, L] int64 Unix seconds of each token, any at padding, and [B] those at which the next item is asked for.
            Only a model with model.time_encoding takes them, and it needs both.

        Returns
        -------
        Tensor or tuple
            [B, V] float32, column j for token j+1; or [B, K] scores, falling (-inf where fewer than K items remain),
            and [B, K] int64 tokens.

        Raises
        ------
        InputError
            If the model reads times and gets none.
        """
        if self.times is not None and (times is None or at is None):
            raise InputError("this program reads times (model.time_encoding); expected history, times and at")
        if self.is_causal:  # [MASK], then the items that count
            tokens = torch.cat([torch.zeros_like(history[:, :1]), history], dim=1)
            count = (history != PADDING).sum(1, keepdim=True).clamp(max=self.max_len - 1)
            tokens = tokens.scatter(1, history.shape[1] - count, self.mask_token)
        else:
            tokens = torch.cat([history, torch.full_like(history[:, :1], self.mask_token)], dim=1)
        from_end = torch.arange(tokens.shape[1], device=tokens.device).flip(0)
        # Mask items that are too old instead of cutting them off, so that one program serves any length.
        keep = ((tokens != PADDING) & (from_end < self.max_len))[:, None, None, :]  # (B, 1, 1, L+1)
        position = from_end.clamp(max=self.max_len - 1)
        x = F.embedding(tokens, self.get_buffer("vectors")) + self.position_embedding(position)  # (B, L+1, D)
        by_place = F.embedding(position, self.get_buffer("turns")) if self.is_rotary else None  # (L+1, D/H)
        turns, moments, item_times = (by_place, by_place), None, None
        if self.times is not None and times is not None and at is not None:
            moments = torch.cat([times, at[:, None]], dim=1)  # (B, L+1)
            is_first = torch.cat([torch.ones_like(keep[:, 0, 0, :1]), ~keep[:, 0, 0, :-1]], dim=1)
            before = torch.cat([moments[:, :1], moments[:, :-1]], dim=1)
            embedded = self.times.embedded(moments, (moments - before).clamp(min=0).masked_fill(is_first, -1))
            x = x if embedded is None else x + embedded
            item_times = torch.where(is_first, moments, before) if self.is_causal else moments
            turns = self._turns_by_time(by_place, moments), self._turns_by_time(by_place, item_times)
        x = self.embedding_norm(x)
        for number, block in enumerate(self.blocks):
            is_last = number == len(self.blocks) - 1
            query, mask = x[:, -1:] if is_last else x, keep
            if self.is_causal and not is_last:  # a place sees itself too, since the softmax of nothing is no number
                mask = (keep & (from_end > from_end[:, None])) | (from_end == from_end[:, None])
            if self.times is not None and self.times.bias is not None:
                assert moments is not None
                assert item_times is not None
                bias = self.times.attention_bias(number, moments[:, -query.shape[1] :], item_times)
                mask = bias.masked_fill(~mask, -torch.inf)
            x = self._block(block, x, query, mask, turns)
        state = x[:, -1]  # (B, D)
        if self.output_transform is not None:
            state = F.gelu(self.output_transform(state))
        if self.is_tied:
            scores = F.linear(state, self.get_buffer("vectors"))[:, 1:-1]
        else:
            scores = F.linear(state, self.get_buffer("weights"))
        scores = scores + self.get_buffer("bias")
        if self.topk is None:
            return scores
        if self.exclude_seen:
            seen = torch.zeros(scores.shape[0], self.mask_token, dtype=torch.bool, device=scores.device)
            seen = seen.scatter(1, history, torch.ones_like(history, dtype=torch.bool))  # column 0 is padding's
            scores = scores.masked_fill(seen[:, 1:], -torch.inf)
        if self.selection is None:
            best = scores.topk(self.topk, dim=1)
            return best.values, best.indices + 1
        selection = self.selection
        if selection.values is not None:
            selection = replace(selection, values=self.get_buffer("feature_values"), caps=self.get_buffer("caps"))
        # With caps, a list may have to look at every item.
        num_items = scores.shape[1]
        depth = (
            num_items if selection.values is not None else min(max(self.topk, selection.depth(self.topk)), num_items)
        )
        best = scores.topk(depth, dim=1)
        values, chosen = list_of(
            best.values,
            best.indices,
            scores.logsumexp(1),
            self.topk,
            selection,
            lambda items: F.normalize(F.embedding(items + 1, self.get_buffer("vectors")), dim=-1),
        )
        return values, chosen + 1

    def _turns_by_time(self, by_place: Tensor | None, times: Tensor) -> Tensor | None:
        """[L, D/H], or by times [B, L] [B, 1, L, D/H], cosines and sines: `BERT4Rec._turns`."""
        assert self.times is not None
        if not self.times.turns_by_time:
            return by_place
        angles = phases(times, self.times.get_buffer("periods"))[:, None]  # (B, 1, L, W/4)
        rest = self.head_width // 2 - angles.shape[-1]
        if by_place is None:
            cos, sin = torch.ones_like(angles[..., :1]), torch.zeros_like(angles[..., :1])
        else:
            cos, sin = (part[None, None, :, :rest] for part in by_place.chunk(2, dim=-1))
        shape = (*angles.shape[:-1], rest)
        parts = (cos.expand(shape), torch.cos(angles), sin.expand(shape), torch.sin(angles))
        return torch.cat(parts, dim=-1)

    def _block(
        self, block: nn.Module, x: Tensor, query: Tensor, keep: Tensor, turns: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        """Post-norm transformer block: hidden states of the positions in `query`, which attend to `x`; `turns` of
        queries and of keys."""
        layer = dict(block.named_children())
        key, value = layer["key_value"](x).chunk(2, dim=-1)
        q, k, v = self._heads(layer["query"](query)), self._heads(key), self._heads(value)
        of_queries, of_keys = turns
        if of_queries is not None and of_keys is not None:
            q, k = _turned(q, of_queries[..., -q.shape[2] :, :]), _turned(k, of_keys)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        attended = attended.transpose(1, 2).flatten(2)
        hidden = layer["attention_norm"](query + layer["attention_output"](attended))
        output: Tensor = layer["output_norm"](hidden + layer["feed_forward"](hidden))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, L, D/H)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """`network.turned` in real numbers: rotate [B, H, L, D/H] by cosines and sines [L, D/H] or [B, 1, L, D/H]."""
    (a, b), (cos, sin) = (x[..., ::2], x[..., 1::2]), turns.chunk(2, dim=-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def refuse_blend(ranking: Ranking, why: str) -> None:
    """Say that an export cannot have a blend."""
    if ranking.blend is not None:
        raise InputError(f"inference.blend: {why}; export without it (inference.blend={{}})")


def export_program(function: ScoringFunction) -> torch.export.ExportedProgram:
    """Export the function for any number of users and any length of history."""
    example = torch.ones(2, 3, dtype=torch.int64, device=function.get_buffer("bias").device)
    # Copies, because the export takes inputs that share memory for one.
    inputs = (example,) if function.times is None else (example, example.clone(), example[:, 0].clone())
    return torch.export.export(function.eval(), inputs, dynamic_shapes=_any_shape(len(inputs)))


def _any_shape(num_inputs: int) -> dict[str, dict[int, torch.export.Dim]]:
    users, length = torch.export.Dim("users", min=1), torch.export.Dim("length", min=1)
    shapes = {"history": {0: users, 1: length}, "times": {0: users, 1: length}, "at": {0: users}}
    return dict(list(shapes.items())[:num_inputs])


def write_torch(program: torch.export.ExportedProgram, directory: str) -> str:
    """Write `model.pt2`, for `torch.export.load`, and return its path."""
    content = io.BytesIO()
    torch.export.save(program, content)
    path = storage.join(directory, TORCH)
    storage.write_bytes(path, content.getvalue())
    return path


def write_onnx(program: torch.export.ExportedProgram, directory: str) -> str:
    """Write `model.onnx`, and `model.onnx.data` if the weights take more than 2 GB. Return the path of the first.

    Raises
    ------
    InputError
        If the extra `export` is not installed.
    """
    check_onnx()
    scores = ["scores"] if len(program.graph_signature.user_outputs) == 1 else ["scores", "items"]
    shapes = _any_shape(len(program.graph_signature.user_inputs))
    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    with tempfile.TemporaryDirectory() as local, _quiet():
        torch.onnx.export(
            program,
            (),
            os.path.join(local, ONNX),
            input_names=list(shapes),
            output_names=scores,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=num_bytes > _LARGEST_ONNX,
            verbose=False,
        )
        for file in Path(local).iterdir():
            storage.write_bytes(storage.join(directory, file.name), file.read_bytes())
    return storage.join(directory, ONNX)


def write_catalogue(items: ItemTable, directory: str) -> str:
    """Write `items.csv` with token, item, title and year of each item, in token order. Return its path."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["token", "item", "title", "year"])
    years = [int(year) if known else "" for year, known in zip(items.year, items.has_year, strict=True)]
    rows.writerows(zip(range(1, len(years) + 1), items.ids.to_pylist(), items.title.to_pylist(), years, strict=True))
    path = storage.join(directory, CATALOGUE)
    storage.write_bytes(path, text.getvalue().encode())
    return path


def check_onnx() -> None:
    """Check before any work that the packages for ONNX are installed.

    Raises
    ------
    InputError
        If a package of the extra `export` is missing.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"export.formats: onnx needs {', '.join(missing)}; pip install 'bert4rec-ray[export]', "
            "or leave it out with export.formats=[torch]"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages and warnings that torch's exporter prints about itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
