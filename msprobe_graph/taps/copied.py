"""What the graphs that were replayed in a step have copied becomes files, once it is known what that was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from msprobe_graph.dump.records import FULL, Hole, TensorRecord
from msprobe_graph.dump.saved import Sink

from .arrival import Arrival, Slot

NO_ROOM = "not saved: what CUDA graphs copy has no room left in graph_copy_bytes (%d); a larger one has it saved"
NO_COPY = "not saved: the CUDA graph that was replayed was captured without a copy of it"


class Copied(NamedTuple):
    """A value that CUDA graphs may copy, for files that are the same."""

    slots: Sequence[Slot]
    """Of the value that is copied."""
    dtype: torch.dtype
    of_copy: Callable[[torch.Tensor], torch.Tensor]
    """Gives the value, which may be a part of what is copied."""
    files: Sequence[tuple[str, TensorRecord]]
    """Their names, and the records that are to tell them: each has one of its own."""


class CopiedInStep:
    """One step's copies of values: a `dump.records.Copies`."""

    def __init__(self, step: int, values: Sequence[Copied], arrival: Arrival | None) -> None:
        self._step = step
        self._values = values
        self._arrival = arrival

    def save(self, sink: Sink) -> list[Hole]:
        return [hole for value in self._values for hole in self._save(value, sink)]

    def _save(self, value: Copied, sink: Sink) -> list[Hole]:
        arrival = self._arrival
        written = None if arrival is None else arrival.first(value.slots)
        if arrival is None or written is None:  # the record says it
            return []
        copy = arrival.copy(written, value.dtype)
        if copy is None:
            copies = arrival.copies
            reason = NO_ROOM % copies.room if copies is not None and written.captured.copied else NO_COPY
            return [Hole(name, reason) for name, _ in value.files]
        found = value.of_copy(copy)
        shape = value.files[0][1].shape
        if shape is not None and math.prod(shape) == found.numel():  # of a view it is another one
            found = found.reshape(shape)
        own = found.clone(memory_format=torch.contiguous_format)  # what arrives is one block of memory
        if not sink.keep(self._step, [name for name, _ in value.files], own):
            return [Hole(name, FULL) for name, _ in value.files]
        for name, record in value.files:
            record.data_name = name
        return []
