"""Which values of dynamo's graph are others in another shape, so that one reading of memory serves both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ._compat import example_value
from .elements import same_elements
from .plan import value_id
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
        source = writes.value_at(viewed, position)
        if isinstance(source, Written) and not source.reshaped:
            base = value_id(index[source.writer], source.nth)
        elif isinstance(source, fx.Node) and source in index:
            base = value_id(index[source])
        else:
            continue
        found[value_id(index[node])] = found.get(base, base)
    return found
