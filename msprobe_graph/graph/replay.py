"""Compiled code that a device replays as a CUDA graph: no Python of it runs, yet its taps measure.

What a tap does while a graph is captured becomes part of the graph. So it is then that a *frame* is made: which values
the taps of one call of a region measure, and into which slots. A step's entries are made from the frames when the step
is over, and the device tells which of them were replayed in it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.eager._compat import plainly, unseen
from msprobe_graph.taps.arrival import Shape
from msprobe_graph.taps.device import Accelerator
from msprobe_graph.taps.device import of as device_of
from msprobe_graph.taps.graph_copies import GraphCopies
from msprobe_graph.taps.plain_graph_rows import PlainGraphRows
from msprobe_graph.taps.rows import has_triton
from msprobe_graph.taps.versions import versions

from .numbered import Counted, Named
from .plan import Part, Plan
from .saving import Saving

if TYPE_CHECKING:
    from msprobe_graph.eager.context import Context
    from msprobe_graph.taps.arrival import Slot
    from msprobe_graph.taps.replayed import ReplayedCall
    from msprobe_graph.taps.rows_in_graphs import RowsInGraphs

    from .region import Region


class Recorded:
    """What a step has recorded of a call that is replayed as a whole. As long as it `holds`, it can be recorded again:
    but for the values, which come from the device, one step is like the other."""

    def __init__(self, call: ReplayedCall, counted: Counted, weights: Sequence[torch.Tensor], epoch: object) -> None:
        """`epoch`: the recorder's."""
        self._call = call
        self._counted = counted
        self._epoch = epoch
        with plainly():
            self._versions = versions(weights)

    @classmethod
    def of(
        cls,
        call: ReplayedCall,
        plan: Plan,
        named: Sequence[Named],
        lasting: Collection[torch.Tensor],
        context: Context,
    ) -> Recorded | None:
        """None where the next step may differ: calls are chosen by what went before, or records are kept, or files of
        the step are made, weights' among them."""
        if context.selection.saves_any or not (context.selection.everything and context.recorder.repeats):
            return None
        modules = (context.paths.module(each.module) for each in named)
        own = (weight for module in modules if module is not None for weight in module.parameters(recurse=False))
        weights = {id(weight): weight for weight in (*own, *lasting)}
        if any(weight.is_inference() for weight in weights.values()):  # these have no version
            return None
        return cls(call, Counted.by(plan, named), list(weights.values()), context.recorder.epoch)

    def holds(self, context: Context) -> bool:
        """Whether the calls would get the same numbers, and the weights are as they were."""
        if self._epoch is not context.recorder.epoch:
            return False
        with plainly():
            return context.numbering.stands_at(self._counted.before) and self._versions.stand()

    def repeat(self, context: Context) -> None:
        context.numbering.go_to(self._counted.after)
        context.recorder.replays.append(self._call)


