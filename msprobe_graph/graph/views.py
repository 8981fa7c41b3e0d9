"""Which values of dynamo's graph are others in another shape, so that one reading of memory serves both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ._compat import example_value, memory
from .plan import value_id
from .writes import Writes

_VIEWS = frozenset(
    [
        "contiguous",
        "flatten",
        "movedim",
        "permute",
        "reshape",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "to",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    ]
)


def whole_views(nodes: Sequence[fx.Node], writes: Writes) -> dict[int, int]:
    """By the id of a value that is a view of another one with all its elements: the id of that one.

    nodes: all of the graph, by index; writes: what they write. The value of a chain of views is that of its first one.
    """
    index = {node: number for number, node in enumerate(nodes)}
    inner = [node for node in nodes if node.op not in ("placeholder", "output")]
    found: dict[int, int] = {}
    for position, node in enumerate(inner):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        viewed = node.args[0] if name in _VIEWS and node.args else None
        if not isinstance(viewed, fx.Node) or not _same_elements(example_value(node), example_value(viewed)):
            continue
        source = writes.value_at(viewed, position)
        if source is not None and source in index:
            base = value_id(index[source])
            found[value_id(index[node])] = found.get(base, base)
    return found


def _same_elements(one: object, other: object) -> bool:
    """Whether two fake tensors are the same memory, all of it."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dtype != other.dtype:
        return False
    if memory(one) is None or memory(one) != memory(other) or any(map(_is_dynamic, (one, other))):
        return False
    return (
        one.numel() == other.numel()
        and one.storage_offset() == other.storage_offset()
        and _is_dense(one)
        and _is_dense(other)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether each element has its own place, with none between them."""
    room = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != room:
                return False
            room *= size
    return True


def _is_dynamic(tensor: torch.Tensor) -> bool:
    """Whether to ask for its size would put a guard on it."""
    return any(type(number) is not int for number in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))
