"""The one operator that taps are, whatever put them in: ``torch.ops.msprobe_graph.tap(values, ids, note)``.

It hands ``values[i]`` under the value id ``ids[i]`` to the invocation that runs in this thread, and returns nothing::

    torch.ops.msprobe_graph.tap.default([buf3, buf5], [22, 30], '')

It claims no mutation and has no outputs, so no compiler orders, copies or keeps anything for its sake beyond the values
it reads; it counts as a side effect, so none drops it. What generated code calls carries graph-local ids only: the same
cached artifact serves every region with the same graph.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch


class Invocation(Protocol):
    """One run of a compiled region."""

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str, standing: bool = False) -> None:
        """`values` are the compiled program's own buffers: read them now, they may be overwritten right after. Those
        that are `standing` are overwritten by nothing that the program does before a tap of no values, and not if there
        is none; but where nobody has a reference to them any more their memory serves others."""


class Invocations(threading.local):
    """The invocations that run in this thread, the innermost last. Each thread has its own, empty at first."""

    def __init__(self) -> None:
        self._running: list[Invocation] = []
        self.top: Invocation | None = None
        """The innermost; None when none runs."""

    def push(self, invocation: Invocation) -> None:
        self._running.append(invocation)
        self.top = invocation

    def pop(self) -> Invocation:
        """Take the innermost away and return it."""
        invocation = self._running.pop()
        self.top = self._running[-1] if self._running else None
        return invocation


invocations = Invocations()

# Registered by hand: torch.library.custom_op puts wrappers in Python around each call that cost 40 us (and 100 us with
# sixteen values), this is 5 us (20 us).
_library = torch.library.Library("msprobe_graph", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("tap(Tensor[] values, int[] ids, str note) -> ()")  # type: ignore[no-untyped-call]
_library.define("tap_standing(Tensor[] values, int[] ids, str note) -> ()")  # type: ignore[no-untyped-call]
_library.define("note(str note) -> ()")  # type: ignore[no-untyped-call]
_library.define("keep() -> ()")  # type: ignore[no-untyped-call]


def tap(values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
    """What the operator does. Generated Python calls it past the dispatcher, which costs 10 us even if none listens."""
    invocation = invocations.top
    if invocation is not None:
        invocation.receive(values, ids, note)


def tap_standing(values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
    """The same for values that are standing: see `Invocation.receive`."""
    invocation = invocations.top
    if invocation is not None:
        invocation.receive(values, ids, note, standing=True)


def hold(values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
    """What generated Python calls up to where values are standing: the compiler keeps their memory for them until then.
    Its other arguments are those of a tap, and empty."""


def _note(note: str) -> None:
    tap([], [], note)


def _nothing(*_: object) -> None:
    pass


for _does in (tap, tap_standing):
    _library.impl(_does.__name__, _does, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl(_does.__name__, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    _library.impl(_does.__name__, _nothing, "Meta")  # type: ignore[no-untyped-call]
_library.impl("note", _note, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("note", _nothing, "Meta")  # type: ignore[no-untyped-call]
_library.impl("keep", _nothing, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

TAP: torch._ops.OpOverload = torch.ops.msprobe_graph.tap.default
TAP_STANDING: torch._ops.OpOverload = torch.ops.msprobe_graph.tap_standing.default
NOTE: torch._ops.OpOverload = torch.ops.msprobe_graph.note.default
"""A tap of no values. Inductor has to be told where it is: see inductor_compat."""
KEEP: torch._ops.OpOverload = torch.ops.msprobe_graph.keep.default
"""A mark at the start of a graph, without code: while Inductor lowers it, everything lowered is kept findable."""

for _operator in (TAP, TAP_STANDING, NOTE, KEEP):
    torch.fx.node.has_side_effect(_operator)
