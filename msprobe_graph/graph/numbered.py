"""The calls of a graph as they are called in one run: their numbers and names, and which of their values are saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from msprobe_graph.config.selection import Selection
from msprobe_graph.dump.names import api_entry, module_call, module_prefix
from msprobe_graph.eager.context import Counts, Numbering, RunningModules
from msprobe_graph.eager.paths import Paths

from .plan import Call, Place, Plan, Ref, refs

EntryPart = tuple[str, str, Any]
"""What dump.json calls a part of an entry, what the names of tensor files call it, and the nest with `Ref`s."""


class Names(Protocol):
    """What names depend on: `eager.context.Context` has it, and `saving.Saving`."""

    level: str
    selection: Selection
    numbering: Numbering
    running: RunningModules
    paths: Paths


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


class Counted(NamedTuple):
    """What a run of a graph does to the numbers of calls."""

    before: Counts
    after: Counts

    @classmethod
    def by(cls, plan: Plan, named: Sequence[Named]) -> Counted:
        """The run in which the plan's calls were called like that."""
        calls = [(each.prefix, each.number) for each in named]
        functions = zip(plan.calls, named, strict=True)
        within = [((n.prefix, n.module), n.within) for call, n in functions if call.kind == "api" and n.wanted]
        before = Counts(dict(reversed(calls)), dict(reversed(within)))
        return cls(before, Counts(_behind(calls), _behind(within)))


class NumberedCalls:
    """To be made when the graph is called: the names are taken in the order of the program."""

    def __init__(self, plan: Plan, names: Names, inputs: Sequence[Any]) -> None:
        self._plan = plan
        self._names = names
        self.prefixes = prefixes(plan, names, inputs)
        self.named: list[Named] = []
        """The calls of the plan, in its order."""
        self._number_calls()
        self.files = self._find_files()
        """By id of a value: the starts of the names of the files it is to be saved in, None for where it is not. Values
        that are saved nowhere are left out."""

    @property
    def placed(self) -> bool:
        """Whether the modules of all calls have their qualified names."""
        return all(call.place is None or call.place.root in self.prefixes for call in self._plan.calls)

    @property
    def saved(self) -> Collection[int]:
        """The values, by id, that files are made of."""
        bases = (base for base, views in self._plan.reshaped.items() if not self.files.keys().isdisjoint(views))
        return {*self.files, *bases}

    def inside(self, call: Call) -> int | None:
        """The call in the plan of the module in which this one is made."""
        inside = call.inside
        while inside is not None and self._names.paths.lacks(self.named[inside].module):
            inside = self._plan.calls[inside].inside
        return inside

    def forward_parts(self, call: Call) -> list[EntryPart]:
        selection = self._names.selection
        if not selection.forward:
            return []
        parts: list[EntryPart] = []
        if selection.inputs:
            parts += [("input_args", "input", call.args), ("input_kwargs", "kwargs", call.kwargs)]
        if selection.outputs:
            parts.append(("output", "output", call.output))
        return parts

    def backward_parts(self, call: Call) -> list[EntryPart]:
        selection = self._names.selection
        if not selection.backward or not any(call.given):
            return []
        parts: list[EntryPart] = [("input", "input", call.given)] if selection.inputs else []
        if selection.outputs:
            parts.append(("output", "output", call.gives if any(call.gives) else []))
        return parts

    def _number_calls(self) -> None:
        """Give every call its number, and ask whether it is wanted, in the order of the program."""
        names, selection = self._names, self._names.selection
        modules, apis = names.level in ("L0", "mix"), names.level in ("L1", "mix")
        running: list[tuple[int, str]] = []
        for call in self._plan.calls:
            while running and running[-1][0] < call.begin:
                selection.leave(running.pop()[1])
            module = self._path(call.place)
            # What a global variable holds, say, is part of no model, and eager capture has no hook on it.
            lacking = names.paths.lacks(module)
            prefix = call.name if call.kind == "api" else module_prefix(module or "", call.name)
            number = within = names.numbering.next(prefix)
            names.numbering.advance(prefix)
            if call.kind == "module":
                name = module_call(prefix, "forward", number)
                selection.enter(name)
                running.append((call.end, name))
                wanted = modules and selection.wants_module(name) and not lacking
            else:
                name = api_entry(prefix, number, "forward")
                wanted = apis and selection.may_want_api(prefix) and selection.wants_api(name)
                if lacking:
                    inside = self.inside(call)
                    module = None if inside is None else self.named[inside].module
                module = names.running.top.path if module is None and names.running.top else module
                within = names.numbering.within(prefix, module) if wanted else 0
            self.named.append(Named(prefix, number, wanted, module, within))
        for _, name in reversed(running):
            selection.leave(name)

    def _path(self, place: Place | None) -> str | None:
        """The qualified name of the module at `place`."""
        if place is None:
            return None
        return self._names.paths.first(".".join(filter(None, (self.prefixes.get(place.root), place.path))))

    def _find_files(self) -> dict[int, list[str | None]]:
        if not self._names.selection.saves_any:
            return {}
        found: dict[int, list[str | None]] = {}
        elsewhere: set[int] = set()
        for call, named in zip(self._plan.calls, self.named, strict=True):
            if not named.wanted:
                continue
            directions = (("forward", self.forward_parts), ("backward", self.backward_parts))
            for direction, parts in directions:
                name = named.entry(call.kind, direction)
                saves = self._names.selection.saves(name)
                for _, part, nest in parts(call):
                    if saves:
                        _add_stems(nest, f"{name}.{part}", found)
                    else:
                        elsewhere.update(ref.id for ref in refs(nest))
        for ref in elsewhere & found.keys():
            found[ref].append(None)
        return found


def _behind(numbers: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    return {key: number + 1 for key, number in numbers}


def _add_stems(nest: Any, stem: str, found: dict[int, list[str | None]]) -> None:
    if isinstance(nest, Ref):
        found.setdefault(nest.id, []).append(stem)
    elif isinstance(nest, (list, dict)):
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            _add_stems(item, f"{stem}.{key}", found)


def prefixes(plan: Plan, names: Names, inputs: Sequence[Any]) -> dict[str, str]:
    """By root: the qualified name of the module that it is in this run, told by the parameters that came in."""
    found: dict[str, str] = {}
    running = names.running.top.path if names.running.top is not None else None
    for root, anchors in plan.anchors.items():
        tensors = ((inputs[position], path) for position, path in anchors if isinstance(inputs[position], torch.Tensor))
        prefixes = (names.paths.prefix(tensor, path, running) for tensor, path in tensors)
        prefix = next((prefix for prefix in prefixes if prefix is not None), None)
        if prefix is not None:
            found[root] = prefix
    return found
