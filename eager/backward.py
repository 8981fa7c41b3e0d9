"""Gradients, read with hooks on autograd's nodes: nothing is added to the graph, so in-place operators work as without
us.

A call's gradients are what the node of its first output was given and gave. A module's output gradients are what the
nodes of its outputs are given; its input gradients are the sum of what the module's own nodes give for an input: a
hook on the input tensor would see the total, wrong where the input is also used outside (a residual).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from msprobe_graph.dump.names import module_entry, module_prefix
from msprobe_graph.dump.records import Entry

from ._compat import unseen
from .context import Context
from .module_backward import Edges, ModuleBackward, input_edges

Grads = tuple[torch.Tensor | None, ...]


class Backward:
    """Puts hooks on the nodes of recorded calls and modules, and records what they see."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.reset()

    def reset(self) -> None:
        """A new step."""
        self._begun: dict[str, ModuleBackward] = {}
        self._just_done: list[str] = []
        """Modules that ended with the node that ran last: its parameters' gradients come after, but stand before
        them."""
        self._accumulated: dict[str, tuple[str, int]] = {}

    def rest(self) -> list[Entry]:
        """The entries of modules whose backward has begun and not ended."""
        return [self._module_entry(call) for call in list(self._begun.values())]

    def follow_call(self, name: str, forward: Entry, result: Any) -> None:
        """Record as `name` what the node of the call's first output tensor is given and gives."""
        output = next(tensors(result), None)
        if output is not None and output.requires_grad and output.grad_fn is not None:
            output.grad_fn.register_hook(self._tap(name, self._call_done, name, forward))

    def edges(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Edges:
        """To be taken when a module's forward begins, for `follow_module` at its end."""
        return input_edges([*tensors(args), *tensors(kwargs)])

    def follow_module(self, name: str, forward: Entry, edges: Edges, result: Any) -> None:
        """Record as `name` the gradients of a module's outputs and inputs."""
        call = ModuleBackward(name, forward, edges, list(tensors(result)))
        for index, root in enumerate(call.roots):
            if root is not None:
                node, output = root
                node.register_prehook(self._tap(name, self._module_given, call, index, output))
        for node in call.inner:
            node.register_hook(self._tap(name, self._module_used_inside, call, node))
        for node in call.own:
            node.register_hook(self._tap(name, self._module_run, call, node))

    def parameter_hooks(self, path: str, cls: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks that record each own parameter's gradient once it is accumulated. A lazy parameter, which has no value
        before the first call, can't have one."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and not is_lazy(parameter):
                hook = partial(
                    self._run, None, f"{path}.{name} gradient", partial(self._parameter_done, path, cls, name)
                )
                yield parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _tap(self, name: str, tap: Callable[..., None], *args: Any) -> Callable[..., None]:
        """A hook that runs `tap` with `args` and what autograd gives, in this step only."""
        return partial(self._run, self._context.step, name, partial(tap, *args))

    def _run(self, step: int | None, name: str, tap: Callable[..., None], *args: Any) -> None:
        if self._context.on and step in (None, self._context.step):
            with unseen(), torch.no_grad():
                self._context.boundary.attempt(name, tap, *args)

    def _call_done(self, name: str, forward: Entry, gives: Grads, given: Grads) -> None:
        self._just_done.clear()
        self._record(self._entry(name, forward, given, gives))

    def _module_given(self, call: ModuleBackward, index: int, output: int, given: Grads) -> None:
        self._just_done.clear()
        grad = call.give(index, given[output])
        selection = self._context.selection
        if selection.inputs:
            stem = f"{call.name}.input.{index}" if selection.saves(call.name) else None
            call.given[index] = self._context.recorder.value(grad, stem)
        self._begun[call.name] = call
        self._done_if_complete(call)

    def _module_used_inside(self, call: ModuleBackward, node: Node, gives: Grads, given: Grads) -> None:
        call.use_inside(node, gives)

    def _module_run(self, call: ModuleBackward, node: Node, gives: Grads, given: Grads) -> None:
        call.run(node, gives)
        if self._done_if_complete(call):
            self._just_done.append(call.name)

    def _done_if_complete(self, call: ModuleBackward) -> bool:
        if not call.complete or call.name not in self._begun:
            return False
        self._context.recorder.entries.pop(call.name, None)  # an output that got its gradient later reopened it
        self._record(self._module_entry(call))
        del self._begun[call.name]
        return True

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

    def _parameter_done(self, path: str, cls: str, parameter: str, tensor: torch.Tensor) -> None:
        """All own parameters of a module go into one entry, which stands where the last of them was accumulated. The
        call number counts how often the first of them has been."""
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
        for done in self._just_done:
            entries[done] = entries.pop(done)


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
