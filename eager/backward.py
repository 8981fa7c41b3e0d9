"""Gradients, read with hooks on autograd's nodes: nothing is added to the graph, so in-place operators work as without us.

A call's gradients are what the node of its first output was given and gave. A module's output gradients are what the nodes
of its outputs are given; its input gradients are the sum of what the module's own nodes give for an input: a hook on the
input tensor would see the total, wrong where the input is also used outside (a residual).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from msprobe_graph.dump.names import module_entry, module_prefix
from msprobe_graph.dump.records import Entry

from ._compat import DisableTorchFunction, sequence_number
from .context import Context

Grads = tuple[torch.Tensor | None, ...]


class Edges(NamedTuple):
    """Where a module's inputs hang in the autograd graph, as found when its forward began."""

    inputs: list[GradientEdge | None]
    """For each tensor among the inputs, in order: its edge, or None where it needs no gradient."""
    since: int
    """Nodes of the module's own bear this sequence number or a larger one."""


class ModuleBackward:
    """Collects the gradients of one module call until its last own node has run."""

    def __init__(self, name: str, forward: Entry, outputs: int, inputs: int) -> None:
        self.name = name
        self.forward = forward
        self.given: list[Any] = [None] * outputs
        """The output gradients, measured when they came."""
        self.found: list[torch.Tensor | None] = [None] * inputs
        """The input gradients, as far as they are summed up."""
        self.through: dict[int, int] = {}
        """Outputs that are inputs, handed through: which input by which output."""
        self.waiting = 0
        """Own nodes that take an input and have not run yet."""

    def add(self, index: int, grad: torch.Tensor | None) -> None:
        if grad is not None:
            known = self.found[index]
            self.found[index] = grad if known is None else known + grad


