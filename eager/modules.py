"""Records module calls (levels L0, mix) with hooks on each module, and tells the other taps which module is running."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from msprobe_graph.dump.names import module_call, module_prefix
from msprobe_graph.dump.records import Entry, Hole
from msprobe_graph.taps.likeness import EarlierCall, Likeness

from ._compat import kwargs_of_call, unseen
from .backward import Backward
from .context import Context, ModuleCall, here, spread


class ModuleTap:
    """The hooks of one module."""

    def __init__(self, context: Context, backward: Backward, path: str, cls: str, records: bool) -> None:
        self.path = path
        self.prefix = module_prefix(path, cls)
        self._context = context
        self._backward = backward
        self._records = records
        """False where modules are only kept track of (level L1)."""
        self._earlier: defaultdict[int, list[EarlierCall]] = defaultdict(list)
        """By a call's number, the one seen last in front."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A forward pre-hook. Torch leaves out the keyword arguments where a hook before this one had dynamo compile
        something, for which ours were taken away, and what torch knows of them."""
        context = self._context
        if not context.on:
            return
        if kwargs is None:
            kwargs = kwargs_of_call()
        stack, table, known = context.running.stack, context.recorder.table, self._earlier
        if known and table is not None:
            earlier = table.begin(context.numbering.calls, None, stack, self.prefix, known, (args, kwargs))
            if earlier is not None:
                earlier.call.run = context.recorder.run
                if context.module_begins is not None:
                    earlier.call.end = context.module_begins()
                return
        prefix = self.prefix
        number = context.numbering.advance(prefix)
        name = module_call(prefix, "forward", number)
        call = ModuleCall(prefix, self.path, number, name if self._records else None)
        call.run = context.recorder.run
        with unseen():
            context.boundary.attempt(name, self._inputs, call, args, kwargs)
        stack.append(call)
        if context.module_begins is not None:
            call.end = context.module_begins()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook, called when the forward raised too."""
        context = self._context
        stack = context.running.stack
        if not stack or stack[-1].prefix != self.prefix:  # its beginning wasn't seen
            return
        call = stack.pop()
        if call.end is not None:
            call.end()
        if call.run != context.recorder.run:  # another step has begun meanwhile
            if call.earlier is not None:
                call.entry = call.earlier.begun()
            self._forget(call)
        if call.name is not None and not self._ends_like_earlier(call, module, output):
            with unseen():
                self._end(call, call.name, module, output)
        call.edges = call.end = call.before = None
        if call.anchor is not None:
            call.anchor.frame = None  # which holds on to what the caller has

    def _ends_like_earlier(self, call: ModuleCall, module: nn.Module, output: Any) -> bool:
        """Whether the call has begun and ended like one of an earlier step: then all is recorded."""
        earlier, recorder = call.earlier, self._context.recorder
        if earlier is None or output is None or recorder.table is None:
            return False
        return bool(recorder.table.end(recorder.entries, earlier, output, module._parameters))

    def _end(self, call: ModuleCall, name: str, module: nn.Module, output: Any) -> None:
        context = self._context
        context.selection.leave(name)
        if call.entry is None:
            return
        error = call.raised() if output is None else None
        if error is not None:
            context.recorder.entries[name] = call.entry if call.earlier is None else call.earlier.begun()
            context.recorder.holes.append(Hole(f"{name}.output", f"the call raised {type(error).__name__}"))
            return
        context.boundary.attempt(name, self._outputs, call.entry, call, module, output)

    def _inputs(self, call: ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = self._context
        call.anchor = context.anchor(here(3))
        name, selection = call.name, context.selection
        if name is None:
            unread = context.recorder.unread()
            self._keep(call, Entry("", {}, self.path, call.number), unread, unread)
            return
        selection.enter(name)
        if not selection.wants_module(name):
            return
        parts: dict[str, Any] = {}
        if selection.forward and selection.inputs:
            save = selection.saves(name)
            parts["input_args"] = context.values(args, f"{name}.input", save)
            parts["input_kwargs"] = context.named(kwargs, f"{name}.kwargs", save)
            call.inputs = context.recorder.likeness((args, kwargs), (args, kwargs), list(parts.values()))
        inside = context.running.top
        stack = call.anchor.stack if call.anchor else None
        call.entry = Entry(name, parts, self.path, call.number, inside.name if inside else None, stack)
        if selection.backward and torch.is_grad_enabled():
            call.edges = self._backward.edges(args, kwargs)

    def _outputs(self, entry: Entry, call: ModuleCall, module: nn.Module, output: Any) -> None:
        context = self._context
        selection = context.selection
        if selection.forward:
            if call.earlier is not None:
                entry = call.earlier.begun()
            if selection.outputs:
                name, save = entry.name, selection.saves(entry.name)
                entry.parts["output"] = context.values(spread(output), f"{name}.output", save)
                entry.parts["parameters"] = context.parameters(module, f"{name}.parameters", save)
                returned = spread(output), module._parameters
                parts = entry.parts["output"], entry.parts["parameters"]
                self._keep(call, entry, call.inputs, context.recorder.likeness(returned, returned, parts))
            context.recorder.entries[entry.name] = entry
        if call.edges is not None:
            self._backward.follow_module(module_call(self.prefix, "backward", call.number), entry, call.edges, output)

    def _keep(self, call: ModuleCall, entry: Entry, inputs: Likeness | None, outputs: Likeness | None) -> None:
        """For later calls that are like this one."""
        self._forget(call)
        within = call.run == self._context.recorder.run
        if inputs is not None and outputs is not None and within and self._context.selection.everything:
            call.entry, call.inputs = entry, inputs
            call.earlier = EarlierCall(entry, inputs, outputs, call.anchor, call)
            call.earlier.keep_in(self._earlier[call.number])

    def _forget(self, call: ModuleCall) -> None:
        """No later call is like this one."""
        if call.earlier is not None:
            call.earlier.take_from(self._earlier[call.number])
            call.earlier = None

    def forget_calls(self) -> None:
        """No call is like an earlier one."""
        self._earlier.clear()


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
        self._gradient_hooks: list[RemovableHandle] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook each of `modules`, given by qualified name, that isn't hooked yet."""
        for path, module in modules.items():
            if module in self.taps:
                continue
            cls = type(module).__name__
            tap = self.taps[module] = ModuleTap(self._context, self._backward, path, cls, self.records)
            self._hook(module, tap)
            if self.records and self._context.selection.backward:
                self._gradient_hooks.extend(self._backward.parameter_hooks(path, cls, module))

    def take_away(self) -> None:
        """Take the hooks off the modules until `put_back`; those on gradients stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def put_back(self) -> None:
        if not self._handles:
            for module, tap in self.taps.items():
                self._hook(module, tap)

    def remove(self) -> None:
        """Leave every module as it was found."""
        self.take_away()
        for handle in self._gradient_hooks:
            handle.remove()
        self._gradient_hooks.clear()
        self.taps.clear()

    def _hook(self, module: nn.Module, tap: ModuleTap) -> None:
        self._handles.append(module.register_forward_pre_hook(tap.enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(tap.leave, prepend=True, always_call=True))
