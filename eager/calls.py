"""Records operator calls: torch API calls (levels L1, mix) and aten operators (L2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from msprobe_graph.dump.names import api_entry
from msprobe_graph.dump.records import Entry
from msprobe_graph.taps.likeness import Anchor, EarlierCall, Likeness

from .backward import Backward
from .context import Context, here, spread
from .written import written

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
AsWritten = Callable[[str, tuple[Any, ...], dict[str, Any]], Arguments]
"""Puts arguments that torch hands on by keyword back where callers write them: OperatorTable.as_written."""


class Calls:
    """`record` is given to a mode: it makes the call and records what went in and what came out."""

    def __init__(self, context: Context, as_written: AsWritten, backward: Backward | None) -> None:
        self._context = context
        self._as_written = as_written
        self._backward = backward
        """None where gradients are not recorded by call (level L2 sees backward operators as operators)."""
        self._earlier: defaultdict[str, defaultdict[int, list[EarlierCall]]] = defaultdict(lambda: defaultdict(list))
        """By name and number, the one seen last in front."""

    def record(self, api: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns. Inputs are read before the call, which may overwrite them."""
        context = self._context
        table = context.recorder.table
        if table is not None and (known := self._earlier.get(api)):
            numbering = context.numbering
            stack = context.running.stack
            earlier = table.begin(numbering.calls, numbering.within_modules, stack, api, known, (args, kwargs))
            if earlier is not None:
                result = func(*args, **kwargs)
                context.boundary.attempt(earlier.entry.name, self._outputs, earlier, func, args, kwargs, result)
                return result
        selection = context.selection
        if not selection.may_want_api(api):
            return func(*args, **kwargs)
        number = context.numbering.advance(api)
        name = api_entry(api, number, "forward")
        if not selection.wants_api(name):
            return func(*args, **kwargs)
        call = context.boundary.attempt(name, self._inputs, name, api, args, kwargs)
        result = func(*args, **kwargs)
        if call is not None:
            context.boundary.attempt(name, self._outputs, call, func, args, kwargs, result)
            if self._backward is not None and selection.backward and torch.is_grad_enabled():
                backward = api_entry(api, number, "backward")
                context.boundary.attempt(name, self._backward.follow_call, backward, call.entry, result)
        return result

    def forget(self) -> None:
        """No call is like an earlier one."""
        self._earlier.clear()

    def _inputs(self, name: str, api: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Begun:
        context = self._context
        parts: dict[str, Any] = {}
        inputs = None
        if context.selection.forward and context.selection.inputs:
            save = context.selection.saves(name)
            given = self._as_written(api, args, kwargs)
            parts["input_args"] = context.values(given[0], f"{name}.input", save)
            parts["input_kwargs"] = context.named(given[1], f"{name}.kwargs", save)
            inputs = context.recorder.likeness((args, kwargs), given, list(parts.values()))
        anchor = context.anchor(here(3))
        if anchor is not None:
            anchor.frame = None  # which holds on to what the caller has; nothing is called from here
        return _Begun(Entry(name, parts, *context.place(api, anchor)), inputs, anchor)

    def _outputs(
        self,
        call: _Begun | EarlierCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        context = self._context
        entry, selection, recorder = call.entry, context.selection, context.recorder
        if not selection.forward:
            return
        outputs = spread(result)
        into = written(func, args, kwargs)
        if into:
            returned = () if result is None else outputs
            outputs = (*returned, *(tensor for tensor in into if not any(tensor is other for other in returned)))
        if isinstance(call, EarlierCall):
            table = recorder.table
            if table is not None and table.end(recorder.entries, call, outputs, None):
                return
            entry = call.begun()
        if selection.outputs:
            entry.parts["output"] = context.values(outputs, f"{entry.name}.output", selection.saves(entry.name))
            kept = recorder.likeness((outputs, None), outputs, entry.parts["output"])
            api, number, _ = entry.name.rsplit(".", 2)
            if kept is not None and call.inputs is not None and selection.everything:
                forms = self._earlier[api][int(number)]
                if isinstance(call, EarlierCall):
                    call.take_from(forms)
                EarlierCall(entry, call.inputs, kept, call.anchor, None).keep_in(forms)
        recorder.entries[entry.name] = entry


class _Begun(NamedTuple):
    """A call that was looked at when it began."""

    entry: Entry
    inputs: Likeness | None
    """What its inputs are like; None where that can't be told."""
    anchor: Anchor | None
