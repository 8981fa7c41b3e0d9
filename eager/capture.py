"""Eager capture of a model: which taps a level needs, and when they are in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.config.selection import Selection
from msprobe_graph.config.settings import Settings
from msprobe_graph.dump.records import Entry, Hole
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.taps.recorder import Recorder

from .backward import Backward
from .call_stacks import CallStacks
from .calls import Calls
from .compiled import Border, BorderTaps, split
from .context import Context
from .modes import ApiMode, AtenMode, ModeSwitch
from .modules import ModuleHooks


class EagerCapture:
    """Captures what runs eagerly on the thread that called `start`, until `stop`.

    | level | taps |
    |---|---|
    | L0 | hooks on each module, hooks on autograd's nodes |
    | L1 | a function mode, hooks on autograd's nodes; module hooks only to know where a call stands |
    | mix | L0 and L1 |
    | L2 | a dispatch mode; module hooks only to know where an operator stands |

    Operators that run on other threads (a DataParallel replica, a backward pass on a GPU) are not seen by the modes.
    """

    def __init__(self, settings: Settings, recorder: Recorder, boundary: Boundary, operators: OperatorTable) -> None:
        stacks = CallStacks() if settings.extra_info else None
        self._context = Context(recorder, Selection(settings, operators.risk), boundary, stacks)
        self._backward = Backward(self._context)
        self._hooks = ModuleHooks(self._context, self._backward, records=settings.level in ("L0", "mix"))
        self._mode: ModeSwitch | None = None
        if settings.level in ("L1", "mix"):
            self._mode = ModeSwitch(ApiMode(operators.name, Calls(self._context, operators.as_written, self._backward).record))
        elif settings.level == "L2":
            self._mode = ModeSwitch(AtenMode(operators.aten_name, Calls(self._context, operators.as_written, None).record))
        self._borders = BorderTaps(self._mode)
        self._compiled: list[Border] = []

    def watch(self, models: Mapping[str, nn.Module]) -> None:
        """Put hooks on the models, given by the prefix of their modules' names ("" for a single model)."""
        for prefix, model in models.items():
            eager, borders = split(model, prefix)
            self._hooks.install(eager)
            for border in borders:
                if border.inner not in self._hooks.taps:
                    self._borders.install(border, self._hooks.tap(border.path, border.inner))
                    self._compiled.append(border)

    def start(self) -> None:
        self._context.on = True
        if self._mode is not None:
            self._mode.turn_on()

    def stop(self) -> None:
        self._context.on = False
        if self._mode is not None:
            self._mode.turn_off()

    def remove(self) -> None:
        """Leave the models as they were found."""
        self.stop()
        self._hooks.remove()
        self._borders.remove()
        self._compiled.clear()

    def begin_step(self, number: int) -> None:
        """Step `number`: call numbers and windows start anew."""
        self._context.step = number
        self._context.numbering.reset()
        self._context.selection.reset()
        self._backward.reset()

    def rest(self) -> list[Entry]:
        """Entries that only the step's end completes."""
        return self._backward.rest()

    def sites(self) -> tuple[int, int, list[Hole]]:
        """Of the modules watched: how many should have an entry in this step, how many have, and why the others haven't."""
        context = self._context
        holes = [
            Hole(inside, "it runs inside a compiled region: capture it in graph mode")
            for border in self._compiled
            for inside in border.inside
        ]
        if not self._hooks.records or not context.selection.forward:
            return 0, 0, holes
        expected = [tap for tap in self._hooks.taps.values() if context.selection.may_want_module(tap.prefix)]
        missing = [tap for tap in expected if not context.numbering.next(tap.prefix)]
        holes += [Hole(tap.prefix, "its forward did not run in this step") for tap in missing]
        return len(expected), len(expected) - len(missing), holes