class Frame:
    """One call of a region, as far as CUDA graphs have captured it."""

    def __init__(self, rows: RowsInGraphs) -> None:
        self.rows = rows
        self.slots: defaultdict[int, list[Slot]] = defaultdict(list)
        """By value id. More than one where graphs of several sizes can't share it."""
        self.dtypes: dict[int, torch.dtype] = {}
        self._within: dict[int, tuple[int, Part]] = {}
        """By the id of a value that is saved from the copy of another one: the id of that one, and which part."""
        self.lasting: dict[int, torch.Tensor] = {}
        """By position: the region's inputs that are parameters. None of them unless the call itself was captured."""
        self.whole = False
        """The call itself was captured, not only what is inside: then a replay calls no region."""
        self.inputs = 0
        self.outputs = 0
        """How many inputs and outputs the call had."""
        self.recorded: Recorded | None = None
        """What an earlier step has recorded of it, once one has."""
        self._measured: dict[int, bool] = {}
        """Ids of what has been measured since the call that is being captured began, and whether it is a batch."""
        self._apart: set[int] = set()
        """Ids of views that are measured themselves, though what they are views of is, too."""

    def begin(self) -> None:
        """A call begins."""
        self._measured.clear()

    def measure(
        self,
        plan: Plan,
        values: Mapping[int, torch.Tensor],
        padded: int | None,
        saved: Collection[int],
        joins: bool = False,
        standing: bool = False,
    ) -> None:
        """Have the graph that is being captured measure values of a plan, by id, and their parts, and copy those that
        are `saved`; but no views of what the call has measured already.

        joins: at its end the call has it `join`. padded, standing: see `RowsInGraphs.measure`.
        """
        views, batches = plan.views, {id: Shape.of(value, padded).batch for id, value in self._taken(values).items()}
        known = self._measured | batches
        viewed = {id for id in batches if views.get(id) in known}
        # Of batches only the rows count that are no padding.
        self._apart |= {id for id in viewed if id in plan.parts or batches[id] != known[views[id]]}
        own = {id: value for id, value in values.items() if id not in viewed or id in self._apart}
        if joins and not standing:
            copies = self.rows.keep(own)
            self._measure(plan, copies, padded, saved, standing=True)
            own = {id: value for id, value in own.items() if id not in copies}
        self._measure(plan, own, padded, saved, standing)

    def _measure(
        self,
        plan: Plan,
        values: Mapping[int, torch.Tensor],
        padded: int | None,
        saved: Collection[int],
        standing: bool,
    ) -> None:
        chosen = self._taken(plan.with_parts(values))
        self._measured.update((id, Shape.of(value, padded).batch) for id, value in chosen.items())
        within = {id: found for id, found in plan.columns.items() if found[0] in chosen and found[0] in saved}
        self._within.update((id, found) for id, found in within.items() if id in chosen)
        copied = [position for position, id in enumerate(chosen) if id in saved and id not in within]
        asked = [(self.slots.get(id, ()), value) for id, value in chosen.items()]
        taken = self.rows.measure(asked, padded, copied, standing)
        for (id, value), slot in zip(chosen.items(), taken, strict=True):
            self.dtypes[id] = value.dtype
            if slot not in self.slots[id]:
                self.slots[id].append(slot)

    def _taken(self, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {id: value for id, value in values.items() if self.rows.takes(value)}

    def is_had_from_another(self, plan: Plan, id: int) -> bool:
        """Whether the value is had from what it is a view of, even if a graph has measured it by itself."""
        return plan.views.get(id) in self.slots and id not in self._apart

    def sign(self, plan: Plan) -> Sequence[Slot]:
        """One of these is written whenever a graph of the whole call is replayed."""
        ids = (id for id in self.slots if not self.is_had_from_another(plan, id))
        return self.slots[next(ids)]

    def source(self, id: int) -> tuple[Sequence[Slot], Callable[[torch.Tensor], torch.Tensor]]:
        """Where a value is copied, and what gives it out of the copy there."""
        if id not in self._within:
            return self.slots[id], lambda copy: copy
        whole, part = self._within[id]
        slots, outer = self.source(whole)
        return slots, lambda copy: part.of(outer(copy))


class Frames:
    """The frames of one region, by the number of its call: within a round, a step or, where nobody tells rounds, in
    all. A step's calls that were captured in part only find theirs by their number."""

    def __init__(self, replays: Replays, rows: RowsInGraphs | None) -> None:
        self.rows = rows
        self.of_calls: list[Frame] = []
        self._replays = replays
        self._round: int | None = None
        self._step: int | None = None
        self._in_round = 0
        self.in_step = 0
        """How many calls the running step has had."""

    @property
    def followed(self) -> bool:
        return self.rows is not None

    @property
    def capturing(self) -> bool:
        """Whether what runs now in the current stream only becomes part of a graph."""
        return self.rows is not None and device_of(self.rows.device).capturing()

    def of_round(self) -> Frame:
        """Of the call that begins now, while graphs are captured."""
        round = self._replays.round
        if round is None:
            return self._frame(len(self.of_calls))
        if round != self._round:
            self._round, self._in_round = round, 0
        self._in_round += 1
        return self._frame(self._in_round - 1)

    def of_step(self, step: int) -> Frame | None:
        """Of the call that begins now, in a step."""
        if self.rows is None:
            return None
        if step != self._step:
            self._step, self.in_step = step, 0
        self.in_step += 1
        return self._frame(self.in_step - 1)

    def begin_step(self) -> None:
        """The calls of the running step count from 0 again."""
        self._step = None

    def not_called(self, step: int) -> list[Frame]:
        """The frames of calls that a step has not made, but that may have been replayed as a whole."""
        called = self.in_step if step == self._step else 0
        return [frame for frame in self.of_calls[called:] if frame.whole]

    def _frame(self, number: int) -> Frame:
        assert self.rows is not None
        while number >= len(self.of_calls):
            self.of_calls.append(Frame(self.rows))
        frame = self.of_calls[number]
        frame.begin()
        return frame


class Replays:
    """What one capture knows of CUDA graphs."""

    def __init__(self, boundary: Boundary, follows: bool = True, saving: Saving | None = None) -> None:
        """`follows`: False where what is wanted of values is more than a graph can measure (slices, checksums).
        `saving`: None where no tensors are saved."""
        self.boundary = boundary
        self.follows = follows
        self.saving = saving
        self.regions: list[weakref.ref[Region]] = []
        """Those that may be captured."""
        self.listening = False
        """Whether graphs may be captured inside of what is called now, though nobody records it."""
        self._padded: int | None = None
        self._round = 0
        self._rows: dict[torch.device, RowsInGraphs | None] = {}
        self._switched = False, 0, -1
        """As `switch` was told last."""

    def rows(self, inputs: Sequence[Any]) -> RowsInGraphs | None:
        """Where graphs of a region with these inputs have their rows; None where they can't be followed."""
        devices = (each.device for each in inputs if isinstance(each, torch.Tensor))
        device = next((each for each in devices if device_of(each).captures), None)
        return None if device is None else self.rows_on(device)

    def rows_on(self, device: torch.device) -> RowsInGraphs | None:
        """The same for a device."""
        if not (self.follows and device_of(device).captures):
            return None
        if device.index is None:
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        if device not in self._rows:
            made = self._rows[device] = self.boundary.attempt("CUDA graphs", _graph_rows, device, self.saving)
            if made is not None:
                made.switch(*self._switched)
        return self._rows[device]

    def begin_round(self, padded: int | None) -> None:
        """The model is called anew to be captured, with a batch of `padded` rows; calls of regions count from 0, so
        that all rounds share their frames."""
        self._round += 1
        self._padded = padded
        if self.saving is not None:
            self.saving.begin()

    def saved(self, plan: Plan, inputs: Sequence[Any]) -> Collection[int]:
        """The values of a graph, by id, that are to be saved of a call that begins now, while nobody records it."""
        if self.saving is None:
            return ()
        if not self.listening:  # nobody tells rounds
            self.saving.begin()
        return self.saving.values(plan, inputs)

    @property
    def padded(self) -> int | None:
        """Rows of the batch, padding included, that a graph is being captured for, if anyone has said."""
        return self._padded if self.listening else None

    @property
    def round(self) -> int | None:
        return self._round if self.listening else None

    @property
    def measuring(self) -> bool:
        """Whether graphs were told to."""
        return self._switched[0]

    def switch(self, on: bool, begin: int = 0, end: int = -1) -> None:
        """See `GraphRows.switch`."""
        self._switched = on, begin, end
        with unseen():
            for rows in self._rows.values():
                if rows is not None:
                    rows.switch(on, begin, end)

    def forget(self) -> None:
        """What was replayed and called since the last step counts for none."""
        for reference in self.regions:
            region = reference()
            if region is not None:
                region.frames.begin_step()
        self.switch(False)
        with unseen():
            for rows in self._rows.values():
                if rows is not None:
                    rows.arrive()

    def record(self, context: Context) -> None:
        """The step is over: record what may have been replayed in it."""
        for reference in self.regions:
            region = reference()
            if region is not None:
                for frame in region.frames.not_called(context.step):
                    self.boundary.attempt("CUDA graphs", region.replayed, context, frame)


def _graph_rows(device: torch.device, saving: Saving | None) -> RowsInGraphs:
    adapter = device_of(device)
    assert isinstance(adapter, Accelerator)
    copies = None if saving is None else GraphCopies(adapter, saving.most_bytes)
    if device.type == "cuda" and has_triton():
        from msprobe_graph.taps.graph_rows import GraphRows

        return GraphRows(device, copies)
    return PlainGraphRows(adapter, copies)
