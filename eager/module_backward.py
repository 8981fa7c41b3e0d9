"""One module call's gradients, gathered from autograd's nodes while a backward pass runs through the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from msprobe_graph.dump.records import Entry

from ._compat import sequence_number

Edge = tuple[Node, int]


class Edges(NamedTuple):
    """Where a module's inputs hang in the autograd graph, as found when its forward began."""

    inputs: list[GradientEdge | None]
    """For each tensor among the inputs, in order: its edge, or None where it needs no gradient."""
    since: int
    """Nodes of the module's own bear this sequence number or a larger one."""


class Use(NamedTuple):
    """A node of the module's own that takes an input, or an output that the module itself uses on."""

    position: int
    """Which of the gradients that the node gives belongs to the edge."""
    edge: int
    """Which input or output it is."""


class ModuleBackward:
    """What is known of one module call's gradients so far.

    `own` holds, for each of the module's nodes that matter, which inputs it takes; `inner` the same for outputs that
    the module uses on by itself: what comes back from there is no gradient of the module's output.
    """

    def __init__(self, name: str, forward: Entry, edges: Edges, outputs: list[torch.Tensor]) -> None:
        self.name = name
        self.forward = forward
        self.roots: list[Edge | None] = [_edge(tensor) for tensor in outputs]
        self.given: list[Any] = [None] * len(outputs)
        """The output gradients, measured when they came."""
        self.found: list[torch.Tensor | None] = [None] * len(edges.inputs)
        """The input gradients, as far as they are summed up."""
        self.through: dict[int, int] = {}
        """Outputs that are inputs, handed through: which input by which output."""
        self.own: dict[Node, list[Use]] = {}
        self.inner: dict[Node, list[Use]] = {}
        self._inner_sum: dict[int, torch.Tensor] = {}
        self._behind: list[set[Node]] = [set() for _ in outputs]
        """For each output, the nodes in `own` that its gradient reaches."""
        self._waiting: set[Node] = set()
        self._run: set[Node] = set()
        self._find(edges)

    @property
    def complete(self) -> bool:
        """Whether every own node that the gradients given so far reach has run."""
        return not self._waiting

    def give(self, index: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Output `index` has got its gradient; the answer is the part of it that came from outside the module."""
        if grad is not None and index in self.through:
            self.add(self.through[index], grad)
        self._waiting |= self._behind[index] - self._run
        inner = self._inner_sum.get(index)
        if grad is None or inner is None:
            return grad
        return None if torch.equal(grad, inner) else grad - inner

    def run(self, node: Node, gives: tuple[torch.Tensor | None, ...]) -> None:
        """An own node has run."""
        for position, index in self.own[node]:
            grad = gives[position]
            if grad is not None:
                self.add(index, grad)
        self._run.add(node)
        self._waiting.discard(node)

    def use_inside(self, node: Node, gives: tuple[torch.Tensor | None, ...]) -> None:
        """An own node has given a gradient for an output that it took."""
        for position, index in self.inner[node]:
            grad = gives[position]
            if grad is not None:
                known = self._inner_sum.get(index)
                self._inner_sum[index] = grad if known is None else known + grad

    def add(self, index: int, grad: torch.Tensor) -> None:
        known = self.found[index]
        self.found[index] = grad if known is None else known + grad

    def _find(self, edges: Edges) -> None:
        inputs: dict[Edge, int] = {}
        for index, edge in enumerate(edges.inputs):
            if edge is not None:
                inputs.setdefault((edge.node, edge.output_nr), index)
        outputs = {root: index for index, root in enumerate(self.roots) if root is not None}
        for index, root in enumerate(self.roots):
            if root is None:
                continue
            if root in inputs:
                self.through[index] = inputs[root]
                continue
            for node in _own_nodes(root[0], edges.since, inputs):
                if uses := _uses(node, inputs):
                    self.own[node] = uses
                    self._behind[index].add(node)
                if uses := _uses(node, outputs):
                    self.inner[node] = uses


def input_edges(inputs: Iterable[torch.Tensor]) -> Edges:
    """To be taken when a module's forward begins."""
    return Edges([get_gradient_edge(x) if x.requires_grad else None for x in inputs], sequence_number())


def _edge(tensor: torch.Tensor) -> Edge | None:
    if not tensor.requires_grad:
        return None
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _own_nodes(root: Node, since: int, inputs: Mapping[Edge, int]) -> Iterator[Node]:
    """The nodes made since `since` that `root` hangs on, itself included, as far as the edges of the inputs."""
    seen = set()
    open_nodes = [root]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen or node._sequence_nr() < since:
            continue
        seen.add(node)
        yield node
        open_nodes.extend(edge[0] for edge in node.next_functions if edge[0] is not None and edge not in inputs)


def _uses(node: Node, edges: Mapping[Any, int]) -> list[Use]:
    return [Use(position, edges[edge]) for position, edge in enumerate(node.next_functions) if edge in edges]
