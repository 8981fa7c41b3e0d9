"""The entries of one run of a graph: its calls get their numbers and names, and the values that the taps saw."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from msprobe_graph.dump.records import Entry, Hole, TensorRecord
from msprobe_graph.eager.context import Context
from msprobe_graph.taps.copied import Copied

from .earlier import Found
from .numbered import EntryPart, Named, NumberedCalls
from .plan import Absent, Call, Plan, Ref, Value, tensors, valued
from .replay import Frame

NOT_SEEN = "the compiled program does not hold it in memory"
SHARED = "other parts of the program use this tensor too, and compiled code adds their gradients up in its own order"
NO_GIVES = "what the backward pass of a single function gives is not told apart in compiled code"


class Entries:
    """`take` or `take_passing` is called for each value, then `record_forward`, and `record_backward` if there is a
    backward pass."""

    def __init__(
        self, plan: Plan, context: Context, inputs: Sequence[Any], reasons: Mapping[int, str], found: Found
    ) -> None:
        """`found`: the records of values that were seen already."""
        self._plan = plan
        self._context = context
        self._reasons = reasons
        self._calls = NumberedCalls(plan, context, inputs)
        self.found: dict[tuple[int, str | None], Any] = dict(found)
        """The values seen, as records: by id, and by the file where a value is saved."""
        self._measured: dict[int, TensorRecord] = {}
        """Records of what taps have seen, by the id of the value itself or of the one it is a view of."""
        self._parameters = {
            id(inputs[position]): found[ref, None] for ref, position in plan.inputs.items() if (ref, None) in found
        }
        """Records of the graph's inputs, by the id of the tensor, where no file is to be saved."""
        self._forward: dict[int, Entry] = {}
        """The forward entries, by call."""

    @property
    def named(self) -> list[Named]:
        """The calls, as they are called in this run."""
        return self._calls.named

    @property
    def prefixes(self) -> Mapping[str, str]:
        """See `numbered.prefixes`."""
        return self._calls.prefixes

    @property
    def forward(self) -> dict[str, Entry]:
        """What `record_forward` has recorded, by name."""
        return {entry.name: entry for entry in self._forward.values()}

    @property
    def modules(self) -> list[nn.Module]:
        """Those of the forward entries, whose parameters stand in them."""
        calls = ((self._plan.calls[index], self.named[index]) for index in self._forward)
        modules = (self._context.paths.module(named.module) for call, named in calls if call.kind == "module")
        return [module for module in modules if module is not None]

    @property
    def saved(self) -> Collection[int]:
        """The values, by id, that files are made of."""
        return self._calls.saved

    def take(self, ref: int, value: Any) -> None:
        """An input or output of the graph, by its id, as it is now."""
        for stem in self._calls.files.get(ref, (None,)):
            self.found[ref, stem] = record = self._context.recorder.value(value, stem)
            if stem is None:
                self._parameters[id(value)] = self._measured[ref] = record
        self._take_views(ref, value)

    def take_passing(self, ref: int, value: torch.Tensor) -> None:
        """What a tap sees of a value, or gradient, of that id."""
        base = self._plan.same.get(ref, ref)
        for stem in self._calls.files.get(ref, (None,)):
            record = self._context.recorder.passing(value, stem, self._measured.get(base))
            self.found[ref, stem] = self._measured[base] = record
        self._take_views(ref, value)

    def take_replayed(self, frame: Frame) -> bool:
        """What CUDA graphs measure of this call, but for what was seen without them; whether there was any."""
        seen = {ref for ref, _ in self.found}
        recorder = self._context.recorder
        for ref, slots in frame.slots.items():
            if ref not in seen and not frame.is_had_from_another(self._plan, ref):
                record = recorder.replayed(frame.rows, slots, frame.dtypes[ref])
                self._fill(ref, record, frame, ref)
                views = self._plan.reshaped.get(ref, ())
                for view in (view for view in views if frame.is_had_from_another(self._plan, view)):
                    self._fill(view, recorder.view_of(record, self._plan.values[view].shape), frame, ref)
        return not frame.slots.keys() <= seen

    def _fill(self, ref: int, record: TensorRecord, frame: Frame, base: int) -> None:
        """Take the record of a value that graphs measure, or of a view of all elements of a `base`, which they do."""
        recorder = self._context.recorder
        files: list[tuple[str, TensorRecord]] = []
        for stem in self._calls.files.get(ref, (None,)):
            self.found[ref, stem] = own = recorder.view_of(record, "same") if files else record
            if stem is not None:
                files.append((f"{stem}.pt", own))
        if files:
            slots, of_copy = frame.source(base)
            recorder.copied(frame.rows, Copied(tuple(slots), frame.dtypes[base], of_copy, files))

    def _take_views(self, ref: int, value: torch.Tensor) -> None:
        for part in self._plan.parts.get(ref, ()):
            self.take_passing(part.id, part.of(value))
        for view in self._plan.reshaped.get(ref, ()):
            sizes = self._plan.values[view].shape
            self.take_passing(view, value.reshape([-1 if size is None else size for size in sizes]))

    def record_forward(self) -> None:
        """Entries in the order in which the calls end, as in eager code."""
        calls = self._plan.calls
        for index in self._plan.ending:
            if not self.named[index].wanted:
                continue
            entry = self._entry(calls[index], self.named[index], "forward", self._calls.forward_parts(calls[index]))
            if entry is not None:
                self._forward[index] = entry
                self._complete(entry, calls[index], self.named[index])

    def record_backward(self) -> None:
        """Entries in the order in which eager autograd ends with the calls: the last one first, an inner one before
        its outer one, unless that has no gradient to give and ends as soon as it has got its own."""
        calls = self._plan.calls

        def first(index: int) -> int:
            return calls[index].begin if any(calls[index].gives) else calls[index].end

        for index in sorted(self._forward, key=first, reverse=True):
            call, forward = calls[index], self._forward[index]
            entry = self._entry(call, self.named[index], "backward", self._calls.backward_parts(call))
            if entry is not None:
                entry.module, entry.number = forward.module, forward.number
                entry.parent = forward.parent and forward.parent.replace(".forward.", ".backward.")
        if any(calls[index].kind == "api" for index in self._forward):
            self._context.recorder.holes.append(Hole("output of the backward entries of functions", NO_GIVES))

    def _entry(self, call: Call, named: Named, direction: Any, parts: list[EntryPart]) -> Entry | None:
        """The entry, recorded; None where nothing of it was seen. What is missing becomes a hole."""
        if not parts:
            return None
        recorder = self._context.recorder
        name = named.entry(call.kind, direction)
        saves = self._context.selection.saves(name)
        missing: dict[str, str] = {}
        filled = {key: self._filled(nest, f"{name}.{part}", saves, missing) for key, part, nest in parts}
        if missing and len(missing) == sum(1 for _ in tensors([nest for _, _, nest in parts])):
            recorder.holes.append(Hole(name, "; ".join(sorted(set(missing.values())))))
            return None
        recorder.holes.extend(Hole(site, reason) for site, reason in missing.items())
        entry = recorder.entries[name] = Entry(name, filled)
        return entry

    def _complete(self, entry: Entry, call: Call, named: Named) -> None:
        """What a forward entry holds beside its values."""
        context, running, inside = self._context, self._context.running.top, self._calls.inside(call)
        entry.module, entry.number = named.module, named.within
        if inside is not None:
            entry.parent = self.named[inside].entry("module", "forward")
        elif running is not None:
            entry.parent = running.name
        if call.kind == "api":
            entry.stack = call.stack if context.stacks is not None else None
            return
        module = context.paths.module(named.module)
        if context.selection.outputs and module is not None:
            parameters = {key: value for key, value in module._parameters.items() if value is not None}
            if context.selection.saves(entry.name):
                entry.parts["parameters"] = context.named(parameters, f"{entry.name}.parameters", True)
            else:
                read, known = context.recorder.value, self._parameters
                entry.parts["parameters"] = {
                    key: known.get(id(value)) or read(value, None) for key, value in parameters.items()
                }

    def _filled(self, nest: Any, stem: str, saves: bool, missing: dict[str, str]) -> Any:
        """`nest` with records in place of its values."""
        if id(nest) in self._plan.fixed:
            return nest
        if isinstance(nest, Ref):
            value = self._plan.values[valued(nest.id)]
            gradient = nest.id != valued(nest.id)
            record = self.found.get((nest.id, stem if saves else None)) if nest.told else None
            if record is None:
                missing[stem] = self._reason(nest)
                record = _unseen_record(value, missing[stem])
            if nest.id not in self._plan.inputs:
                record.requires_grad = value.requires_grad and not gradient
            return record
        if isinstance(nest, Absent):
            missing[stem] = nest.reason
            return _unseen_record(nest.value, nest.reason)
        if isinstance(nest, list):
            return [self._filled(item, f"{stem}.{at}", saves, missing) for at, item in enumerate(nest)]
        if isinstance(nest, dict):
            return {key: self._filled(item, f"{stem}.{key}", saves, missing) for key, item in nest.items()}
        return nest

    def _reason(self, ref: Ref) -> str:
        if not ref.told:
            return SHARED
        return self._reasons.get(ref.id) or self._reasons.get(self._plan.same.get(ref.id, ref.id), NOT_SEEN)


def _unseen_record(value: Value, reason: str) -> TensorRecord:
    record = TensorRecord("torch.Tensor", str(value.dtype), None, None, None, None, None, value.requires_grad)
    record.reason = reason
    return record
