"""Compiled regions in an eager capture: kept as they are, seen from outside.

Inside a compiled region neither mode may be on and no hook may lie: both would recompile it or run it eagerly. So the
modules inside are left alone and named in the manifest, and at the region's border the mode is off. A function compiled
by itself that is no module (``f = torch.compile(f)``) can't be found beforehand: it stays compiled, with one more
compilation for the calls made under capture.
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
from .modules import ModuleTap


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


def split(model: nn.Module, prefix: str = "") -> tuple[dict[str, nn.Module], list[Border]]:
    """The modules of `model` by qualified name that run eagerly, and the borders of its compiled regions."""
    eager: dict[str, nn.Module] = {}
    borders: list[Border] = []
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str) -> None:
        if module in seen:
            return
        seen.add(module)
        wrapped = compiled_inside(module)
        if wrapped is not None or compiled_call(module) is not None:
            borders.append(Border(path, module, wrapped or module))
            return
        eager[path] = module
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, prefix)
    return eager, borders


class BorderTaps:
    """Taps at the borders of compiled regions: inputs and outputs are recorded there, and the mode is off inside."""

    def __init__(self, mode: ModeSwitch | None) -> None:
        self._mode = mode
        self._undo: list[Callable[[], None]] = []
        self._tapped: set[nn.Module] = set()

    def install(self, border: Border, tap: ModuleTap) -> None:
        module = border.module
        if module in self._tapped:
            return
        self._tapped.add(module)
        if module is border.inner:
            compiled = compiled_call(module)
            replace_compiled_call(module, partial(self._call, compiled, border.inner, tap))
            self._undo.append(partial(replace_compiled_call, module, compiled))
            return
        handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: self._enter(border.inner, tap, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(
                lambda _, args, kwargs, output: self._leave(border.inner, tap, args, kwargs, output),
                prepend=True,
                with_kwargs=True,
                always_call=True,
            ),
        ]
        self._undo.extend(handle.remove for handle in handles)

    def remove(self) -> None:
        """Leave every module as it was found."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._tapped.clear()

    def _enter(self, module: nn.Module, tap: ModuleTap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.enter(module, args, kwargs)
        if self._mode is not None and self._mode.on:
            self._mode.turn_off()

    def _leave(
        self, module: nn.Module, tap: ModuleTap, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._mode is not None and tap.running:
            self._mode.turn_on()
        tap.leave(module, args, kwargs, output)

    def _call(self, compiled: Any, module: nn.Module, tap: ModuleTap, *args: Any, **kwargs: Any) -> Any:
        output = None
        self._enter(module, tap, args, kwargs)
        try:
            output = compiled(*args, **kwargs)
        finally:
            self._leave(module, tap, args, kwargs, output)
        return output
