"""A compiled graph at run time: what its taps see becomes entries, as if the calls in it had run one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from msprobe_graph.dump.records import Hole
from msprobe_graph.eager._compat import unseen
from msprobe_graph.eager.context import Context

from . import tap_op
from ._compat import compiled_node
from .earlier import EarlierRun, EarlierRuns, Stage, Stages
from .entries import Entries
from .exact import REASONS
from .handoff import Compiled
from .numbered import Counted, Named
from .options import GraphOptions
from .plan import Plan
from .replay import Frame, Frames, Recorded
from .tap_op import invocations
from .verify import Verifier
from .watch import Watch

if TYPE_CHECKING:
    from msprobe_graph.taps.recorder import Recorder
    from msprobe_graph.taps.rows_in_graphs import RowsInGraphs

SITE = "a compiled graph"


class Region:
    """Calls what the inner backend made of a graph, and records the calls that the graph consists of.

    Where nothing captures the graph runs and nothing else happens. `rows` is where the taps measure when the graph, or
    part of it, becomes a CUDA graph: None where it can't.
    """

    def __init__(
        self,
        plan: Plan,
        compiled: Compiled,
        watch: Watch,
        options: GraphOptions,
        rows: RowsInGraphs | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self.plan = plan
        self.remarks = [*plan.holes, *compiled.remarks]
        """For the manifest of every step in which the graph runs."""
        self.reasons: dict[int, str] = {}
        """Why values are missing, by id, as far as the first tap of a graph has told."""
        self.replays = watch.replays
        self.frames = Frames(watch.replays, rows)
        self._compiled = compiled.call
        self._reports = compiled.reports
        self._running = watch.running
        self._boundary = watch.boundary
        self._options = options
        self._verifier = verifier
        self._verdict: dict[str, Any] | None = None
        self._earlier = EarlierRuns()
        if rows is not None:
            watch.replays.regions.append(weakref.ref(self))

    def description(self) -> dict[str, Any]:
        """What the manifest tells of the graph: see `dump.manifest`."""
        inner = self._options.inner
        programs = [
            {
                "pass": report.graph,
                "tapped": len(report.tapped),
                "nodes_before": report.before,
                "nodes_after": report.after,
            }
            for report in self._reports
        ]
        verdict = {} if self._verdict is None else {"verdict": self._verdict}
        return {
            **verdict,
            "inner": inner if isinstance(inner, str) else getattr(inner, "__name__", str(inner)),
            "fidelity": self._options.fidelity,
            "calls": len(self.plan.calls),
            "compiled": programs,
        }

    def __call__(self, *inputs: Any) -> Any:
        context = self._running()
        captured = self.frames.capturing
        if context is None or captured:
            if captured or (self.frames.followed and self.replays.listening):
                return self._lay_out(inputs, captured)
            return self._compiled(*inputs)
        if self._verifier is not None:
            verifier, self._verifier = self._verifier, None
            self._verdict = context.boundary.attempt(SITE, verifier.verdict, inputs)
        run = context.boundary.attempt(SITE, self._begin, context, inputs)
        if run is None:
            return self._compiled(*inputs)
        with listening(run, context):
            outputs = self._compiled(*inputs)
        context.boundary.attempt(SITE, run.finish, outputs)
        return outputs

    def _begin(self, context: Context, inputs: tuple[Any, ...]) -> Invocation | RunAgain:
        frame, number = self.frames.of_step(context.step), self._earlier.count(context.recorder)
        if frame is None or not frame.slots:
            earlier = self._earlier.find(number, context, inputs)
            if earlier is not None:
                return RunAgain(self, context, inputs, frame, number, earlier)
        return Invocation(self, context, inputs, frame, number)

    def note(self, recorder: Recorder) -> None:
        """For the manifest of the step in which the graph has run."""
        recorder.holes.extend(Hole(SITE, remark) for remark in self.remarks)
        recorder.graphs[id(self)] = self.description

    def keep(self, number: int, run: EarlierRun) -> None:
        """For the calls of this number in later steps."""
        self._earlier.keep(number, run)

    def learn(self, note: str) -> None:
        """Take in what the first tap of a graph tells: JSON, which values could not be tapped, and why."""
        missing: dict[str, str] = msgspec.json.decode(note)["missing"]
        for id_, code in missing.items():
            # Of a graph compiled in pieces, each piece says of what the others compute that it is not there.
            if code != "rewritten" or int(id_) not in self.reasons:
                self.reasons[int(id_)] = REASONS[code]

    def replayed(self, context: Context, frame: Frame) -> None:
        """Record a call that a CUDA graph may have replayed as a whole; the device will tell whether it has."""
        if frame.recorded is not None and frame.recorded.holds(context):
            frame.recorded.repeat(context)
        elif frame.slots:
            inputs = [frame.lasting.get(position) for position in range(frame.inputs)]
            with context.recorder.if_replayed(frame.rows, next(iter(frame.slots.values()))) as call:
                invocation = Invocation(self, context, inputs, frame)
                invocation.finish([None] * frame.outputs)
            frame.recorded = Recorded.of(call, self.plan, invocation.calls, frame.lasting.values(), context)

    def _lay_out(self, inputs: Sequence[Any], captured: bool) -> Any:
        """A call that nobody records: it is, or may in part be, captured as a CUDA graph."""
        listener = self._boundary.attempt(SITE, Listener, self, inputs, captured)
        if listener is None:
            return self._compiled(*inputs)
        invocations.push(listener)
        try:
            outputs = self._compiled(*inputs)
        finally:
            invocations.pop()
            if captured and self.frames.rows is not None:  # who called may write into what it gets
                self._boundary.attempt(SITE, self.frames.rows.join)
        if captured:
            self._boundary.attempt(SITE, listener.returned, outputs)
        return outputs


class Listener:
    """A call of a region that lays out what a CUDA graph is to measure, and records nothing."""

    def __init__(self, region: Region, inputs: Sequence[Any], captured: bool) -> None:
        """`captured`: the call itself is, not only what happens inside."""
        self._region = region
        self._frame = region.frames.of_round()
        self._saved = region.replays.saved(region.plan, inputs)
        self._captured = captured
        if captured:
            plan, frame = region.plan, self._frame
            lasting = {position for position, each in enumerate(inputs) if isinstance(each, torch.nn.Parameter)}
            frame.whole, frame.inputs = True, len(inputs)
            frame.lasting = {position: inputs[position] for position in lasting}
            self._measure({ref: inputs[position] for ref, position in plan.inputs.items() if position not in lasting})

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str, standing: bool = False) -> None:
        if note:
            self._region.learn(note)
        rows = self._region.frames.rows
        boundary = self._region.replays.boundary
        if self._region.frames.capturing:
            boundary.attempt(SITE, self._measure, dict(zip(ids, values, strict=True)), standing and self._captured)
        elif rows is not None:
            boundary.attempt(SITE, rows.prepare, values)

    def returned(self, outputs: Sequence[Any]) -> None:
        self._frame.outputs = len(outputs)
        self._measure({ref: outputs[position] for ref, position in self._region.plan.outputs.items()})

    def _measure(self, values: Mapping[int, Any], standing: bool = False) -> None:
        with unseen():
            self._frame.measure(self._region.plan, values, self._region.replays.padded, self._saved, standing)


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
        done: Sequence[Stage] = (),
    ) -> None:
        """`frame`: what CUDA graphs have captured of this call, if any have or may. `number`: the call's within its
        step; None if later ones are not to be like it. `done`: what of it has been read already."""
        self._region = region
        self._context = context
        self._step = context.step
        self._frame = frame
        self._inputs = tuple(inputs)
        self._number = number
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
        followed = self._context.selection.backward and torch.is_grad_enabled()
        with unseen(), torch.no_grad():
            self._take(*_present(self._region.plan.outputs, outputs))
            if self._frame is not None:
                entries.take_replayed(self._frame)
            holes = len(recorder.holes)
            entries.record_forward()
            if self._number is not None and not followed and (self._frame is None or not self._frame.slots):
                self._keep(self._number, recorder.holes[holes:])
        self._region.note(recorder)
        self._inputs = ()
        if followed:
            self._follow_backward(outputs)

    def _take(self, ids: Sequence[int], values: Sequence[Any]) -> None:
        """Inputs or outputs of the graph."""
        for ref, value in zip(ids, values, strict=True):
            self._entries.take(ref, value)
        self._stages.add(ids, values, self._entries.found)

    def _keep(self, number: int, holes: Sequence[Hole]) -> None:
        """For the calls of that number in later steps."""
        entries, plan = self._entries, self._region.plan
        counted = Counted.by(plan, entries.named)
        run = EarlierRun.of(
            self._context, self._inputs, counted, self._stages, entries.modules, entries.forward, holes
        )  # fmt: skip
        if run is not None:
            self._region.keep(number, run)

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
        self._stages = iter(earlier.stages)
        self._done: list[Stage] = []
        self._described: Invocation | None = None
        context.numbering.go_to(earlier.counted.after)
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
        if self._described is None and self._read(*_present(self._region.plan.outputs, outputs)):
            recorder = self._context.recorder
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
        stage = next(self._stages, None)
        with unseen():
            if stage is None or not stage.read(self._context.recorder, ids, values):
                return False
        self._done.append(stage)
        return True

    def _describe(self) -> Invocation:
        """What goes on with the run."""
        if self._described is None:
            self._context.numbering.go_to(self._earlier.counted.before)
            self._described = Invocation(
                self._region, self._context, self._inputs, self._frame, self._number, self._done
            )  # fmt: skip
        return self._described


def _present(positions: Mapping[int, int], values: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Those of the values that are there: their ids, and they themselves."""
    present = [(ref, values[position]) for ref, position in positions.items() if values[position] is not None]
    return [ref for ref, _ in present], [value for _, value in present]
