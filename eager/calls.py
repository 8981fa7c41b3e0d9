"""Records operator calls: torch API calls (levels L1, mix) and aten operators (L2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from msprobe_graph.dump.names import api_entry
from msprobe_graph.dump.records import Entry

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

    def record(self, api: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns. Inputs are read before the call, which may overwrite them."""
        context = self._context
        selection = context.selection
        if not selection.may_want_api(api):
            return func(*args, **kwargs)
        number = context.numbering.advance(api)
        name = api_entry(api, number, "forward")
        if not selection.wants_api(name):
            return func(*args, **kwargs)
        entry = context.boundary.attempt(name, self._inputs, name, api, args, kwargs)
        result = func(*args, **kwargs)
        if entry is not None:
            context.boundary.attempt(name, self._outputs, entry, func, args, kwargs, result)
            if self._backward is not None and selection.backward and torch.is_grad_enabled():
                backward = api_entry(api, number, "backward")
                context.boundary.attempt(name, self._backward.follow_call, backward, entry, result)
        return result

    def _inputs(self, name: str, api: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        context = self._context
        parts: dict[str, Any] = {}
        if context.selection.forward and context.selection.inputs:
            save = context.selection.saves(name)
            args, kwargs = self._as_written(api, args, kwargs)
            parts["input_args"] = context.values(args, f"{name}.input", save)
            parts["input_kwargs"] = context.named(kwargs, f"{name}.kwargs", save)
        return context.entry(name, api, parts, here(3))

    def _outputs(
        self, entry: Entry, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        context = self._context
        if not context.selection.forward:
            return
        if context.selection.outputs:
            outputs = spread(result)
            into = written(func, args, kwargs)
            if into:
                returned = () if result is None else outputs
                outputs = (*returned, *(tensor for tensor in into if not any(tensor is other for other in returned)))
            entry.parts["output"] = context.values(outputs, f"{entry.name}.output", context.selection.saves(entry.name))
        context.recorder.entries[entry.name] = entry
