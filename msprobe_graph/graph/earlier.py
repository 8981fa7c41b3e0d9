"""Runs of a graph that are like runs in earlier steps: only their values are read, into the records made then.

What taps/likeness.py does for single calls is done here for all calls of a graph at once. A compiled graph is the same
program each time: where its inputs have the same form, nobody has written to its weights, and its calls are to bear the
same numbers, its taps give values like those of the earlier run, in the same order. Each is looked at all the same, and
a run that goes on differently is described from there on.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from msprobe_graph.dump.records import Entry, Hole, Shared
from msprobe_graph.taps.likeness import FORMS, Likeness, is_weight

from .numbered import Counted, prefixes
from .plan import Part, Plan

if TYPE_CHECKING:
    from msprobe_graph.eager.context import Context
    from msprobe_graph.taps.recorder import Recorder

Found = Mapping[tuple[int, str | None], Any]
"""Records, by the id of a value and by the file where it is saved, if it is."""


class Read(NamedTuple):
    """A tensor that is measured: one of those that are given at a time, or a view of it."""

    id: int
    at: int
    views: tuple[Part | list[int], ...] = ()
    """Which part it is, or in which shape (-1: what is left), of what, and so on, the outermost first."""

    def of(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = given[self.at]
        for view in self.views:
            tensor = view.of(tensor) if isinstance(view, Part) else tensor.reshape(view)
        return tensor


class Stage(NamedTuple):
    """What is read at one time: when a graph is called, by one of its taps, or when it has returned."""

    ids: Sequence[int]
    """Of the values that are given then."""
    reads: Sequence[Read]
    likeness: Likeness
    """Of what is read."""
    shared: Sequence[Shared]
    """The records that have their statistics from others of this run."""
    found: Found

    def read(self, recorder: Recorder, ids: Sequence[int], given: Sequence[torch.Tensor]) -> bool:
        """Measure what is given, if it is like what was given then."""
        table = recorder.table
        if table is None or ids != self.ids:
            return False
        if not table.measure(self.likeness, [read.of(given) for read in self.reads]):
            return False
        recorder.share_again(self.shared)
        return True


class Stages:
    """Those of a run that is described, as far as it has come."""

    def __init__(self, plan: Plan, recorder: Recorder, done: Sequence[Stage] = ()) -> None:
        """`done`: what was read before it turned out that the run has to be described."""
        self.done = list(done)
        self.complete = True
        """Whether later runs can be like this one, so far."""
        self._plan = plan
        self._recorder = recorder
        self._run = recorder.run
        self._own: set[int] = set()
        """The Python ids of the records that come from what this run has read since it is described: none of them has
        its statistics from one that is older."""
        self._shared = len(recorder.shared)
        self._found = sum(len(stage.found) for stage in done)
        """So many records were shared, and found, before the running stage."""

    def add(self, ids: Sequence[int], given: Sequence[torch.Tensor], found: Found) -> None:
        """What was given has been described: `found` has the records of the run so far, in order."""
        recorder = self._recorder
        self.complete = self.complete and recorder.table is not None and recorder.run == self._run
        if not self.complete:
            return
        new = dict(islice(found.items(), self._found, None))
        sharing = {id(each[1]): each for each in recorder.shared[self._shared :]}
        self._found, self._shared = len(found), len(recorder.shared)
        reads: dict[int, Read] = {}
        """By the Python id of the record."""
        shared: list[Shared] = []
        for read in self._all(ids):
            record = id(found.get((read.id, None)))
            each = sharing.get(record)
            if record in self._own or _is_kept(read.of(given)):
                continue
            if each is not None and id(each[0]) in self._own:
                shared.append(each)
            else:
                reads[record] = read
            self._own.add(record)
        tensors = [read.of(given) for read in reads.values()]
        likeness = recorder.likeness(tensors, tensors, [found.get((read.id, None)) for read in reads.values()])
        self.complete = likeness is not None
        if likeness is not None:
            self.done.append(Stage(list(ids), list(reads.values()), likeness, shared, new))

    def _all(self, ids: Sequence[int]) -> Iterator[Read]:
        """All tensors that can be had of what is given, a whole in front of its views."""
        plan = self._plan
        left = deque(Read(id, index) for index, id in enumerate(ids))
        while left:
            read = left.popleft()
            yield read
            views: list[tuple[int, Part | list[int]]] = [(part.id, part) for part in plan.parts.get(read.id, ())]
            for view in plan.reshaped.get(read.id, ()):
                views.append((view, [-1 if size is None else size for size in plan.values[view].shape]))
            left.extend(Read(id, read.at, (*read.views, view)) for id, view in views)


def _is_kept(tensor: torch.Tensor) -> bool:
    """Whether it is a weight, which is not read again as long as nobody writes to it."""
    return is_weight(tensor) and not tensor.is_inference()


class Caller(NamedTuple):
    """The module call that a graph is called in."""

    path: str | None
    name: str | None

    @classmethod
    def now(cls, context: Context) -> Caller:
        inside = context.running.top
        return cls(None, None) if inside is None else cls(inside.path, inside.name)


class EarlierRun(NamedTuple):
    """A run of a graph in an earlier step."""

    epoch: object
    """The recorder's, then."""
    caller: Caller
    prefixes: Mapping[str, str]
    """See `numbered.prefixes`."""
    counted: Counted
    inputs: Likeness
    """Of the inputs when it began, as a graph may write to its weights."""
    parameters: Likeness
    """Of those of its modules."""
    modules: Sequence[weakref.ref[nn.Module]]
    stages: Sequence[Stage]
    entries: Mapping[str, Entry]
    holes: Sequence[Hole]

    def begins(self, plan: Plan, context: Context, inputs: tuple[Any, ...]) -> bool:
        """Whether a run that begins now begins like this one."""
        table = context.recorder.table
        if table is None or self.epoch is not context.recorder.epoch or self.caller != Caller.now(context):
            return False
        modules = [module() for module in self.modules]
        parameters = [module._parameters for module in modules if module is not None]
        return (
            context.numbering.stands_at(self.counted.before)
            and table.measure(self.inputs, inputs)
            and table.measure(self.parameters, parameters)
            and prefixes(plan, context, inputs) == self.prefixes
        )


class EarlierRuns:
    """Those of one graph that are kept."""

    def __init__(self) -> None:
        self._runs: defaultdict[int, list[EarlierRun]] = defaultdict(list)
        """By the number of the call of the graph within its step; those that were met last in front."""
        self._epoch: object = None
        self._step = 0
        self._next = 0

    def count(self, recorder: Recorder) -> int:
        """The number of the call that begins now."""
        if recorder.epoch is not self._epoch:
            self._epoch = recorder.epoch
            self._runs.clear()
        if recorder.run != self._step:
            self._step, self._next = recorder.run, 0
        self._next += 1
        return self._next - 1

    def find(self, number: int, plan: Plan, context: Context, inputs: tuple[Any, ...]) -> EarlierRun | None:
        """One that the call of this number begins like."""
        runs = self._runs[number]
        at = next((at for at, run in enumerate(runs) if run.begins(plan, context, inputs)), None)
        if at is None:
            return None
        runs.insert(0, runs.pop(at))
        return runs[0]

    def keep(self, number: int, run: EarlierRun) -> None:
        """For later calls of this number."""
        self._runs[number] = [run, *self._runs[number]][:FORMS]
