"""A device other than the CPU, without one: an operation that mixes it with the CPU raises, and waits are counted.

`OnDevice` wraps a CPU tensor, says that it lies on the device "meta" (which every build of torch has), and computes on
the CPU. `stand_in_device` patches what torch has for accelerators alone.
"""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bert4rec.model import batches
from bert4rec.training import loop

DEVICE = torch.device("meta")
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
COPIES = {"aten::copy_", "aten::_to_copy"}
SIZE_DEPENDS_ON_DATA = {
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::masked_select",
    "aten::bincount",
    "aten::equal",
    "aten::_local_scalar_dense",  # item(), and a tensor as a condition
}


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, elem):
        own = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=DEVICE,
            requires_grad=False,
        )
        own.elem = elem
        return own

    def __repr__(self):
        return f"OnDevice({self.elem})"

    def tolist(self):
        """As of a real device: it waits."""
        _waits["tolist"] += 1
        return self.elem.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes factories with device=DEVICE, and moves to it, give `OnDevice`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_waits = Counter()


def _run(func, args, kwargs):
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    there = [x for x in tensors if not isinstance(x, OnDevice)]
    if here and there and name not in COPIES:
        if name in INDEXING:
            if not isinstance(args[0], OnDevice):
                raise RuntimeError(f"{name}: a CPU tensor indexed by one of the device")
            _waits["index from the CPU"] += 1
        elif wrong := [tuple(x.shape) for x in there if x.dim()]:  # a scalar of the CPU may go with any device
            shapes = [tuple(x.shape) for x in here]
            raise RuntimeError(f"{name}: tensors of two devices, {shapes} here and {wrong} on the CPU")
    inner_args, inner = tree_map(_unwrapped, args), tree_map(_unwrapped, kwargs)
    device = inner.get("device")
    to_device = bool(here) if device is None else torch.device(device).type == DEVICE.type
    _count(name, args, kwargs, here, there, to_device)
    if name == "aten::copy_":
        func(*inner_args, **inner)
        return args[0]
    if device is not None and to_device:
        inner["device"] = torch.device("cpu")
    if "pin_memory" in inner:
        inner["pin_memory"] = False
    out = func(*inner_args, **inner)
    for x in here:
        if out is x.elem:  # in place
            return x
    return tree_map(_wrapped, out) if to_device else out


def _wrapped(x):
    # Below a dispatch mode nobody looks at the bit of a lazy conjugate, which rotary positions need backwards.
    return OnDevice(x.resolve_conj()) if type(x) is torch.Tensor else x


def _count(name, args, kwargs, here, there, to_device):
    """Count an operation that makes the host wait for the device."""
    if name == "aten::copy_":
        if isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            _waits["copy to the device" if isinstance(args[0], OnDevice) else "copy to the CPU"] += 1
    elif name == "aten::_to_copy":
        if here and not to_device:
            _waits["copy to the CPU"] += 1
        elif there and to_device and not kwargs.get("non_blocking"):
            _waits["copy to the device"] += 1
    elif not here:
        return
    elif name in SIZE_DEPENDS_ON_DATA or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        _waits[name] += 1
    elif name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None):
        _waits["index by a mask"] += 1


def _unwrapped(x):
    return x.elem if isinstance(x, OnDevice) else x


def moved(model):
    """The model, with its parameters and buffers on the device."""
    model._fused = None
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = torch.nn.Parameter(OnDevice(parameter.detach().clone()), parameter.requires_grad)
                module._parameters[name] = own
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer.clone())
    return model


@contextlib.contextmanager
def stand_in_device():
    """Yield a `Counter` of what made the host wait for the device. The caller may clear it."""
    autocast, tensor = torch.autocast, torch.tensor

    def plain(kind):
        return lambda groups, lr, fused: kind(groups, lr=lr, fused=False, foreach=False)

    def made(data, *, device=None, **options):
        own = tensor(data, **options)
        if device is None or torch.device(device).type != DEVICE.type:
            return own
        _waits["copy to the device"] += 1
        return OnDevice(own)

    # Tensors made under inference_mode have no version counter, which wrappers need.
    inference = []

    def enter(self):
        inference.append(torch.no_grad())
        inference[-1].__enter__()

    def leave(self, *error):
        inference.pop().__exit__(*error)

    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr(torch.inference_mode, "__enter__", enter)
        patch.setattr(torch.inference_mode, "__exit__", leave)
        patch.setattr(torch, "is_inference_mode_enabled", lambda: bool(inference))
        patch.setattr(
            torch,
            "autocast",
            lambda kind, **options: contextlib.nullcontext() if kind == "meta" else autocast(kind, **options),
        )
        patch.setattr(torch.optim, "AdamW", plain(torch.optim.AdamW))
        patch.setattr(torch.optim, "Adam", plain(torch.optim.Adam))
        patch.setattr(torch, "tensor", made)
        patch.setitem(loop.PASS_TOKENS, "meta", loop.PASS_TOKENS["cuda"])
        patch.setitem(batches.GROUP_TOKENS, "meta", batches.GROUP_TOKENS["cuda"])
        _waits.clear()
        yield _waits
