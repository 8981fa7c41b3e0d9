"""A compiled graph at run time: what its taps see becomes entries, as if the calls in it had run one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch

from msprobe_graph.dump.records import Hole
from msprobe_graph.eager._compat import unseen
from msprobe_graph.eager.context import Context

from ._compat import compiled_node
from .entries import Entries
from .exact import REASONS
from .handoff import Compiled
from .options import GraphOptions
from .plan import Plan
from .tap_op import invocations
from .verify import Verifier

SITE = "a compiled graph"


class Region:
    """Calls what the inner backend made of a graph, and records the calls that the graph consists of.

    `running` gives what captures now on this thread, or None: then the graph runs and nothing else happens.
    """

    def __init__(
        self,
        plan: Plan,
        compiled: Compiled,
        running: Callable[[], Context | None],
        options: GraphOptions,
        verifier: Verifier | None = None,
    ) -> None:
        self.plan = plan
        self.remarks = [*plan.holes, *compiled.remarks]
        """For the manifest of every step in which the graph runs."""
        self.reasons: dict[int, str] = {}
        """Why values are missing, by id, as far as the first tap of a graph has told."""
        self._compiled = compiled.call
        self._reports = compiled.reports
        self._running = running
        self._options = options
        self._verifier = verifier
        self._verdict: dict[str, Any] | None = None

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
        if context is None:
            return self._compiled(*inputs)
        if self._verifier is not None:
            verifier, self._verifier = self._verifier, None
            self._verdict = context.boundary.attempt(SITE, verifier.verdict, inputs)
        invocation = context.boundary.attempt(SITE, Invocation, self, context, inputs)
        if invocation is None:
            return self._compiled(*inputs)
        with invocation.listening():
            outputs = self._compiled(*inputs)
        context.boundary.attempt(SITE, invocation.finish, outputs)
        return outputs


class Invocation:
    """One run of a region, and of its backward pass."""

    def __init__(self, region: Region, context: Context, inputs: Sequence[Any]) -> None:
        self._region = region
        self._context = context
        self._step = context.step
        self._entries = Entries(region.plan, context, inputs, region.reasons)
        with unseen(), torch.no_grad():
            for ref, position in region.plan.inputs.items():
                self._entries.take(ref, inputs[position])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the taps on this thread are ours, and nobody else looks."""
        invocations.push(self)
        try:
            with self._context.quiet():
                yield
        finally:
            invocations.pop()

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
        """What a tap calls. `note` comes with the first one of a graph: JSON that tells what could not be tapped."""
        if self._context.on and self._context.step == self._step:
            self._context.boundary.attempt(SITE, self._receive, values, ids, note)

    def finish(self, outputs: Sequence[Any]) -> None:
        """The graph has returned `outputs`: its entries are complete."""
        with unseen(), torch.no_grad():
            for ref, position in self._region.plan.outputs.items():
                self._entries.take(ref, outputs[position])
            self._entries.record_forward()
        recorder = self._context.recorder
        recorder.holes.extend(Hole(SITE, remark) for remark in self._region.remarks)
        recorder.graphs[id(self._region)] = self._region.description
        if self._context.selection.backward and torch.is_grad_enabled():
            self._follow_backward(outputs)

    def _receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
        if note:
            missing: dict[str, str] = msgspec.json.decode(note)["missing"]
            for id_, code in missing.items():
                # Of a graph compiled in pieces, each piece says of what the others compute that it is not there.
                if code != "rewritten" or int(id_) not in self._region.reasons:
                    self._region.reasons[int(id_)] = REASONS[code]
        with unseen():
            for ref, value in zip(ids, values, strict=True):
                self._entries.take_passing(ref, value)

    def _follow_backward(self, outputs: Sequence[Any]) -> None:
        """Listen while the graph's backward pass runs, too."""
        node = next((found for output in outputs if (found := compiled_node(output)) is not None), None)
        if node is not None:
            running = ExitStack()
            node.register_prehook(lambda given: running.enter_context(self.listening()))
            node.register_hook(lambda gives, given: self._backward_done(running))

    def _backward_done(self, running: ExitStack) -> None:
        running.close()
        if self._context.on and self._context.step == self._step:
            with unseen(), torch.no_grad():
                self._context.boundary.attempt(SITE, self._entries.record_backward)
