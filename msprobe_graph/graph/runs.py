"""One run of a compiled graph: what its taps see becomes entries, as if the calls in it had run one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from msprobe_graph.dump.records import Hole
from msprobe_graph.eager._compat import unseen
from msprobe_graph.eager.context import Context
from msprobe_graph.taps.likeness import form

from . import tap_op
from ._compat import compiled_node
from .earlier import Caller, EarlierRun, Stage, Stages
from .entries import Entries
from .numbered import Counted, Named
from .tap_op import invocations

if TYPE_CHECKING:
    from .region import Region
    from .replay import Frame

SITE = "a compiled graph"


@contextmanager
def listening(run: tap_op.Invocation, context: Context) -> Iterator[None]:
    """A context in which the taps on this thread are this run's, and nobody else looks."""
    invocations.push(run)
    try:
        with context.quiet():
            yield
    finally:
        invocations.pop()


class Invocation:
    """One run of a region, and of its backward pass, that is described: from it come names and records."""

    def __init__(
        self,
        region: Region,
        context: Context,
        inputs: Sequence[Any],
        frame: Frame | None,
        number: int | None = None,
        like: EarlierRun | None = None,
        done: Sequence[Stage] = (),
    ) -> None:
        """`frame`: what CUDA graphs have captured of this call, if any have or may. `number`: the call's within its
        step; None if later ones are not to be like it. `like`: the run that it began like; `done`, what of it has been
        read since."""
        self._region = region
        self._context = context
        self._step = context.step
        self._frame = frame
        self._followed = context.selection.backward and torch.is_grad_enabled()
        self._number = None if self._followed else number
        self._stages: Stages | None = None
        """None where no later run can be like this one."""
        self._form = None
        selection = context.selection
        if self._number is not None and selection.everything and not selection.saves_any:
            self._form = form(tuple(inputs)) if like is None else like.inputs
            self._stages = Stages(region.plan, context.recorder, done)
        found = {key: record for stage in done for key, record in stage.found.items()}
        self._entries = Entries(region.plan, context, inputs, region.reasons, found)
        if not done:
            with unseen(), torch.no_grad():
                self._take(*_present(region.plan.inputs, inputs))

    @property
    def calls(self) -> list[Named]:
        """The calls in the graph, as they are called in this run."""
        return self._entries.named

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str, standing: bool = False) -> None:
        """What a tap calls. `note` comes with the first one of a graph: JSON that tells what could not be tapped."""
        if self._context.on and self._context.step == self._step:
            self._context.boundary.attempt(SITE, self._receive, values, ids, note)

    def finish(self, outputs: Sequence[Any]) -> None:
        """The graph has returned `outputs`: its entries are complete."""
        recorder, entries = self._context.recorder, self._entries
        with unseen(), torch.no_grad():
            self._take(*_present(self._region.plan.outputs, outputs))
            replayed = self._frame is not None and entries.take_replayed(self._frame)
            holes = len(recorder.holes)
            entries.record_forward()
            if not replayed:
                self._keep(recorder.holes[holes:])
        self._region.note(recorder)
        if self._followed:
            self._follow_backward(outputs)

    def _take(self, ids: Sequence[int], values: Sequence[Any]) -> None:
        """Inputs or outputs of the graph."""
        for ref, value in zip(ids, values, strict=True):
            self._entries.take(ref, value)
        if self._stages is not None:
            self._stages.add(ids, values, self._entries.found)

    def _keep(self, holes: Sequence[Hole]) -> None:
        """For the calls of the same number in later steps."""
        entries, stages, inputs = self._entries, self._stages, self._form
        parameters = form([module._parameters for module in entries.modules])
        if stages is None or not stages.complete or inputs is None or parameters is None or self._number is None:
            return
        run = EarlierRun(
            epoch=self._context.recorder.epoch,
            caller=Caller.now(self._context),
            prefixes=entries.prefixes,
            counted=Counted.by(self._region.plan, entries.named),
            inputs=inputs,
            parameters=parameters,
            modules=[weakref.ref(module) for module in entries.modules],
            stages=stages.done,
            entries=entries.forward,
            holes=holes,
        )
        self._region.keep(self._number, run)

    def _receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
        if note:
            self._region.learn(note)
        with unseen():
            if self._frame is not None and self._region.frames.capturing:
                seen = dict(zip(ids, values, strict=True))
                padding = self._context.recorder.padding
                padded = None if padding is None else padding.padded
                self._frame.measure(self._region.plan, seen, padded, self._entries.saved)
                return
            for ref, value in zip(ids, values, strict=True):
                self._entries.take_passing(ref, value)
            if self._stages is not None:
                self._stages.add(ids, values, self._entries.found)

    def _follow_backward(self, outputs: Sequence[Any]) -> None:
        """Listen while the graph's backward pass runs, too."""
        node = next((found for output in outputs if (found := compiled_node(output)) is not None), None)
        if node is not None:
            running = ExitStack()
            node.register_prehook(lambda given: running.enter_context(listening(self, self._context)))
            node.register_hook(lambda gives, given: self._backward_done(running))

    def _backward_done(self, running: ExitStack) -> None:
        running.close()
        if self._context.on and self._context.step == self._step:
            with unseen(), torch.no_grad():
                self._context.boundary.attempt(SITE, self._entries.record_backward)


