"""A compiled graph at run time: what its taps see becomes entries, as if the calls in it had run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from msprobe_graph.dump.names import api_entry, module_call, module_prefix
from msprobe_graph.dump.records import Entry, Hole, TensorRecord
from msprobe_graph.eager._compat import unseen
from msprobe_graph.eager.context import Context

from .exact import REASONS
from .plan import Call, Place, Plan, Ref, refs
from .tap_op import invocations

NOT_SEEN = "the compiled program does not hold it in memory"


class Region:
    """Calls what the inner backend made of a graph, and records the calls that the graph consists of.

    `running` gives what captures now on this thread, or None: then the graph runs and nothing else happens.
    """

    def __init__(
        self, plan: Plan, compiled: Callable[..., Any], running: Callable[[], Context | None], holes: Sequence[str] = ()
    ) -> None:
        self.plan = plan
        self.reasons: dict[int, str] = {}
        """Why values are missing, by id, as far as the graph's first tap has told."""
        self._compiled = compiled
        self._running = running
        self._holes = [*plan.holes, *holes]

    def __call__(self, *inputs: Any) -> Any:
        context = self._running()
        if context is None:
            return self._compiled(*inputs)
        site = "a compiled graph"
        invocation = context.boundary.attempt(site, Invocation, self, context, inputs)
        if invocation is None:
            return self._compiled(*inputs)
        with invocation.listening():
            outputs = self._compiled(*inputs)
        context.boundary.attempt(site, invocation.finish, outputs)
        return outputs


