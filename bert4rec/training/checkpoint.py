"""A checkpoint: a model directory, and the state to resume from. Where the item table is in shards, so is the state."""

import os
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor

from bert4rec import storage
from bert4rec.errors import InputError
from bert4rec.model.item_vectors import PROJECTED
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shard_files import file_of, read_parts, write_part
from bert4rec.model.shards import from_all

STATE = "training_state.pt"
STATE_HASH = "training_state.sha256"  # as sha256sum writes and checks it
SHARDS = "training_state"  # the files of a state in shards begin with it


def write_checkpoint(
    model: BERT4Rec,
    state: dict[str, Any],
    optimizers: list[torch.optim.Optimizer],
    scaler: Any,  # noqa: ANN401
    rank: int = 0,
) -> str | None:
    """The new local directory of a checkpoint, or None of a worker that writes none.

    Where the item table is in shards, every worker writes a part of the directory; otherwise the first writes it.
    """
    if rank > 0 and model.shards is None:
        return None
    directory = tempfile.mkdtemp(prefix="checkpoint-")
    try:
        model.save_pretrained(directory)
        states = [optimizer.state_dict() for optimizer in optimizers]
        if model.shards is not None:
            state = {**state, "shards": _write_shard(model, states, directory)}
        if rank == 0:
            path = storage.join(directory, STATE)
            torch.save({**state, "optimizers": states, "scaler": scaler.state_dict()}, path)
            storage.write_bytes(storage.join(directory, STATE_HASH), f"{storage.sha256(path)}  {STATE}\n".encode())
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def load_checkpoint(directory: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and the state to resume from.

    Raises
    ------
    InputError
        If it is missing, damaged, altered, or of an older version.
    """
    state = _load_state(directory)
    weights = BERT4Rec.from_pretrained(directory).state_dict()
    return {name: tensor for name, tensor in weights.items() if name not in PROJECTED}, state


def load_shard(directory: str, model: BERT4Rec) -> dict[str, Any]:
    """Fill a model whose item table is in shards from a checkpoint of any number of them; the state to resume from.

    Raises
    ------
    InputError
        If a file is missing, damaged or altered.
    """
    assert model.shards is not None
    state = _load_state(directory)
    model.read_shard(directory)
    shard, saved = model.shards.shard, state.pop("shards")
    own = dict(zip(shard.starts, (model.shards.table, model.shards.bias), strict=True))
    into = {
        name: torch.empty(len(own[parameter]), *size, dtype=getattr(torch, dtype))
        for name, (parameter, size, dtype) in saved["tensors"].items()
    }
    starts = {name: shard.starts[parameter] for name, (parameter, _, _) in saved["tensors"].items()}
    read_parts(directory, saved["files"], into, starts, shard.world_size)
    of_shard = state["optimizers"][-1]["state"]
    for name, tensor in into.items():
        number, _, key = name.partition(".")
        of_shard[int(number)][key] = tensor
    return state


def _write_shard(model: BERT4Rec, states: list[dict[str, Any]], directory: str) -> dict[str, Any]:
    """Write what the last optimiser, that of the shards, keeps of each row, and take it out of `states`; say where."""
    assert model.shards is not None
    shard = model.shards.shard
    rows, starts, described = {}, {}, {}
    kept: dict[int, dict[str, Any]] = {}
    for number, (parameter, start) in enumerate(shard.starts.items()):  # the order of the optimiser's parameters
        kept[number] = {}
        for key, value in states[-1]["state"][number].items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                kept[number][key] = value
                continue
            name = f"{number}.{key}"
            rows[name], starts[name] = value, start
            described[name] = (parameter, list(value.shape[1:]), str(value.dtype).removeprefix("torch."))
    states[-1] = {**states[-1], "state": kept}
    file = file_of(SHARDS, shard.rank, shard.world_size)
    written = write_part(os.path.join(directory, file), rows, starts, shard.world_size)
    return {"files": dict(from_all((file, written))), "tensors": described}


def _load_state(directory: str) -> dict[str, Any]:
    path = storage.join(directory, STATE)
    try:
        is_whole = storage.read_bytes(storage.join(directory, STATE_HASH)).decode().split()[0] == storage.sha256(path)
    except (FileNotFoundError, UnicodeDecodeError, IndexError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{path}: is missing, damaged or was altered (SHA-256 in {STATE_HASH})")
    state: dict[str, Any] = torch.load(os.path.join(directory, STATE), map_location="cpu", weights_only=True)
    if "optimizers" not in state:
        raise InputError(f"{path}: was written by an older version; train anew with another run.name")
    return state
