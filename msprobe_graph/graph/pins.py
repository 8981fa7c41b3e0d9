"""Keeping sight of values while Inductor rewrites an aten graph.

A rewriting pattern leaves parts behind of what a call was decomposed into (the transposed weight, once a matrix product
and an addition have become one), and hands a node's stamp on to the node that takes its place. So in a rewritten graph
the stamps no longer tell a call's result from what led to it. Therefore values are found in the graph as AOTAutograd
has made it, and pinned: a pin says that a node has that very value, and is handed on with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx

from .stamps import Found, Wanted, find, find_gradients, fits, originals
from .tap_op import TAP

KEY = "msprobe_graph_pins"
"""Below this name a node has two tuples of ids in ``node.meta["custom"]``: of the values that it is, and of those that
equal it, because one is a copy of the other, or both of a third one."""

Bearers = dict[int, list[fx.Node]]
"""Nodes by the ids on their pins."""


def pin(graph: fx.Graph, wanted: Mapping[int, Wanted]) -> None:
    """Pin the wanted values and gradients, as far as they are sure, in a graph that was not rewritten yet: of a forward
    pass, of a backward pass, or of both."""
    original = originals(graph)
    own: dict[fx.Node, list[int]] = defaultdict(list)
    equal: dict[fx.Node, list[int]] = defaultdict(list)
    for id, place in (find(graph, wanted) | find_gradients(graph, wanted)).items():
        if wanted[id].written is None or id % 2:
            own[place.node].append(id)
            equal[original.get(place.node, place.node)].append(id)
    for node in graph.nodes:
        pins = (tuple(own.get(node, ())), tuple(equal.get(original.get(node, node), ())))
        if "custom" in node.meta or any(pins):
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: pins}


@contextmanager
def handed_on(graph: fx.Graph) -> Iterator[None]:
    """A context for a pass that puts other nodes into the place of some, and forgets what was on them: their pins are
    on what took their place."""
    held: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        pins = node.meta.get("custom", {}).get(KEY, ((), ()))
        if node.op == "call_function" and any(pins):
            with graph.inserting_after(node):
                holder = graph.call_function(TAP, ([node], [], ""))
            holder.meta["val"] = None
            held[holder] = pins
    try:
        yield
    finally:
        for holder, pins in held.items():
            (node,) = holder.all_input_nodes
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: pins}
            graph.erase_node(holder)


def is_pinned(graph: fx.Graph) -> bool:
    return any(KEY in node.meta.get("custom", {}) for node in graph.nodes)


def pinned(graph: fx.Graph, wanted: Mapping[int, Wanted], backward: bool) -> dict[int, Found]:
    """What the wanted values, or, in a backward pass, gradients, have become in a graph that `pin` has seen."""
    own, equal = _bearers(graph)
    found = find(graph, {id: value for id, value in wanted.items() if value.written is not None and not backward})
    for id, value in wanted.items():
        if id % 2 == backward and id not in found:
            node = _last(own.get(id, []), value) or _last(equal.get(id, []), value)
            if node is not None:
                found[id] = Found(node, node)
    return found


def _bearers(graph: fx.Graph) -> tuple[Bearers, Bearers]:
    own: Bearers = defaultdict(list)
    equal: Bearers = defaultdict(list)
    for node in graph.nodes:
        if node.op in ("call_function", "placeholder"):
            for bearers, ids in zip((own, equal), node.meta.get("custom", {}).get(KEY, ()), strict=False):
                for id in ids:
                    bearers[id].append(node)
    return own, equal


def _last(bearers: list[fx.Node], value: Wanted) -> fx.Node | None:
    """Where a pattern has put several nodes in the place of one, all of them bear its pin: the last one is meant."""
    ends = [node for node in bearers if fits(node, value) and set(bearers).isdisjoint(node.users)]
    return ends[0] if ends else None
