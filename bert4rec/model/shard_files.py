"""Tensors whose rows lie in several safetensors files, one a shard: a process reads the rows that it keeps.

A file of shard r of W holds the rows r, r + W, r + 2 W and so on of the tensor NAME under the name `NAME[r::W]`, and
whole tensors under their own names.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bert4rec import storage
from bert4rec.errors import InputError

_ROWS_AT_ONCE = 65_536
_ROWS_OF = re.compile(r"(.+)\[(\d+)::(\d+)\]")


class PartFile(TypedDict):
    """What an index says of a file."""

    sha256: str
    bytes: int
    tensors: list[str]


def file_of(stem: str, rank: int, num_shards: int) -> str:
    """Name of a shard's file, as the hub's large models have it."""
    return f"{stem}-{rank + 1:05}-of-{num_shards:05}.safetensors"


def write_part(path: str, tensors: Mapping[str, Tensor], starts: Mapping[str, int], num_shards: int) -> PartFile:
    """Write a local file, straight from the memory of the tensors.

    Parameters
    ----------
    starts : mapping
        Of the tensors that are rows of a larger one: the place of the first row there.
    """
    named = {
        f"{name}[{starts[name]}::{num_shards}]" if name in starts else name: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(named, path)
    return {"sha256": storage.sha256(path), "bytes": os.path.getsize(path), "tensors": sorted(named)}


def read_parts(
    directory: str,
    files: Mapping[str, PartFile],
    into: Mapping[str, Tensor],
    starts: Mapping[str, int],
    num_shards: int = 1,
) -> None:
    """Fill the tensors `into`, in place, from those files that have something of them.

    Parameters
    ----------
    starts : mapping
        Of the tensors that keep rows of a larger one, every num_shards-th: the place of the first. All others are
        whole, wherever their rows lie.

    Raises
    ------
    InputError
        If a file is missing or damaged, or rows or tensors are in none of them.
    """
    filled = dict.fromkeys(into, 0)
    for file, entry in files.items():
        path = storage.inside(directory, file)
        wanted = []
        for stored in entry["tensors"]:
            split = _ROWS_OF.fullmatch(stored)
            name, start, step = (split[1], int(split[2]), int(split[3])) if split else (stored, 0, 1)
            own = num_shards if name in starts else 1
            if name in into and (start - starts.get(name, 0)) % math.gcd(step, own) == 0:
                wanted.append((stored, name, start, step, own))
        if not wanted:
            continue
        _check(path, entry, len(files))
        with storage.on_local_disk(path) as local:
            for stored, name, start, step, own in wanted:
                filled[name] += _copy_rows(local, stored, into[name], start, step, starts.get(name, 0), own)
    for name, tensor in into.items():
        if filled[name] != (expected := len(tensor) if tensor.ndim else 1):
            raise InputError(f"{directory}: its {len(files)} files have {filled[name]} of {expected} rows of {name}")


def _copy_rows(file: str, stored: str, target: Tensor, start: int, step: int, first: int, own: int) -> int:
    """Copy those rows start, start + step... of the whole that are first, first + own...; how many."""
    with safetensors.safe_open(file, framework="pt") as opened:
        shape = opened.get_slice(stored).get_shape()
        if not shape:
            target.copy_(opened.get_tensor(stored))
            return 1
    copied = 0
    for low in range(0, shape[0], _ROWS_AT_ONCE):
        # Mapped anew for each block: else all pages that were read would count as memory of this process.
        with safetensors.safe_open(file, framework="pt") as opened:
            block = opened.get_slice(stored)[low : low + _ROWS_AT_ONCE]
        place = start - first + step * torch.arange(low, low + len(block))
        kept = place % own == 0
        target[(place[kept] // own).to(target.device)] = block[kept].to(target.device, target.dtype)
        copied += int(kept.sum())
    return copied


def _check(path: str, entry: PartFile, num_files: int) -> None:
    try:
        found = storage.sha256(path)
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; the checkpoint is in {num_files} files") from None
    check_sha256(path, found, entry["sha256"])


def check_sha256(path: str, found: str, written: str) -> None:
    """Compare the hash that a file has with that of what was written.

    Raises
    ------
    InputError
        If they differ.
    """
    if found != written:
        raise InputError(f"{path}: its content is not what was written (SHA-256); the file is damaged or was altered")
