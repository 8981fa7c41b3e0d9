"""Taps as nodes of the aten graph, before Inductor fuses: every selected value, at the price of other fusions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from msprobe_graph.dump.boundary import Boundary

from .exact import chained_uuid
from .pins import is_pinned, pin, pinned
from .stamps import Wanted, gradient_flow, spare
from .tap_op import KEEP, NOTE, TAP

MOST_VALUES = 16
"""In one tap."""


class _AtenPass(CustomGraphPass):
    """What our passes over an aten graph have in common. `chained` are the user's own at that place."""

    def __init__(
        self, digest: str, chained: Sequence[Callable[[fx.Graph], None]] = (), boundary: Boundary | None = None
    ) -> None:
        self._digest = digest
        self._chained = chained
        self._boundary = boundary or Boundary()

    def uuid(self) -> Any | None:
        return chained_uuid(self._digest, *self._chained)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AtenPass:
        """Inductor copies its configuration, to print it; dynamic sizes can't be copied."""
        return self


class PinPass(_AtenPass):
    """Inductor's `joint_custom_pre_pass` that pins the `wanted` values for the passes that tap them, before any other
    pass rewrites the graph."""

    def __init__(
        self,
        wanted: Mapping[int, Wanted],
        digest: str,
        chained: Sequence[Callable[[fx.Graph], None]] = (),
        boundary: Boundary | None = None,
    ) -> None:
        super().__init__(digest, chained, boundary)
        self._wanted = wanted

    def __call__(self, graph: fx.Graph) -> None:
        if self._wanted:
            self._boundary.attempt("taps", pin, graph, self._wanted)
        for each in self._chained:
            each(graph)


class FullPass(_AtenPass):
    """Inductor's `post_grad_custom_post_pass` that taps those of the `wanted` values (by value id) that are in `ids`.

    A tap's place is right behind what it reads, and of neighbours several share a tap. It also marks the graph for
    `exact.ExactPass`, which taps the other values. Of a graph that `PinPass` has not seen it takes it that nothing has
    rewritten it.
    """

    def __init__(
        self,
        wanted: Mapping[int, Wanted],
        digest: str,
        ids: Collection[int] | None = None,
        chained: Sequence[Callable[[fx.Graph], None]] = (),
        boundary: Boundary | None = None,
    ) -> None:
        """`ids` None: all."""
        super().__init__(digest, chained, boundary)
        self._pinned = wanted
        self._wanted = {id: value for id, value in wanted.items() if ids is None or id in ids}

    def __call__(self, graph: fx.Graph) -> None:
        for each in self._chained:
            each(graph)
        if self._pinned:
            if not is_pinned(graph):
                self._boundary.attempt("taps", pin, graph, self._pinned)
            with graph.inserting_before(next(iter(graph.nodes))):
                graph.call_function(KEEP).meta["val"] = None
        if self._wanted:
            self._boundary.attempt("taps", self._insert, graph)

    def _insert(self, graph: fx.Graph) -> None:
        backward = bool(gradient_flow(graph))
        found = pinned(graph, self._wanted, backward)
        for id in spare(self._wanted, found):
            del found[id]
        missing = {id: "rewritten" for id in self._wanted if id % 2 == backward and id not in found}
        note = json.dumps({"graph": _kind(graph), "missing": missing}, separators=(",", ":"))
        behind: dict[fx.Node, list[int]] = defaultdict(list)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for id, place in found.items():
            behind[inputs[-1] if place.after in inputs else place.after].append(id)
        for run in _runs(graph, behind):
            ids = [id for node in run for id in behind[node]]
            with graph.inserting_after(run[-1]):
                tap = graph.call_function(TAP, ([found[id].node for id in ids], ids, note))
            tap.meta["val"], note = None, ""
        if note:
            with graph.inserting_before(graph.output_node()):
                graph.call_function(NOTE, (note,)).meta["val"] = None


def _runs(graph: fx.Graph, behind: Collection[fx.Node]) -> Iterator[list[fx.Node]]:
    """The nodes of `behind` in the graph's order, neighbours together: they share a tap behind the last of them."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        if run and not (node in behind and len(run) < MOST_VALUES and _only_computes(node)):
            yield run
            run = []
        if node in behind:
            run.append(node)
    if run:
        yield run


def _only_computes(node: fx.Node) -> bool:
    """Whether a tap of its arguments may as well come behind it: it can't become an operator that writes them."""
    if node.op == "placeholder":
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"


def _kind(graph: fx.Graph) -> str:
    if gradient_flow(graph):
        return "backward"
    return "forward" if any("partitioner_tag" in node.meta for node in graph.nodes) else "inference"
