"""Calls that CUDA graphs replay as a whole: their entries are recorded once, and filled in anew for each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from msprobe_graph.dump.encode import complete, entry_lines, refuse, reset, share
from msprobe_graph.dump.records import NOT_REPLAYED, OVERRUN, Block, Entry, Hole, Shared, TensorRecord
from msprobe_graph.dump.template import Filled, Template, fills

from .marks import Marks

if TYPE_CHECKING:
    from .arrival import Arrival, Slot
    from .rows_in_graphs import RowsInGraphs

MOST_KNOWN = 32
"""So many kinds of arrivals are known of one call: one for each number of rows, as a rule."""


class ReplayedValue(NamedTuple):
    """A value that a CUDA graph measures."""

    record: TensorRecord
    slots: Sequence[Slot]
    """Into one of these."""
    dtype: torch.dtype


class ReplayedCall:
    """What was recorded of such a call. One object serves all steps in which it is the same; the writer's thread fills
    its records in, one step after the other."""

    def __init__(self, graph: RowsInGraphs, slots: Sequence[Slot]) -> None:
        """One of the `slots` is written whenever the call is replayed."""
        self.graph = graph
        self.slots = slots
        self.entries: dict[str, Entry] = {}
        self.holes: list[Hole] = []
        self.graphs: dict[int, Callable[[], dict[str, Any]]] = {}
        self.values: list[ReplayedValue] = []
        self.shared: list[Shared] = []
        self.saved = False
        """Files are made of some values, and their names come into the records."""
        self.known: dict[object, Known] = {}
        """By the kind of an arrival."""


class Known(NamedTuple):
    """What all steps have in common whose arrivals differ in nothing but numbers."""

    template: Template
    block: Block


class ReplayInStep:
    """One step's replay of a call, if it was replayed: a `dump.records.Replay`."""

    def __init__(self, call: ReplayedCall, arrival: Arrival | None) -> None:
        self._call = call
        self.arrival = arrival

    @property
    def form(self) -> object:
        """No two calls are equal. A call of which files are made has another form in each step."""
        return (object() if self._call.saved else self._call), self.arrival and self.arrival.rows

    def complete(self) -> Block | None:
        arrival = self.arrival
        if arrival is None or arrival.first(self._call.slots) is None:
            return None
        for record, slots, dtype in self._call.values:
            written = arrival.first(slots)
            if written is None:
                refuse(record, NOT_REPLAYED)
            else:
                complete(record, written.statistics(dtype))
        return self._block(arrival)

    def encode(self) -> Block | None:
        arrival, call = self.arrival, self._call
        if arrival is None or arrival.first(call.slots) is None:
            return None
        if call.saved:
            return self.complete()
        if fills():
            kind = arrival.kind, arrival.rows
            known = call.known.get(kind)
            if known is None:
                if len(call.known) == MOST_KNOWN:
                    del call.known[next(iter(call.known))]
                known = call.known[kind] = Known(self._template(arrival), self._block(arrival))
            return known.block._replace(lines=Filled(known.template, [arrival]))
        block = self.complete()
        return block and block._replace(lines=entry_lines(block.entries))

    def _block(self, arrival: Arrival) -> Block:
        """When the records are complete."""
        call = self._call
        for shared in call.shared:
            share(*shared)
        holes = list(call.holes)
        writings = (arrival.first(value.slots) for value in call.values)
        again = sum(written is not None and written.fired > 1 for written in writings)
        if again:
            holes.append(Hole(f"{again} values", OVERRUN))
        graphs = {graph: describe() for graph, describe in call.graphs.items()}
        measured = [*(value.record for value in call.values), *(other for _, other, _ in call.shared)]
        return Block(list(call.entries.values()), measured, holes, graphs)

    def _template(self, arrival: Arrival) -> Template:
        """Of the entries' text, for this arrival and all of its kind."""
        marks = Marks()
        for record, slots, dtype in self._call.values:
            written = arrival.first(slots)
            if written is None:
                refuse(record, NOT_REPLAYED)
                continue
            reset(record, written.shape)
            marks.put(record, dtype, written.word)
        for shared in self._call.shared:
            share(*shared)
        return marks.template(self._call.entries.values())
