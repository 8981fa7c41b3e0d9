"""Taps on what the compiled program puts in memory anyway, inserted when Inductor has decided everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from msprobe_graph.dump.boundary import Boundary

from . import inductor_compat as inductor
from .inductor_compat import SchedulerPass, Tap
from .inductor_views import Hole
from .pins import pinned
from .placement import places, standing
from .stamps import Found, Wanted, spare

REASONS = {
    "fused": "fused away: the compiled program keeps it in registers and never puts it in memory",
    "rewritten": "rewritten away: the compiled program doesn't compute it, or not as a value that can be told for sure",
    "overwritten": "written over within the compiled function that computes it, or by another value",
    "uninitialised": "memory that nothing was written to yet",
    "empty": "it has no elements",
    "not_strided": "it is no strided view of anything in memory",
    "constant": "a constant that the compiler has folded",
    "streams": "the compiled program computes on several streams",
}
"""Why a value can't be tapped, by the codes in a note."""


class Report(NamedTuple):
    """What was done to one graph."""

    graph: inductor.GraphKind
    tapped: list[int]
    """Value ids."""
    missing: dict[int, str]
    """Value ids that were wanted of this graph, with a key of REASONS."""
    before: list[str]
    """The scheduler's fused nodes by name, before our insertion."""
    after: list[str]

    def note(self) -> str:
        """The same, compact: it travels in the first tap, because a cached artifact comes without a pass that runs."""
        return json.dumps(
            {
                "graph": self.graph,
                "missing": {str(id): reason for id, reason in self.missing.items()},
                "nodes_before": len(self.before),
                "nodes_after": len(self.after),
            },
            separators=(",", ":"),
        )


class ExactPass(SchedulerPass):  # type: ignore[misc]
    """Inductor's `_post_fusion_custom_pass` that taps the `wanted` values (by value id) that are in memory.

    It leaves the nodes that it is given alone. The taps go in at the last moment, and only where no generated function
    is split or changed by them. It needs `full.PinPass` as `joint_custom_pre_pass`, and `full.FullPass` as
    `post_grad_custom_post_pass`, which keep values, and what was lowered of them, findable. `digest` tells this
    selection from others in the compiler's caches.
    """

    def __init__(
        self,
        wanted: Mapping[int, Wanted],
        digest: str,
        chained: Callable[[list[Any]], list[Any]] | None = None,
        boundary: Boundary | None = None,
    ) -> None:
        inductor.check()
        self._wanted = wanted
        self._digest = digest
        self._chained = chained
        self._boundary = boundary or Boundary()
        self.reports: list[Report] = []
        """One for each graph that was compiled, none for those that came from a cache."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if self._chained is not None:
            nodes = self._chained(nodes)
        if self._wanted and inductor.running_graph() is not None:
            inductor.before_last_usage(lambda schedule: self._boundary.attempt("taps", self._insert, schedule))
        return nodes

    def uuid(self) -> Any | None:
        return chained_uuid(self._digest, self._chained)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactPass:
        """Inductor copies its configuration, to print it; dynamic sizes can't be copied."""
        return self

    def _insert(self, schedule: inductor.Schedule) -> None:
        running = inductor.running_graph()
        assert running is not None
        graph, kind = running
        found, missing = self._found(graph, kind)
        tapped: dict[int, inductor.Buffered] = {}
        for id, place in found.items():
            buffered = Hole("streams") if schedule.has_streams else schedule.locate(*place)
            if isinstance(buffered, Hole):
                missing[id] = buffered.reason
            else:
                tapped[id] = buffered
        for id in spare(self._wanted, tapped):
            del tapped[id]
        found_places = places(schedule, tapped)
        missing.update((id, "overwritten") for id in tapped if id not in found_places)
        tapped = {id: buffered for id, buffered in tapped.items() if id in found_places}
        until = standing(schedule, tapped, found_places) if kind == "inference" else {}
        # What is behind this program's end is not in the schedule.
        until = {id: place for id, place in until.items() if not self._wanted[id].overwritten}
        groups: dict[tuple[int, torch.device, int | None], list[int]] = {}
        for id, buffered in tapped.items():
            groups.setdefault((found_places[id], buffered.device, until.get(id)), []).append(id)
        taps = [Tap(place, device, ids, end) for (place, device, end), ids in groups.items()]
        # Where they stand no longer; and what an earlier program has left standing may be what this one writes into.
        ends = {(tap.until, tap.device) for tap in taps if tap.until not in (None, len(schedule.nodes))}
        written = ((0, device) for device in schedule.written() if device.type == "cuda" and kind == "inference")
        taps = [Tap(place, device, []) for place, device in sorted({*ends, *written}, key=str)] + taps
        taps = sorted(taps, key=lambda tap: tap.place) or [Tap(len(schedule.nodes), torch.device("cpu"), [])]
        before = schedule.names()
        report = Report(kind, list(tapped), missing, before, [*before, *("tap" for _ in taps)])
        schedule.insert(taps, tapped, report.note())
        self.reports.append(report._replace(after=schedule.names()))

    def _found(self, graph: fx.Graph, kind: inductor.GraphKind) -> tuple[dict[int, Found], dict[int, str]]:
        backward = kind == "backward"
        found = pinned(graph, self._wanted, backward)
        return found, {id: "rewritten" for id in self._wanted if id % 2 == backward and id not in found}


def chained_uuid(digest: str, *chained: Any) -> Any | None:
    """What the compiler's caches tell our passes by; None, which bypasses them, if a user's pass has nothing."""
    theirs = []
    for each in chained:
        if each is None:
            continue
        uuid = each.uuid() if hasattr(each, "uuid") else None
        if uuid is None:
            return None
        theirs.append(uuid)
    return (digest, _sources(), *theirs)


def _sources() -> str:
    here = Path(__file__).parent
    inductors = ("inductor_compat.py", "inductor_storages.py", "inductor_views.py")
    names = ("exact.py", "full.py", *inductors, "pins.py", "placement.py", "stamps.py", "tap_op.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()
