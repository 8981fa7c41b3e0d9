"""Records module calls (levels L0, mix) with hooks on each module, and tells the other taps which module is running."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from msprobe_graph.dump.names import module_call, module_prefix
from msprobe_graph.dump.records import Entry, Hole

from .backward import Backward
from .call_stacks import caller_of_module
from .context import Context, Running, here, spread
from .module_backward import Edges


class Call:
    """A module call that has begun."""

    __slots__ = ("before", "edges", "entry", "name", "number")

    def __init__(self, name: str, number: int, before: BaseException | None) -> None:
        self.name = name
        self.number = number
        self.before = before
        """The exception that was being handled when the call began: a newer one at its end means that it raised."""
        self.entry: Entry | None = None
        self.edges: Edges | None = None


class ModuleTap:
    """The hooks of one module."""

    def __init__(self, context: Context, backward: Backward, path: str, cls: str, records: bool) -> None:
        self.path = path
        self.cls = cls
        self.prefix = module_prefix(path, cls)
        self._context = context
        self._backward = backward
        self._records = records
        """False where modules are only kept track of (level L1)."""
        self._calls: list[Call] = []

    @property
    def running(self) -> bool:
        """Whether a call that was seen to begin has not ended."""
        return bool(self._calls)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        context = self._context
        if not context.on:
            return
        number = context.numbering.next(self.prefix)
        context.numbering.advance(self.prefix)
        call = Call(module_call(self.prefix, "forward", number), number, sys.exc_info()[1])
        self._calls.append(call)
        with context.unseen:
            context.boundary.attempt(call.name, self._inputs, call, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, called when the forward raised too."""
        if not self._calls:
            return
        call = self._calls.pop()
        context = self._context
        if context.running.stack:
            context.running.stack.pop()
        with context.unseen:
            context.selection.leave(call.name)
            if call.entry is None:
                return
            error = sys.exc_info()[1]
            if output is None and error is not None and error is not call.before:
                context.recorder.entries[call.name] = call.entry
                context.recorder.holes.append(Hole(f"{call.name}.output", f"the call raised {type(error).__name__}"))
                return
            context.boundary.attempt(call.name, self._outputs, call, module, args, kwargs, output)

    def _inputs(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = self._context
        caller = caller_of_module(here(3)) if context.stacks else None
        anchor = context.anchor(caller)
        selection = context.selection
        if self._records:
            selection.enter(call.name)
            if selection.wants_module(call.name):
                parts: dict[str, Any] = {}
                if selection.forward and selection.inputs:
                    save = selection.saves(call.name)
                    parts["input_args"] = context.values(args, f"{call.name}.input", save)
                    parts["input_kwargs"] = context.named(kwargs, f"{call.name}.kwargs", save)
                inside = context.running.top
                call.entry = Entry(
                    call.name,
                    parts,
                    module=self.path,
                    number=call.number,
                    parent=inside.entry if inside else None,
                    stack=anchor.stack if anchor else None,
                )
                if selection.backward and torch.is_grad_enabled():
                    call.edges = self._backward.edges(args, kwargs)
        context.running.stack.append(Running(call.name if self._records else None, self.path, anchor))

    def _outputs(
        self, call: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        context = self._context
        entry = call.entry
        assert entry is not None
        if context.selection.forward:
            if context.selection.outputs:
                save = context.selection.saves(call.name)
                entry.parts["output"] = context.values(spread(output), f"{call.name}.output", save)
                parameters = {name: value for name, value in module._parameters.items() if value is not None}
                entry.parts["parameters"] = context.named(parameters, f"{call.name}.parameters", save)
            context.recorder.entries[call.name] = entry
        if call.edges is not None:
            name = module_call(self.prefix, "backward", call.number)
            self._backward.follow_module(name, entry, call.edges, output)


class ModuleHooks:
    """The taps of all modules of a model, root included.

    A module reached by two names bears the first. `taps` are those in place, by module.
    """

    def __init__(self, context: Context, backward: Backward, records: bool) -> None:
        self.taps: dict[nn.Module, ModuleTap] = {}
        self._context = context
        self._backward = backward
        self.records = records
        self._handles: list[RemovableHandle] = []

    def tap(self, path: str, module: nn.Module) -> ModuleTap:
        """A tap for `module`, without hooks yet."""
        tap = self.taps[module] = ModuleTap(self._context, self._backward, path, type(module).__name__, self.records)
        return tap

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook each of `modules`, given by qualified name, that isn't hooked yet."""
        for path, module in modules.items():
            if module in self.taps:
                continue
            tap = self.tap(path, module)
            self._handles.append(module.register_forward_pre_hook(tap.enter, with_kwargs=True))
            self._handles.append(
                module.register_forward_hook(tap.leave, prepend=True, with_kwargs=True, always_call=True)
            )
            if self.records and self._context.selection.backward:
                self._handles.extend(self._backward.parameter_hooks(tap.path, tap.cls, module))

    def remove(self) -> None:
        """Leave every module as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.taps.clear()