class Invocation:
    """One run of a region."""

    def __init__(self, region: Region, context: Context, inputs: Sequence[Any]) -> None:
        self._region = region
        self._context = context
        self._plan = region.plan
        self._prefixes = _prefixes(self._plan, context, inputs)
        self._names: list[str] = []
        self._numbers: list[int] = []
        self._wanted: list[bool] = []
        self._found: dict[tuple[int, str | None], Any] = {}
        self._number_calls()
        self._stems = self._files()
        with unseen(), torch.no_grad():
            for ref, position in self._plan.inputs.items():
                self._take(ref, inputs[position])

    @contextmanager
    def listening(self) -> Any:
        """A context in which the taps on this thread are ours."""
        invocations.push(self)
        try:
            yield
        finally:
            invocations.pop()

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str) -> None:
        """What a tap calls."""
        if note:
            self._region.reasons.update(note_reasons(note))
        self._context.boundary.attempt("a compiled graph", self._receive, values, ids)

    def finish(self, outputs: Sequence[Any]) -> None:
        """The graph has returned `outputs`: its entries are complete."""
        with unseen(), torch.no_grad():
            for ref, position in self._plan.outputs.items():
                self._take(ref, outputs[position])
        calls = self._plan.calls
        for index in sorted(range(len(calls)), key=lambda index: calls[index].end):
            if self._wanted[index]:
                self._record(index, calls[index])
        self._context.recorder.holes.extend(Hole("a compiled graph", hole) for hole in self._region._holes)

    def _number_calls(self) -> None:
        """Give every call its number and its name, and ask whether it is wanted, in the order of the program."""
        context, selection = self._context, self._context.selection
        modules, apis = context.level in ("L0", "mix"), context.level in ("L1", "mix")
        ending: list[int] = []
        calls = self._plan.calls
        for index, call in enumerate(calls):
            while ending and calls[ending[-1]].end < call.begin:
                selection.leave(self._names[ending.pop()])
            prefix = self._prefix(call)
            number = context.numbering.next(prefix)
            context.numbering.advance(prefix)
            if call.kind == "module":
                name = module_call(prefix, "forward", number)
                selection.enter(name)
                ending.append(index)
                wanted = modules and selection.wants_module(name)
            else:
                name = api_entry(prefix, number, "forward")
                wanted = apis and selection.may_want_api(prefix) and selection.wants_api(name)
            self._names.append(name)
            self._numbers.append(number)
            self._wanted.append(wanted and selection.forward)
        while ending:
            selection.leave(self._names[ending.pop()])

    def _prefix(self, call: Call) -> str:
        return call.name if call.kind == "api" else module_prefix(self._path(call.place) or "", call.name)

    def _path(self, place: Place | None) -> str | None:
        """The qualified name of the module at `place`."""
        if place is None:
            return None
        prefix = self._prefixes.get(place.root, "")
        return f"{prefix}.{place.path}" if prefix and place.path else prefix or place.path

    def _files(self) -> dict[int, list[str]]:
        """By id of a value: the starts of the names of the files it is to be saved in."""
        stems: dict[int, list[str]] = {}
        for index, call in enumerate(self._plan.calls):
            if self._wanted[index] and self._context.selection.saves(self._names[index]):
                for _, part, nest in self._parts(call):
                    _stems(nest, f"{self._names[index]}.{part}", stems)
        return stems

    def _parts(self, call: Call) -> list[tuple[str, str, Any]]:
        """What is asked for of a call: as dump.json calls it, as file names call it, and the nest."""
        selection = self._context.selection
        parts: list[tuple[str, str, Any]] = []
        if selection.inputs:
            parts += [("input_args", "input", call.args), ("input_kwargs", "kwargs", call.kwargs)]
        if selection.outputs:
            parts.append(("output", "output", call.output))
        return parts

    def _receive(self, values: Sequence[torch.Tensor], ids: Sequence[int]) -> None:
        with unseen(), torch.no_grad():
            for ref, value in zip(ids, values, strict=True):
                self._take(ref, value)

    def _take(self, ref: int, value: torch.Tensor) -> None:
        recorder = self._context.recorder
        for stem in self._stems.get(ref, ()):
            self._found[ref, stem] = recorder.value(value, stem)
        self._found[ref, None] = recorder.value(value, None)

    def _record(self, index: int, call: Call) -> None:
        context, name = self._context, self._names[index]
        saves = context.selection.saves(name)
        missing: dict[str, int] = {}
        asked = self._parts(call)
        parts = {key: self._filled(nest, f"{name}.{part}", saves, missing) for key, part, nest in asked}
        captured = len(missing) < sum(1 for _, _, nest in asked for _ in refs(nest))
        if not captured:
            context.recorder.holes.append(Hole(name, self._reason(missing.values())))
            return
        for site, ref in missing.items():
            context.recorder.holes.append(Hole(site, self._reason([ref])))
        path = self._path(call.place)
        if call.kind == "module" and context.selection.outputs and (module := context.paths.module(path)) is not None:
            parameters = {key: value for key, value in module._parameters.items() if value is not None}
            parts["parameters"] = context.named(parameters, f"{name}.parameters", saves)
        inside = context.running.top
        if path is None:
            path = inside.path if inside else None
        parent = self._names[call.inside] if call.inside is not None else inside.name if inside else None
        number = self._numbers[index] if call.kind == "module" else context.numbering.within(call.name, path)
        stack = call.stack if context.stacks is not None and call.kind == "api" else None
        context.recorder.entries[name] = Entry(name, parts, path, number, parent, stack)

    def _filled(self, nest: Any, stem: str, saves: bool, missing: dict[str, int]) -> Any:
        """`nest` with records in place of its values."""
        if isinstance(nest, Ref):
            record = self._found.get((nest.id, stem if saves else None))
            if record is None:
                missing[stem] = nest.id
                value = self._plan.values[nest.id]
                record = TensorRecord("torch.Tensor", str(value.dtype), None, None, None, None, None, False)
                record.reason = self._reason([nest.id])
            record.requires_grad = self._plan.values[nest.id].requires_grad
            return record
        if isinstance(nest, list):
            return [self._filled(item, f"{stem}.{at}", saves, missing) for at, item in enumerate(nest)]
        if isinstance(nest, dict):
            return {key: self._filled(item, f"{stem}.{key}", saves, missing) for key, item in nest.items()}
        return nest

    def _reason(self, refs: Any) -> str:
        reasons = {self._region.reasons.get(ref, NOT_SEEN) for ref in refs}
        return "; ".join(sorted(reasons)) or "it has no tensors"


def note_reasons(note: str) -> dict[int, str]:
    """Why values are missing, by id, from the note that came with a tap."""
    missing: dict[str, str] = msgspec.json.decode(note)["missing"]
    return {int(ref): REASONS[code] for ref, code in missing.items()}


def _stems(nest: Any, stem: str, stems: dict[int, list[str]]) -> None:
    if isinstance(nest, Ref):
        stems.setdefault(nest.id, []).append(stem)
    elif isinstance(nest, (list, dict)):
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            _stems(item, f"{stem}.{key}", stems)


def _prefixes(plan: Plan, context: Context, inputs: Sequence[Any]) -> dict[str, str]:
    """By root: the qualified name of the module that it is in this run, told by the parameters that came in."""
    found = {}
    for root, anchors in plan.anchors.items():
        for position, path in anchors:
            prefix = context.paths.prefix(inputs[position], path)
            if prefix is not None:
                found[root] = prefix
                break
    return found
