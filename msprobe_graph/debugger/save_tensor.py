"""acl_save: one tensor of a model, saved where it is computed, in eager and in compiled code."""

from __future__ import annotations

import os

import torch

from msprobe_graph.taps.save_op import SAVING, files, refuse

from . import sessions

for _each in SAVING:
    sessions.register(_each, "acl_save")


def save_tensor(x: torch.Tensor, path: str | os.PathLike[str]) -> torch.Tensor:
    """Save the values that `x` has now, and return `x` itself.

    ::

        def forward(self, x):
            x = acl_save(self.norm(x), f"dump/norm.{self.layer}.pt")   # dump/norm.3_0.pt, dump/norm.3_1.pt, ...

    x: a dense tensor of any dtype, shape and strides, which may require grad; its gradient is not touched. The file
        holds a contiguous CPU tensor with its values, and ``torch.load(file, weights_only=True)`` reads it.
    path: with ``.pt`` or without; each call writes the next file of that path, counted from 0 in each process. Folders
        are made. Several processes need several paths: ``f"rank{torch.distributed.get_rank()}/x.pt"``.

    Works in eager code and, with no graph break, in torch.compile under any inner backend; what is exported keeps it.
    The values are copied before this returns; files are written in the background, are there after
    msprobe_graph.flush() and at the exit, and when they take too long to write calls wait. Calls on one path are
    numbered in the order of the program. In a CUDA graph that is being captured this saves at each replay, and the
    stream of the replay waits in its place. Under activation checkpointing what is computed again in the backward is
    saved again, with the next numbers, in eager code and under backend="eager"; other backends save once. Under
    torch.func.vmap the whole batch is one file, the batch's dimension in front. Compiled code has to put a saved value
    into memory, which can move where Inductor fuses, and in bf16 thus where it rounds.

    Raises TypeError for a tensor that is sparse, nested, on the meta device or made of others, and OSError or
    ValueError for a path that can't be written: at the first eager call, or when the code is compiled (torch.compile
    wraps them in its own error). Once running nothing is raised: what can't be saved is logged.
    """
    name = os.fspath(path)
    if not torch.compiler.is_compiling():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"acl_save takes a tensor, not {type(x).__name__}")
        refuse(x)
        files.expect(name)
    if torch.is_grad_enabled():
        torch.ops.msprobe_graph.save_effect(x, name)
    else:
        torch.ops.msprobe_graph.save(x, name)
    return x


acl_save = save_tensor
"""save_tensor by the name that msProbe's users know."""