class Backward:
    """Puts hooks on the nodes of recorded calls and modules, and records what they see."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._begun: dict[str, ModuleBackward] = {}
        self._accumulated: dict[str, tuple[str, int]] = {}

    def reset(self) -> None:
        """A new step."""
        self._begun.clear()
        self._accumulated.clear()

    def rest(self) -> list[Entry]:
        """The entries of modules whose backward has begun but, unused nodes and all, never told its end."""
        return [self._module_entry(call) for call in list(self._begun.values())]

    def follow_call(self, name: str, forward: Entry, result: Any) -> None:
        """Record as `name` what the node of the call's first output tensor is given and gives."""
        output = next(tensors(result), None)
        if not self._context.selection.backward or output is None:
            return
        if output.requires_grad and torch.is_grad_enabled() and output.grad_fn is not None:
            output.grad_fn.register_hook(partial(self._guarded, self._context.step, name, self._call_done, name, forward))

    def edges(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Edges:
        """To be taken when a module's forward begins, for `follow_module` at its end."""
        inputs = [*tensors(args), *tensors(kwargs)]
        return Edges([get_gradient_edge(x) if x.requires_grad else None for x in inputs], sequence_number())

    def follow_module(self, name: str, forward: Entry, edges: Edges, result: Any) -> None:
        """Record as `name` the gradients of a module's outputs and inputs."""
        outputs = list(tensors(result))
        roots = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in outputs]
        if not any(roots):
            return
        wanted = {(edge.node, edge.output_nr): index for index, edge in enumerate(edges.inputs) if edge is not None}
        call = ModuleBackward(name, forward, len(outputs), len(edges.inputs))
        consumers = list(_consumers([edge.node for edge in roots if edge is not None], wanted, edges.since))
        call.waiting = len(consumers)
        for index, root in enumerate(roots):
            if root is not None and (root.node, root.output_nr) in wanted:
                call.through[index] = wanted[root.node, root.output_nr]
        guarded = partial(self._guarded, self._context.step, name)
        for index, root in enumerate(roots):
            if root is not None:
                root.node.register_prehook(partial(guarded, self._module_given, call, index, root.output_nr))
        for node, uses in consumers:
            node.register_hook(partial(guarded, self._module_found, call, uses))

    def parameter_hooks(self, path: str, cls: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks that record each own parameter's gradient once it is accumulated."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                yield parameter.register_post_accumulate_grad_hook(partial(self._parameter_hook, path, cls, name))

    def _guarded(self, step: int, name: str, tap: Any, *args: Any) -> None:
        if self._context.on and self._context.step == step:
            with DisableTorchFunction(), torch.no_grad():
                self._context.boundary.attempt(name, tap, *args)

    def _call_done(self, name: str, forward: Entry, gives: Grads, given: Grads) -> None:
        self._record(self._entry(name, forward, given, gives))

    def _module_given(self, call: ModuleBackward, index: int, output: int, given: Grads) -> None:
        if self._context.selection.inputs:
            save = self._context.selection.saves(call.name)
            stem = f"{call.name}.input.{index}" if save else None
            call.given[index] = self._context.recorder.value(given[output], stem)
        if index in call.through:
            call.add(call.through[index], given[output])
        self._begun[call.name] = call
        if call.waiting == 0:
            self._module_done(call)

    def _module_found(self, call: ModuleBackward, uses: list[tuple[int, int]], gives: Grads, given: Grads) -> None:
        for position, index in uses:
            call.add(index, gives[position])
        call.waiting -= 1
        if call.waiting == 0:
            self._module_done(call)

    def _module_done(self, call: ModuleBackward) -> None:
        self._record(self._module_entry(call))
        self._begun.pop(call.name, None)

    def _module_entry(self, call: ModuleBackward) -> Entry:
        found = call.found if any(grad is not None for grad in call.found) else []
        entry = self._entry(call.name, call.forward, (), found)
        if self._context.selection.inputs:
            entry.parts["input"] = call.given
        return entry

    def _entry(self, name: str, forward: Entry, given: Iterable[Any], gives: Iterable[Any]) -> Entry:
        """A backward entry: at the place of its forward one, with the module's backward as its parent."""
        context = self._context
        save = context.selection.saves(name)
        parts: dict[str, Any] = {}
        if context.selection.inputs:
            parts["input"] = context.values(given, f"{name}.input", save)
        if context.selection.outputs:
            parts["output"] = context.values(gives, f"{name}.output", save)
        parent = forward.parent and forward.parent.replace(".forward.", ".backward.")
        return Entry(name, parts, module=forward.module, number=forward.number, parent=parent)

    def _record(self, entry: Entry) -> None:
        self._context.recorder.entries[entry.name] = entry

    def _parameter_hook(self, path: str, cls: str, parameter: str, tensor: torch.Tensor) -> None:
        self._guarded(self._context.step, f"{path}.{parameter} gradient", self._parameter_done, path, cls, parameter, tensor)

    def _parameter_done(self, path: str, cls: str, parameter: str, tensor: torch.Tensor) -> None:
        """All own parameters of a module go into one entry, which stands where the last of them was accumulated. The call
        number counts how often the first of them has been."""
        prefix = module_prefix(path, cls)
        first, call = self._accumulated.get(prefix, (parameter, -1))
        if parameter == first:
            call += 1
            self._accumulated[prefix] = (first, call)
        name = module_entry(path, cls, "parameters_grad", call)
        selection = self._context.selection
        if not selection.wants_module(name):
            return
        entries = self._context.recorder.entries
        earlier = entries.pop(name, None)
        stem = f"{name}.{parameter}" if selection.saves(name) else None
        grads = {**(earlier.parts if earlier else {}), parameter: [self._context.recorder.value(tensor.grad, stem)]}
        entries[name] = Entry(name, grads, module=path, number=call, nested=False)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def _consumers(
    roots: Iterable[Node], wanted: dict[tuple[Node, int], int], since: int
) -> Iterator[tuple[Node, list[tuple[int, int]]]]:
    """Of the nodes made since `since` that `roots` hang on, those that take a wanted edge: each with the positions of such
    edges among its own and the index that `wanted` gives for them."""
    seen = set()
    open_nodes = list(roots)
    while open_nodes:
        node = open_nodes.pop()
        if node in seen or node._sequence_nr() < since:
            continue
        seen.add(node)
        uses = []
        for position, edge in enumerate(node.next_functions):
            if edge in wanted:
                uses.append((position, wanted[edge]))
            elif edge[0] is not None:
                open_nodes.append(edge[0])
        if uses:
            yield node, uses
