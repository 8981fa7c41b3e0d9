"""What the taps of one eager capture share: where they record, how calls are numbered, which module is running."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from msprobe_graph.config.selection import Selection
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.records import Entry
from msprobe_graph.taps.likeness import EarlierCall, Likeness
from msprobe_graph.taps.recorder import Recorder

from .call_stacks import Anchor, CallStacks, Stack
from .module_backward import Edges
from .paths import Paths


class Counts(NamedTuple):
    """How many calls of some names have been counted."""

    calls: Mapping[str, int]
    within_modules: Mapping[tuple[str, str | None], int]


class Numbering:
    """Call numbers within one step: of a name in all, and of a name within one module."""

    def __init__(self) -> None:
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._within_modules: defaultdict[tuple[str, str | None], int] = defaultdict(int)
        self._ahead: list[Counts] = []
        """Where it was told to go since, as yet only noted: as a rule nobody asks any more in that step."""

    @property
    def calls(self) -> defaultdict[str, int]:
        """How many calls of each name have been counted."""
        if self._ahead:
            self._catch_up()
        return self._calls

    @property
    def within_modules(self) -> defaultdict[tuple[str, str | None], int]:
        """The same of a name within a module."""
        if self._ahead:
            self._catch_up()
        return self._within_modules

    def state(self) -> object:
        """Equal states have counted the same."""
        return dict(self._calls), list(self._ahead)

    def _catch_up(self) -> None:
        for counts in self._ahead:
            self._calls.update(counts.calls)
            self._within_modules.update(counts.within_modules)
        self._ahead.clear()

    def reset(self) -> None:
        """A new step: everything counts from 0 again."""
        self._ahead.clear()
        self._calls.clear()
        self._within_modules.clear()

    def next(self, name: str) -> int:
        """The number that the next call of `name` will bear: how many have been counted."""
        return self.calls.get(name, 0)

    def advance(self, name: str) -> int:
        """Count a call of `name`; what is returned is its number."""
        calls = self.calls
        number = calls[name]
        calls[name] = number + 1
        return number

    def stands_at(self, counts: Counts) -> bool:
        """Whether so many calls have been counted."""
        return _agree(self.calls, counts.calls) and _agree(self.within_modules, counts.within_modules)

    def go_to(self, counts: Counts) -> None:
        """Count calls up to there."""
        self._ahead.append(counts)

    def within(self, name: str, module: str | None) -> int:
        """Which call of `name` this is within `module`, counted by being asked."""
        key = (name, module)
        within = self.within_modules
        number = within[key]
        within[key] = number + 1
        return number


def _agree(counted: Mapping[Any, int], expected: Mapping[Any, int]) -> bool:
    if counted.keys().isdisjoint(expected.keys()):  # which looks at the fewer of the two
        return not any(expected.values())
    return all(counted.get(key, 0) == count for key, count in expected.items())


class Place(NamedTuple):
    """Where in the program a call stands: fields of its entry."""

    module: str | None
    number: int
    parent: str | None
    stack: Stack | None


class ModuleCall:
    """A module call whose forward runs."""

    __slots__ = (
        "anchor",
        "before",
        "earlier",
        "edges",
        "end",
        "entry",
        "inputs",
        "name",
        "number",
        "path",
        "prefix",
        "run",
    )

    def __init__(self, prefix: str, path: str, number: int, name: str | None) -> None:
        self.prefix = prefix
        self.path = path
        self.number = number
        self.name = name
        """Its entry's name; None at the levels that record no modules."""
        self.entry: Entry | None = None
        """Its entry, as far as it goes; None when it isn't wanted."""
        self.inputs: Likeness | None = None
        """What its inputs are like; None where that can't be told."""
        self.earlier: EarlierCall | None = None
        """What it was in an earlier step, if it begins like that."""
        self.edges: Edges | None = None
        """Where its inputs hang in the autograd graph; None when gradients aren't wanted."""
        self.anchor: Anchor | None = None
        """The frame that called it; None when stacks aren't wanted."""
        self.end: Callable[[], None] | None = None
        """To be called at its end: see Context.module_begins."""
        self.before = sys.exc_info()[1]
        """The exception that was being handled when the call began: a newer one at its end means that it raised."""
        self.run = 0
        """Which of the recorder's runs it began in."""

    def raised(self) -> BaseException | None:
        """What ended the call; None while it runs, or when it returned."""
        error = sys.exc_info()[1]
        return None if error is self.before else error


class RunningModules(threading.local):
    """The modules whose forward runs on this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[ModuleCall] = []

    @property
    def top(self) -> ModuleCall | None:
        return self.stack[-1] if self.stack else None


@dataclass
class Context:
    """Shared by the taps of one capture; `step` and `on` change, the rest stays."""

    recorder: Recorder
    selection: Selection
    boundary: Boundary
    stacks: CallStacks | None
    """None when extra_info is off."""
    numbering: Numbering = field(default_factory=Numbering)
    running: RunningModules = field(default_factory=RunningModules)
    paths: Paths = field(default_factory=Paths)
    quiet: Callable[[], AbstractContextManager[None]] = nullcontext
    """Gives contexts in which compiled code runs: this capture's mode sees nothing there."""
    module_begins: Callable[[], Callable[[], None] | None] | None = None
    """Called when a module's hooks find that its call begins; what it gives is called at the end."""
    level: str = "mix"
    """What is captured: L0, L1, mix or L2."""
    on: bool = False
    """Between start() and stop()."""
    step: int = 0

    def place(self, calls: str, anchor: Anchor | None) -> Place:
        """That of a function's call made at `anchor`; `calls` is what its number within the module counts."""
        inside = self.running.top
        module = inside.path if inside else None
        number = self.numbering.within(calls, module)
        return Place(module, number, inside.name if inside else None, anchor.stack if anchor else None)

    def anchor(self, frame: FrameType) -> Anchor | None:
        """An anchor at a frame inside of the running module's call; None when stacks aren't wanted."""
        inside = self.running.top
        return None if self.stacks is None else self.stacks.anchor(frame, inside.anchor if inside else None)

    def values(self, values: Any, stem: str, save: bool) -> list[Any]:
        """Positional arguments or outputs, measured: one record or nest for each."""
        value = self.recorder.value
        if not save:
            return [value(item, None) for item in values]
        return [value(item, f"{stem}.{index}") for index, item in enumerate(values)]

    def named(self, values: dict[str, Any], stem: str, save: bool) -> dict[str, Any]:
        """Keyword arguments or parameters, measured."""
        if not values:
            return {}
        value = self.recorder.value
        return {name: value(item, f"{stem}.{name}" if save else None) for name, item in values.items()}

    def parameters(self, module: nn.Module, stem: str, save: bool) -> dict[str, Any]:
        """A module's own parameters, measured."""
        if not save:
            return self.recorder.weights(module._parameters)
        return self.named({name: value for name, value in module._parameters.items() if value is not None}, stem, True)


def here(above: int = 1) -> FrameType:
    """The frame `above` callers up from the one that asks."""
    return sys._getframe(above + 1)


def spread(output: Any) -> tuple[Any, ...]:
    """What a call returned, as a list of outputs: a tuple is spread, anything else is one output."""
    return tuple(output) if isinstance(output, tuple) else (output,)