class RunAgain:
    """One run of a region that is like one in an earlier step, as far as it has come: its values are read into the
    records made then. From where it goes on differently it is described."""

    def __init__(
        self,
        region: Region,
        context: Context,
        inputs: tuple[Any, ...],
        frame: Frame | None,
        number: int,
        earlier: EarlierRun,
    ) -> None:
        self._region = region
        self._context = context
        self._step = context.step
        self._inputs = inputs
        self._frame = frame
        self._number = number
        self._earlier = earlier
        self._run = context.recorder.run
        self._done: list[Stage] = []
        """The stages of the earlier run that have been read."""
        self._described: Invocation | None = None
        if not self._read(*_present(region.plan.inputs, inputs)):
            self._describe()

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str, standing: bool = False) -> None:
        """What a tap calls, as `Invocation.receive`."""
        if self._described is not None:
            self._described.receive(values, ids, note)
        elif self._context.on and self._context.step == self._step:
            self._context.boundary.attempt(SITE, self._receive, values, ids, note)

    def finish(self, outputs: Sequence[Any]) -> None:
        """The graph has returned `outputs`."""
        recorder = self._context.recorder
        if recorder.run != self._run:  # another step has begun meanwhile
            return
        if self._described is None and self._read(*_present(self._region.plan.outputs, outputs)):
            self._context.numbering.go_to(self._earlier.counted.after)
            recorder.entries.update(self._earlier.entries)
            recorder.holes.extend(self._earlier.holes)
            self._region.note(recorder)
        else:
            self._describe().finish(outputs)

    def _receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
        if not self._read(ids, values):
            self._describe().receive(values, ids, note)

    def _read(self, ids: Sequence[int], values: Sequence[Any]) -> bool:
        """Whether the next stage is like that of the earlier run: then it is read."""
        stages = self._earlier.stages
        stage = stages[len(self._done)] if len(self._done) < len(stages) else None
        with unseen():
            if stage is None or not stage.read(self._context.recorder, ids, values):
                return False
        self._done.append(stage)
        return True

    def _describe(self) -> Invocation:
        """What goes on with the run."""
        if self._described is None:
            self._described = Invocation(
                self._region, self._context, self._inputs, self._frame, self._number, self._earlier, self._done
            )
        return self._described


def _present(positions: Mapping[int, int], values: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Those of the values that are there: their ids, and they themselves."""
    present = [(ref, values[position]) for ref, position in positions.items() if values[position] is not None]
    return [ref for ref, _ in present], [value for _, value in present]
