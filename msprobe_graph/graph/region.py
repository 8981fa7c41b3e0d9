"""A compiled graph at run time: who calls it, and whether its runs are recorded, followed or left alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from msprobe_graph.dump.records import Hole
from msprobe_graph.eager._compat import unseen
from msprobe_graph.eager.context import Context

from .beside import NOT_TAKEN
from .earlier import EarlierRun, EarlierRuns
from .exact import REASONS
from .handoff import Compiled
from .options import GraphOptions
from .plan import Plan
from .replay import Frame, Frames, Recorded
from .runs import SITE, Invocation, RunAgain, listening
from .tap_op import invocations
from .verify import Verifier
from .watch import Watch

if TYPE_CHECKING:
    from msprobe_graph.taps.recorder import Recorder
    from msprobe_graph.taps.rows_in_graphs import RowsInGraphs


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
        self.reasons = dict.fromkeys(plan.not_taken, NOT_TAKEN)
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
        if self.plan.beside is not None:
            inputs += tuple(self.plan.beside.now(self.plan.values))
        earlier = self._earlier.find(number, self.plan, context, inputs)
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
            with context.recorder.if_replayed(frame.rows, frame.sign(self.plan)) as call:
                invocation = Invocation(self, context, inputs, frame)
                invocation.finish([None] * frame.outputs)
            frame.recorded = Recorded.of(call, self.plan, invocation.calls, frame.lasting.values(), context)

    def _lay_out(self, inputs: Sequence[Any], captured: bool) -> Any:
        """A call that nobody records: it is, or may in part be, captured as a CUDA graph."""
        listener = self._boundary.attempt(SITE, Listener, self, inputs, captured)
        if listener is None:
            if captured and self.frames.rows is not None:  # some of it may have begun
                with unseen():
                    self._boundary.attempt(SITE, self.frames.rows.join)
            return self._compiled(*inputs)
        invocations.push(listener)
        try:
            outputs = self._compiled(*inputs)
            if captured:
                self._boundary.attempt(SITE, listener.returned, outputs)
        finally:
            invocations.pop()
            if captured:  # who called may write into what it gets
                self._boundary.attempt(SITE, listener.join)
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
            frame.whole, frame.inputs = True, len(inputs) + len(plan.not_taken)
            frame.lasting = {position: inputs[position] for position in lasting}
            taken = ((ref, position) for ref, position in plan.inputs.items() if ref not in plan.not_taken)
            self._measure({ref: inputs[position] for ref, position in taken if position not in lasting})

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str, standing: bool = False) -> None:
        if note:
            self._region.learn(note)
        rows = self._region.frames.rows
        boundary = self._region.replays.boundary
        if self._region.frames.capturing:
            boundary.attempt(SITE, self._receive, values, ids, standing and self._captured)
        elif rows is not None:
            boundary.attempt(SITE, rows.prepare, values)

    def returned(self, outputs: Sequence[Any]) -> None:
        self._frame.outputs = len(outputs)
        self._measure({ref: outputs[position] for ref, position in self._region.plan.outputs.items()}, standing=True)

    def _receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], standing: bool) -> None:
        if values:
            self._measure(dict(zip(ids, values, strict=True)), standing)
        elif self._captured:
            self.join()

    def join(self) -> None:
        """See `RowsInGraphs.join`."""
        with unseen():
            self._frame.rows.join()

    def _measure(self, values: Mapping[int, Any], standing: bool = False) -> None:
        plan, padded = self._region.plan, self._region.replays.padded
        with unseen():
            self._frame.measure(plan, values, padded, self._saved, self._captured, standing)
