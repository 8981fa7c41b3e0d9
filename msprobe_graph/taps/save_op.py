"""The operators behind acl_save: ``torch.ops.msprobe_graph.save(x, path)`` and ``save_effect``, for two kinds of graph.

Both read the values of `x` when they run and hand them to `files`, which writes them as the next file of `path`. They
return nothing (an operator must not return its input) and claim no mutation, so the values, their gradients and what
autograd keeps are the same with and without. How each tells compilers not to drop it makes the difference:

- ``save`` counts as a side effect. Graphs with it go into Inductor's caches; but where a graph is split into forward
  and backward, AOTAutograd's default partitioner runs it in both, or refuses it beside activation checkpointing.
- ``save_effect`` is an ordered effect, right in every partitioner; but Inductor's caches take no graph with one.

So code that autograd records calls ``save_effect``, other code ``save``.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op  # private; tested with torch 2.13
from torch.fx.node import has_side_effect

from msprobe_graph.dump.tensor_files import TensorFiles

from . import cuda_graphs
from ._inductor import keep_order
from .device import of as device_of

log = logging.getLogger("msprobe_graph")

files = TensorFiles()
"""This process's. An operator is reached by its name alone, from code that was compiled before this process began."""
os.register_at_fork(after_in_child=files.restart)
SAVING = (cuda_graphs.saves, files)
"""What has something to bring to disk, in the order in which it is to be flushed and closed."""


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
    device = device_of(x.device)
    if not device.capturing():
        files.save(path, x.numel() * x.element_size(), lambda: device.to_host(x))
    elif (save := device.save_in_graph) is not None:
        files.attempt(path, save, x, path, files)
    else:
        _say_captured(x.device)


@cache
def _say_captured(device: torch.device) -> None:
    log.error("acl_save saves nothing from inside a graph captured on %s: save outside of it, or don't capture", device)


def _check(x: torch.Tensor, path: str) -> None:
    """What a compiler runs in place of _save while it traces: the time at which errors are still the user's to see."""
    refuse(x)
    files.expect(path)
    keep_order(SAVE, SAVE_EFFECT)


def _save_batch(info: object, in_dims: tuple[int | None, None], x: torch.Tensor, path: str) -> tuple[None, None]:
    """Under torch.func.vmap: the whole batch is one file, the batch's dimension in front."""
    batch = in_dims[0]
    save = SAVE_EFFECT if torch.is_grad_enabled() else SAVE
    save(x if batch is None else x.movedim(batch, 0), path)
    return None, None


for _name in ("msprobe_graph::save", "msprobe_graph::save_effect"):
    # The tag: Inductor runs it between its CUDA graphs, not inside of them.
    torch.library.define(_name, "(Tensor x, str path) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
    torch.library.impl(_name, "CompositeExplicitAutograd", _save)
    torch.library.impl(_name, "Autograd", torch.library.fallthrough_kernel)
    torch.library.register_fake(_name, _check)
    torch.library.register_vmap(_name, _save_batch)

SAVE: torch._ops.OpOverload = torch.ops.msprobe_graph.save.default
SAVE_EFFECT: torch._ops.OpOverload = torch.ops.msprobe_graph.save_effect.default
has_side_effect(SAVE)
_register_effectful_op(SAVE_EFFECT, _EffectType.ORDERED)
