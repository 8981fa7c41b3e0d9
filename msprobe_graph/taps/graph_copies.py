"""Copies of values that a graph makes each time it is replayed: where they lie, and how they come to the host.

What is copied lies in memory that is no graph's, in row-major order. Nothing is allocated while a graph is captured:
CUDA doesn't allow it. So all the memory is taken when the first region is compiled whose graphs may be captured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from .arrival import HostCopies, Place, Shape, Slot
from .device import Accelerator

MOST_BYTES = 2 << 30
"""As much is taken when nobody says, but no more than a quarter of what the device has free."""
ALIGNMENT = 256


class GraphCopies:
    """The copies of one device's graphs, of `size` bytes in all."""

    def __init__(self, device: Accelerator, size: int | None = None) -> None:
        """Raises torch.OutOfMemoryError where the device has less than `size`. None: see MOST_BYTES."""
        free = device.free_memory() if size is None else None
        self.size = size or min(MOST_BYTES, MOST_BYTES if free is None else free // 4)
        self._used = 0
        self._places: defaultdict[int, list[Place]] = defaultdict(list)
        """By slot number. More than one where a graph needed more room than those before it."""
        with torch.inference_mode(False):  # or it could be written in that mode only
            self._memory = torch.empty(self.size, dtype=torch.uint8, device=device.device)

    def placed(self, shape: Shape, slot: Slot, value: torch.Tensor) -> Shape:
        """The shape of a value that a graph is to copy, and measures into a slot, with the place for it."""
        return shape._replace(copied=True, place=self._place(slot, value.nbytes, shape.shape[0] if shape.batch else 0))

    def _place(self, slot: Slot, size: int, rows: int) -> Place | None:
        row = size // rows if rows else 0
        places = self._places[slot.number]
        found = next((place for place in places if place.size >= size), None)
        if found is None:
            if self._used + size > self.size:
                return None
            found = Place(self._used, size, row)
            places.append(found)
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
        elif found.row != row:
            found.row = 0
        return found

    def memory(self, place: Place, size: int) -> torch.Tensor:
        """The first bytes of a place, so many."""
        return self._memory[place.begin : place.begin + size]

    def bring(self, slots: Iterable[Slot], rows: tuple[int, int]) -> HostCopies:
        """Have what was copied of these slots' values brought to the host, as it is at this point of the current stream
        and without waiting for it: of a batch the `rows` from the first up to but without the second (-1: all)."""
        pieces: list[tuple[Place, int, int]] = []
        begin, end = rows
        for slot in slots:
            for place in self._places.get(slot.number, ()):
                cut = place.row and end >= 0
                first = min(begin * place.row, place.size) if cut else 0
                pieces.append((place, first, max(min(end * place.row, place.size), first) if cut else place.size))
        found: dict[int, tuple[int, int]] = {}
        used = 0
        for place, first, last in pieces:
            found[place.begin] = used, first
            used += -(-(last - first) // ALIGNMENT) * ALIGNMENT
        with torch.inference_mode(False), torch.no_grad():
            host = torch.empty(used, dtype=torch.uint8, device="cpu", pin_memory=used > 0)
            for place, first, last in pieces:
                at, _ = found[place.begin]
                source = self._memory[place.begin + first : place.begin + last]
                host[at : at + last - first].copy_(source, non_blocking=True)
        return HostCopies(host, found, self.size)
