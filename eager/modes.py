"""The two modes that see operators: torch's API calls for level L1, aten operators for level L2.

No torch function is patched, so functions that a program imported by name are seen too. Both modes are per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ._compat import compiler_at_work, on_stack, put_on_stack, take_off_stack

Record = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Records a call of a name and a function with its arguments: makes it, and returns what it returns."""


class Thread(threading.local):
    """What a mode is to know of the thread that it is called on."""

    def __init__(self) -> None:
        self.in_graph = False
        """A compiled graph runs: autograd's threads for devices have the modes of the thread that began a backward."""


class ApiMode(TorchFunctionMode):
    """Hands every call that `name` knows to `record`.

    A mode is off inside its own handler, so what a known function calls stays unseen: the outermost one is recorded.
    What an unknown one calls is seen where that is possible.
    """

    def __init__(self, name: Callable[[Any], str | None], record: Record) -> None:
        super().__init__()
        self._name = name
        self._record = record
        self.active = True
        """False lets every call pass unseen."""
        self.handling = 0
        """How many calls are being handled: the mode is off the stack meanwhile."""
        self.thread = Thread()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if type(func) is MethodWrapperType and self._name(func) is None:  # x.shape and the like, most of all calls
            return func(*args, **(kwargs or {}))
        # In a compiled region this is traced, and nothing of ours may end up in the compiled program; what a compiler
        # itself computes, as when a backward pass is compiled at its first run, is no part of the program.
        if torch.compiler.is_compiling() or compiler_at_work() or self.thread.in_graph:
            return func(*args, **(kwargs or {}))
        self.handling += 1
        try:
            name = self._name(func) if self.active else None
            if name is not None:
                return self._record(name, func, args, kwargs or {})
            inside = _inside(func) if self.active else None
            if inside is not None:
                put_on_stack(self)
                try:
                    return inside(*args, **(kwargs or {}))
                finally:
                    take_off_stack(self)
            return func(*args, **(kwargs or {}))
        finally:
            self.handling -= 1


_NO_QUESTION: dict[str, Any] = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *args: False
)


@cache
def _inside(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A Python function of torch's without its question to the modes; None for what is no Python function.

    Called with a mode on, the function itself would ask the mode again, without end. So its code runs in a copy of the
    function for which the answer is no; Tensor.backward, inside which activation checkpointing computes anew, is one
    that needs it.
    """
    wrapped: Callable[..., Any] | None = getattr(func, "__wrapped__", None)
    if wrapped is not None:
        return wrapped
    if not isinstance(func, FunctionType):
        return None
    asked = _NO_QUESTION.keys() & set(func.__code__.co_names) & func.__globals__.keys()
    if not asked:
        return None
    scope = {**func.__globals__, **_NO_QUESTION}
    copy = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


class AtenMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every aten (or custom) operator that `name` knows to `record`."""

    def __init__(self, name: Callable[[Any], str | None], record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name
        self._record = record
        self.active = True
        """False lets every operator pass unseen."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled: without this, the mode would switch it off."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = self._name(func) if self.active else None
        if name is None:
            return func(*args, **(kwargs or {}))
        return self._record(name, func, args, kwargs or {})


class ModeSwitch:
    """Puts one mode on this thread's stack and takes it off again, whatever the program has pushed meanwhile.

    A mode that can't be taken off now, because others stand on it or because it handles a call, is made passive
    instead, and taken off as soon as that is possible.
    """

    def __init__(self, mode: ApiMode | AtenMode) -> None:
        self.mode = mode
        self._entered = False

    @property
    def on(self) -> bool:
        return self._entered and self.mode.active

    def turn_on(self) -> None:
        self.mode.active = True
        if not self._entered:
            put_on_stack(self.mode)
            self._entered = True

    def learn(self) -> None:
        """Learn of it when others have taken the function mode off the stack: dynamo does so where a mode of the
        program is on across a graph break. Not to be called by what a handler does for itself."""
        if isinstance(self.mode, ApiMode) and not self.mode.handling and not on_stack(self.mode):
            self._entered = False

    @contextmanager
    def passive(self) -> Iterator[None]:
        """A context in which the mode sees nothing, wherever on the stack it stands."""
        before, self.mode.active = self.mode.active, False
        try:
            yield
        finally:
            self.mode.active = before

    @contextmanager
    def unseen_on_this_thread(self) -> Iterator[None]:
        """A context in which the function mode sees nothing of what this thread does."""
        assert isinstance(self.mode, ApiMode)
        thread = self.mode.thread
        outer, thread.in_graph = thread.in_graph, True
        try:
            yield
        finally:
            thread.in_graph = outer

    def turn_off(self) -> None:
        self.mode.active = False
        if self._entered and take_off_stack(self.mode):
            self._entered = False
