"""The entries of one run of a graph: its calls get their numbers and names, and the values that the taps saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from msprobe_graph.dump.names import api_entry, module_call, module_prefix
from msprobe_graph.dump.records import Entry, Hole, TensorRecord
from msprobe_graph.eager.context import Context

from .plan import Absent, Call, Place, Plan, Ref, Value, refs, tensors, valued
from .replay import Frame

NOT_SEEN = "the compiled program does not hold it in memory"
SHARED = "other parts of the program use this tensor too, and compiled code adds their gradients up in its own order"
NO_GIVES = "what the backward pass of a single function gives is not told apart in compiled code"

NOT_SAVED = "a CUDA graph was replayed, which measures values but does not save them yet"

EntryPart = tuple[str, str, Any]
"""What dump.json calls a part of an entry, what the names of tensor files call it, and the nest with `Ref`s."""


class Named(NamedTuple):
    """A call as it is called in this run."""

    prefix: str
    number: int
    wanted: bool
    module: str | None
    """The module itself, or the one in whose forward the function is called."""
    within: int
    """Which call of the name within that module."""

    def entry(self, kind: str, direction: Any) -> str:
        make = module_call(self.prefix, direction, self.number)
        return make if kind == "module" else api_entry(self.prefix, self.number, direction)


class Entries:
    """`take` or `take_passing` is called for each value, then `record_forward`, and `record_backward` if there is a
    backward pass."""

    def __init__(self, plan: Plan, context: Context, inputs: Sequence[Any], reasons: Mapping[int, str]) -> None:
        self._plan = plan
        self._context = context
        self._reasons = reasons
        self._prefixes = _prefixes(plan, context, inputs)
        self._found: dict[tuple[int, str | None], Any] = {}
        """The values seen, as records: by id, and by the file where a value is saved."""
        self._measured: dict[int, TensorRecord] = {}
        """Records of what taps have seen, by the id of the value itself or of the one it is a view of."""
        self._parameters: dict[int, Any] = {}
        """Records of the graph's inputs, by the id of the tensor, where no file is to be saved."""
        self._forward: dict[int, Entry] = {}
        """The forward entries, by call."""
        self.named = self._number_calls()
        """The calls, as they are called in this run."""
        self._files = self._find_files()

    def take(self, ref: int, value: Any) -> None:
        """An input or output of the graph, by its id, as it is now."""
        for stem in self._files.get(ref, (None,)):
            self._found[ref, stem] = record = self._context.recorder.value(value, stem)
            if stem is None:
                self._parameters[id(value)] = self._measured[ref] = record
        self._take_views(ref, value)

    def take_passing(self, ref: int, value: torch.Tensor) -> None:
        """What a tap sees of a value, or gradient, of that id."""
        base = self._plan.same.get(ref, ref)
        for stem in self._files.get(ref, (None,)):
            record = self._context.recorder.passing(value, stem, self._measured.get(base))
            self._found[ref, stem] = self._measured[base] = record
        self._take_views(ref, value)

    def take_replayed(self, frame: Frame) -> None:
        """What CUDA graphs measure of this call, but for what was seen without them."""
        seen = {ref for ref, _ in self._found}
        recorder = self._context.recorder
        for ref, slots in frame.slots.items():
            if ref not in seen:
                record = recorder.replayed(frame.rows, slots, frame.dtypes[ref])
                self._fill(ref, record)
                for view in self._plan.reshaped.get(ref, ()):
                    self._fill(view, recorder.view_of(record, self._plan.values[view].shape))

    def _fill(self, ref: int, record: TensorRecord) -> None:
        for stem in self._files.get(ref, (None,)):
            self._found[ref, stem] = record
            if stem is not None:
                self._context.recorder.holes.append(Hole(f"{stem}.pt", NOT_SAVED))

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
            entry = self._entry(calls[index], self.named[index], "forward", self._forward_parts(calls[index]))
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
            entry = self._entry(call, self.named[index], "backward", self._backward_parts(call))
            if entry is not None:
                entry.module, entry.number = forward.module, forward.number
                entry.parent = forward.parent and forward.parent.replace(".forward.", ".backward.")
        if any(calls[index].kind == "api" for index in self._forward):
            self._context.recorder.holes.append(Hole("output of the backward entries of functions", NO_GIVES))

    def _number_calls(self) -> list[Named]:
        """Give every call its number, and ask whether it is wanted, in the order of the program."""
        context, selection = self._context, self._context.selection
        modules, apis = context.level in ("L0", "mix"), context.level in ("L1", "mix")
        named: list[Named] = []
        running: list[tuple[int, str]] = []
        for call in self._plan.calls:
            while running and running[-1][0] < call.begin:
                selection.leave(running.pop()[1])
            prefix = self._prefix(call)
            number = context.numbering.next(prefix)
            context.numbering.advance(prefix)
            if call.kind == "module":
                name = module_call(prefix, "forward", number)
                selection.enter(name)
                running.append((call.end, name))
                wanted = modules and selection.wants_module(name)
            else:
                name = api_entry(prefix, number, "forward")
                wanted = apis and selection.may_want_api(prefix) and selection.wants_api(name)
            module = self._path(call.place)
            within = number
            if call.kind == "api":
                module = context.running.top.path if module is None and context.running.top else module
                within = context.numbering.within(prefix, module) if wanted else 0
            named.append(Named(prefix, number, wanted, module, within))
        for _, name in reversed(running):
            selection.leave(name)
        return named

    def _prefix(self, call: Call) -> str:
        return call.name if call.kind == "api" else module_prefix(self._path(call.place) or "", call.name)

    def _path(self, place: Place | None) -> str | None:
        """The qualified name of the module at `place`."""
        if place is None:
            return None
        return self._context.paths.first(".".join(filter(None, (self._prefixes.get(place.root), place.path))))

    def _forward_parts(self, call: Call) -> list[EntryPart]:
        selection = self._context.selection
        if not selection.forward:
            return []
        parts: list[EntryPart] = []
        if selection.inputs:
            parts += [("input_args", "input", call.args), ("input_kwargs", "kwargs", call.kwargs)]
        if selection.outputs:
            parts.append(("output", "output", call.output))
        return parts

    def _backward_parts(self, call: Call) -> list[EntryPart]:
        selection = self._context.selection
        if not selection.backward or not any(call.given):
            return []
        parts: list[EntryPart] = [("input", "input", call.given)] if selection.inputs else []
        if selection.outputs:
            parts.append(("output", "output", call.gives if any(call.gives) else []))
        return parts

    def _find_files(self) -> dict[int, list[str | None]]:
        """By id of a value: the starts of the names of the files it is to be saved in, None for where it is not. Values
        that are saved nowhere are left out."""
        if not self._context.selection.saves_any:
            return {}
        found: dict[int, list[str | None]] = {}
        elsewhere: set[int] = set()
        for call, named in zip(self._plan.calls, self.named, strict=True):
            if not named.wanted:
                continue
            directions = (("forward", self._forward_parts), ("backward", self._backward_parts))
            for direction, parts in directions:
                name = named.entry(call.kind, direction)
                saves = self._context.selection.saves(name)
                for _, part, nest in parts(call):
                    if saves:
                        _add_stems(nest, f"{name}.{part}", found)
                    else:
                        elsewhere.update(ref.id for ref in refs(nest))
        for ref in elsewhere & found.keys():
            found[ref].append(None)
        return found

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
        context, inside = self._context, self._context.running.top
        entry.module, entry.number = named.module, named.within
        if call.inside is not None:
            entry.parent = self.named[call.inside].entry("module", "forward")
        elif inside is not None:
            entry.parent = inside.name
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
            record = self._found.get((nest.id, stem if saves else None)) if nest.told else None
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


def _add_stems(nest: Any, stem: str, found: dict[int, list[str | None]]) -> None:
    if isinstance(nest, Ref):
        found.setdefault(nest.id, []).append(stem)
    elif isinstance(nest, (list, dict)):
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            _add_stems(item, f"{stem}.{key}", found)


def _prefixes(plan: Plan, context: Context, inputs: Sequence[Any]) -> dict[str, str]:
    """By root: the qualified name of the module that it is in this run, told by the parameters that came in."""
    found: dict[str, str] = {}
    running = context.running.top.path if context.running.top is not None else None
    for root, anchors in plan.anchors.items():
        tensors = ((inputs[position], path) for position, path in anchors if isinstance(inputs[position], torch.Tensor))
        prefixes = (context.paths.prefix(tensor, path, running) for tensor, path in tensors)
        prefix = next((prefix for prefix in prefixes if prefix is not None), None)
        if prefix is not None:
            found[root] = prefix
    return found
