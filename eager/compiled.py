"""Compiled regions in an eager capture: kept as they are, seen from outside.

Inside a compiled region no mode may be on: it would recompile the region or run it eagerly. So at the region's border
the mode is turned off; where the region runs eagerly, the function mode is on again (`stretches`). Hooks inside are
hidden from dynamo (`unhooked`): what is compiled has none, and what the region runs eagerly is captured. A function
compiled by itself that is no module (``f = torch.compile(f)``) can't be found beforehand: it stays compiled, with one
more compilation for the calls made under capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from msprobe_graph.dump.names import module_prefix

from ._compat import compiled_call, compiled_inside, replace_compiled_call
from .modes import ModeSwitch


class Border:
    """One compiled module of the watched model."""

    def __init__(self, path: str, module: nn.Module, inner: nn.Module) -> None:
        self.path = path
        self.module = module
        """What the program calls: the wrapper that torch.compile returned, or the module itself after
        module.compile()."""
        self.inner = inner
        """The module that was compiled."""

    @property
    def inside(self) -> Iterator[str]:
        """The modules inside, as their entries' names begin."""
        for name, module in self.inner.named_modules():
            if module is not self.inner:
                yield module_prefix(f"{self.path}.{name}" if self.path else name, type(module).__name__)


def survey(model: nn.Module, prefix: str = "") -> tuple[dict[str, nn.Module], list[Border]]:
    """All modules of `model` by qualified name, without the wrappers of torch.compile, and the borders of its compiled
    regions, the outermost ones."""
    modules: dict[str, nn.Module] = {}
    borders: list[Border] = []
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str, compiled: bool) -> None:
        if module in seen:
            return
        seen.add(module)
        inner = compiled_inside(module) or module
        if not compiled and (inner is not module or compiled_call(module) is not None):
            borders.append(Border(path, module, inner))
            compiled = True
        if inner is not module:
            walk(inner, path, compiled)
            return
        modules[path] = module
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name, compiled)

    walk(model, prefix, compiled=False)
    return modules, borders


class Borders:
    """The borders of compiled regions, at which `mode` is turned off."""

    def __init__(self, mode: ModeSwitch) -> None:
        self._mode = mode
        self._entered: list[bool] = []
        """Of the borders that are being crossed: whether the mode was on before."""
        self._undo: list[Callable[[], None]] = []
        self._watched: set[nn.Module] = set()

    def install(self, border: Border) -> None:
        module = border.module
        if module in self._watched:
            return
        self._watched.add(module)
        if module is border.inner:
            compiled = compiled_call(module)
            replace_compiled_call(module, partial(self._call, compiled))
            self._undo.append(partial(replace_compiled_call, module, compiled))
            return
        handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(lambda _, args: self._enter()),
            module.register_forward_hook(lambda _, args, output: self._leave(), prepend=True, always_call=True),
        ]
        self._undo.extend(handle.remove for handle in handles)

    def remove(self) -> None:
        """Leave every module as it was found."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._watched.clear()

    def _enter(self) -> None:
        self._entered.append(self._mode.on)
        if self._mode.on:
            self._mode.turn_off()

    def _leave(self) -> None:
        if self._entered.pop():
            self._mode.turn_on()

    def _call(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        self._enter()
        try:
            return compiled(*args, **kwargs)
        finally:
            self._leave()
