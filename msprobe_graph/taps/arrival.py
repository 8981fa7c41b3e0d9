"""What CUDA graphs have measured in a step, as it comes to the host."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch

from msprobe_graph.dump.records import Replayed, Statistics

from .statistics import ROW, read_row

SLOT = struct.Struct(f"={ROW.size}s2q")
"""What arrives of a slot: its row, how often it was measured, and the number of its shape."""
WORDS = SLOT.size // 8
"""The same as int64s."""


class Landing(Protocol):
    """Where slots arrive on the host, WORDS int64s each."""

    address: int
    """Where the first of them is, as long as this is referred to."""
    count: int
    """How many there are."""

    def synchronize(self) -> None:
        """Wait until all are there."""

    @property
    def native(self) -> tuple[int, int] | None:
        """The address of a C function that tells whether all are there, and what that is given: see
        `dump.records.Arriving`. None where there is no such function."""


class Slot(NamedTuple):
    """Where the rows of one value lie. Graphs that were captured for several sizes of a batch share it: one of them is
    replayed at a time."""

    number: int
    header: int
    room: int
    """For so many parts."""


class Place(msgspec.Struct, eq=False):
    """Where the copies of a value lie: see `graph_copies.GraphCopies`."""

    begin: int
    """In bytes, as all here."""
    size: int
    row: int
    """Of a row of the batch; 0: not all values that are copied there are one."""


class Shape(NamedTuple):
    """What a value was when a graph was captured."""

    shape: tuple[int, ...]
    batch: bool
    """Its first dimension is the batch's, padding included."""
    copied: bool = False
    """The graph was to copy it, too."""
    place: Place | None = None
    """Where it does; None where there was no room."""

    @classmethod
    def of(cls, value: torch.Tensor, padded: int | None) -> Shape:
        """padded: rows of the batch, padding included, if there is one."""
        return cls(tuple(value.shape), padded is not None and value.dim() > 0 and value.shape[0] == padded)


class Written(NamedTuple):
    """What a slot holds when a step is over."""

    word: int
    """Where its row begins in what arrives, in words of 8 bytes."""
    row: bytes
    """As `statistics.ROW` has it."""
    fired: int
    """How often the value was measured in the step; the row is that of the last time."""
    shape: tuple[int, ...]
    captured: Shape
    """What the value was when the graph was captured that was replayed."""

    def statistics(self, dtype: torch.dtype) -> Statistics:
        return read_row(ROW.unpack(self.row), dtype, Replayed(self.shape, self.fired))


class HostCopies:
    """What graphs have copied, on its way to the host."""

    def __init__(self, host: torch.Tensor, found: Mapping[int, tuple[int, int]], room: int) -> None:
        """found: by where a place begins: where in `host` its bytes are, and the first of them that is there.
        room: how many bytes the copies of a device may take."""
        self.host = host
        self.room = room
        self._found = found

    def values(self, place: Place, first: int, last: int) -> torch.Tensor | None:
        """The bytes of a place, from the first up to but without the last. None if they were not brought."""
        if place.begin not in self._found:
            return None
        at, begin = self._found[place.begin]
        return self.host[at + first - begin : at + last - begin]


class Arrival:
    """The slots of one step on their way to the host."""

    def __init__(
        self,
        landing: Landing,
        shapes: Sequence[Shape],
        rows: tuple[int, int],
        copies: HostCopies | None = None,
    ) -> None:
        """When all of `landing` is there, so are the `copies`."""
        self.copies = copies
        """None where nothing was to be copied."""
        self._landing = landing
        self._shapes = shapes
        self.rows = rows
        """Which of a batch count: see `RowsInGraphs.switch`."""

    def first(self, slots: Iterable[Slot]) -> Written | None:
        """The first of the slots that was written; None if none was. Waits for the GPU."""
        return next((found for slot in slots if (found := self._slot(slot)) is not None), None)

    def copy(self, written: Written, dtype: torch.dtype) -> torch.Tensor | None:
        """The value that was measured last, where it was copied: a tensor of its shape, in memory that others are in,
        too. None where it was not."""
        shape, batch, _, place = written.captured
        if place is None or self.copies is None:
            return None
        begin, end = self.rows
        first = begin * math.prod(shape[1:]) * dtype.itemsize if batch and end >= 0 else 0
        values = self.copies.values(place, first, first + math.prod(written.shape) * dtype.itemsize)
        return None if values is None else values.view(dtype).reshape(written.shape)

    @functools.cached_property
    def kind(self) -> tuple[bytes, bytes]:
        """How often each slot was written, and the number of its shape. The same for arrivals that differ in nothing
        but the statistics, and in `rows`. Waits for the GPU."""
        words = memoryview(self._words).cast("q")
        fired, tags = (words[at::WORDS].tobytes() for at in range(ROW.size // 8, WORDS))
        return fired, tags

    @property
    def address(self) -> int:
        """Where the words are that `Written.word` counts. Waits for the GPU."""
        self._landing.synchronize()
        return self._landing.address

    def lies_at(self) -> tuple[int, int, int, int] | None:
        """See `dump.records.Arriving`."""
        landing = self._landing
        event = landing.native
        return None if event is None else (landing.address, landing.count, *event)

    @functools.cached_property
    def _words(self) -> bytes:
        return ctypes.string_at(self.address, self._landing.count * SLOT.size)

    def _slot(self, slot: Slot) -> Written | None:
        if slot.number >= self._landing.count:  # of a graph that was captured since
            return None
        row, fired, tag = SLOT.unpack_from(self._words, slot.number * SLOT.size)
        if not fired:
            return None
        captured = self._shapes[tag]
        shape = captured.shape
        begin, end = self.rows
        if captured.batch and end >= 0:
            shape = (max(min(shape[0], end) - begin, 0), *shape[1:])
        return Written(slot.number * WORDS, row, fired, shape, captured)
