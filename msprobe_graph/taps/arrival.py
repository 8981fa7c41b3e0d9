"""What graphs have measured in a step, as it comes to the host."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from .statistics import ROW

SLOT = struct.Struct(f"={ROW.size}s2q")
"""What the host gets of a slot: its row, how often it was measured, and the number of its shape."""
WORDS = SLOT.size // 8
"""The same in int64s."""


class Event(Protocol):
    """torch.Event, as far as it is needed here."""

    def synchronize(self) -> None: ...


class Slot(NamedTuple):
    """Where the rows of one value lie. Graphs that were captured for several sizes of a batch share it: one of them is
    replayed at a time."""

    number: int
    header: int
    room: int
    """For so many parts."""


class Shape(NamedTuple):
    """What a value was when a graph was captured."""

    shape: tuple[int, ...]
    batch: bool
    """Its first dimension is the batch's, padding included."""


class Replayed(NamedTuple):
    """What a slot holds when a step is over."""

    row: bytes
    """As `statistics.ROW` has it."""
    fired: int
    """How often the value was measured in the step; the row is that of the last time."""
    shape: tuple[int, ...]


class Arrival:
    """The slots of one step on their way to the host."""

    def __init__(self, host: torch.Tensor, event: Event, shapes: Sequence[Shape], rows: tuple[int, int]) -> None:
        self._host = host
        self._event = event
        self._shapes = shapes
        self._begin, self._end = rows
        self._words: bytes | None = None

    def slot(self, slot: Slot) -> Replayed | None:
        """None if nothing was measured into it. Waits for the GPU."""
        if self._words is None:
            self._event.synchronize()
            self._words = ctypes.string_at(self._host.data_ptr(), self._host.nbytes)
        row, fired, tag = SLOT.unpack_from(self._words, slot.number * SLOT.size)
        if not fired:
            return None
        shape, batch = self._shapes[tag]
        if batch and self._end >= 0:
            shape = (max(min(shape[0], self._end) - self._begin, 0), *shape[1:])
        return Replayed(row, fired, shape)
