"""The operator behind acl_save: ``torch.ops.msprobe_graph.save(x, path)``.

It reads the values of `x` when it runs and hands them to `files`, which writes them as the next file of `path`. It
returns nothing (an operator must not return its input) and claims no mutation, so the values, their gradients and what
autograd keeps are the same with it and without. It counts as a side effect, so no compiler pass drops it. (Registered as
an ordered effect it would keep graphs out of Inductor's caches, and its calls would still change places.)
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch.fx.node import has_side_effect

from msprobe_graph.dump.tensor_files import Host, TensorFiles

from ._inductor import keep_order

log = logging.getLogger("msprobe_graph")

files = TensorFiles()
"""This process's. An operator is reached by its name alone, from code that was compiled before this process began."""
os.register_at_fork(after_in_child=files.restart)


def refuse(x: torch.Tensor) -> None:
    """Raise TypeError, one sentence, when the values of `x` can't be saved."""
    if x.is_nested:
        kind = "a nested one: save its parts"
    elif x.layout is not torch.strided:
        kind = f"a sparse one ({x.layout}): save x.to_dense(), or its indices and values"
    elif x.is_quantized:
        kind = "a quantized one: save x.int_repr() or x.dequantize()"
    elif x.device.type == "meta":
        kind = "one on the meta device, which has no values"
    elif hasattr(x, "__tensor_flatten__"):
        kind = f"a {type(x).__name__}, which is made of others: save those, such as x.to_local() of a DTensor"
    else:
        return
    raise TypeError(f"acl_save takes a dense tensor, not {kind}")


def _save(x: torch.Tensor, path: str) -> None:
    if _capturing(x.device):
        _say_captured(x.device)
    else:
        files.save(path, x.numel() * x.element_size(), lambda: _to_host(x))


def _to_host(x: torch.Tensor) -> Host:
    """A contiguous copy that holds nothing but the values of `x`, as they are at this point of its stream."""
    with torch.no_grad():
        if x.device.type == "cpu":
            return torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(x), _arrived
        copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        copy.copy_(x, non_blocking=True)
    event = torch.Event(x.device)
    event.record(torch.accelerator.current_stream(x.device))
    return copy, event.synchronize


def _arrived() -> None:
    """Values in host memory need no waiting for."""


def _capturing(device: torch.device) -> bool:
    """Whether what runs now on `device` is only recorded, into a CUDA graph or its like."""
    if device.type == "cpu":
        return False
    module = torch.get_device_module(device)
    return hasattr(module, "is_current_stream_capturing") and bool(module.is_current_stream_capturing())


@cache
def _say_captured(device: torch.device) -> None:
    log.error("acl_save saves nothing from inside a graph captured on %s: save outside of it, or don't capture", device)


def _check(x: torch.Tensor, path: str) -> None:
    """What a compiler runs in place of _save while it traces: the time at which errors are still the user's to see."""
    refuse(x)
    files.expect(path)
    keep_order(SAVE)


def _save_batch(info: object, in_dims: tuple[int | None, None], x: torch.Tensor, path: str) -> tuple[None, None]:
    """Under torch.func.vmap: the whole batch is one file, the batch's dimension in front."""
    batch = in_dims[0]
    SAVE(x if batch is None else x.movedim(batch, 0), path)
    return None, None


_NAME = "msprobe_graph::save"
# The tag: Inductor runs it between its CUDA graphs, not inside of them.
torch.library.define(_NAME, "(Tensor x, str path) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
torch.library.impl(_NAME, "CompositeExplicitAutograd", _save)
torch.library.impl(_NAME, "Autograd", torch.library.fallthrough_kernel)
torch.library.register_fake(_NAME, _check)
torch.library.register_vmap(_NAME, _save_batch)
SAVE: torch._ops.OpOverload = torch.ops.msprobe_graph.save.default
has_side_effect(SAVE)
