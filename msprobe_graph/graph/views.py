"""Which values of dynamo's graph are others in another shape, or parts of others: they can be had from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ._compat import example_value
from .elements import part_of, same_elements
from .plan import Part, value_id
from .writes import Writes, Written

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
        if not isinstance(viewed, fx.Node) or not same_elements(example_value(node), example_value(viewed)):
            continue
        base = _id_at(viewed, position, index, writes)
        if base is not None:
            found[value_id(index[node])] = found.get(base, base)
    return found


def parts(nodes: Sequence[fx.Node], writes: Writes) -> dict[int, list[Part]]:
    """By the id of a value: the values that are parts of it, as slicing, narrow, split and chunk give them.

    nodes, writes: as for `whole_views`.
    """
    index = {node: number for number, node in enumerate(nodes)}
    inner = [node for node in nodes if node.op not in ("placeholder", "output")]
    found: dict[int, list[Part]] = {}
    for position, node in enumerate(inner):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(example_value(node), torch.Tensor):
            continue
        if not isinstance(example_value(source), torch.Tensor):  # an item of what split gives
            source = source.args[0] if source.args else None
        place = part_of(example_value(node), example_value(source)) if isinstance(source, fx.Node) else None
        if place is not None and isinstance(source, fx.Node):
            base = _id_at(source, position, index, writes)
            if base is not None:
                found.setdefault(base, []).append(Part(value_id(index[node]), *place))
    return found


def _id_at(node: fx.Node, position: int, index: Mapping[fx.Node, int], writes: Writes) -> int | None:
    """The id of the value that the tensor of `node` has right before `position`, if it has it in that shape."""
    source = writes.value_at(node, position)
    if isinstance(source, Written):
        return None if source.reshaped else value_id(index[source.writer], source.nth)
    return value_id(index[source]) if source is not None and source in index else None
