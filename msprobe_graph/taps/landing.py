"""Where a GPU's rows arrive on the host: kernels write them there, and an event tells when they have."""

from __future__ import annotations

import ctypes
import functools

import torch

from .arrival import WORDS


class Landings:
    """Memory for the rows of one step after the other. To get pinned memory and an event anew takes longer than a step
    has."""

    def __init__(self) -> None:
        self._free: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def take(self, rows: int) -> Landing:
        """Room for so many rows, for the stream that is current."""
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory[0]) < rows:
            room = 1 << max(rows - 1, 255).bit_length()
            words = torch.empty((room, WORDS), dtype=torch.int64, device="cpu", pin_memory=True)
            memory = words, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        return Landing(self._free, *memory, rows)


class Landing:
    """The rows of one step. When nobody refers to it any more its memory is another's."""

    def __init__(
        self, free: list[tuple[torch.Tensor, torch.cuda.Event]], words: torch.Tensor, event: torch.cuda.Event, rows: int
    ) -> None:
        self._free = free
        self._memory = words, event
        self.words = words[:rows]
        """int64s in pinned memory, of shape [rows, WORDS]: kernels are to write all of them."""

    def expect(self, stream: torch.cuda.Stream) -> None:
        """All is written at this point of the stream."""
        self._memory[1].record(stream)

    @property
    def native(self) -> tuple[int, int] | None:
        """The driver's function that tells whether an event has happened, and the event that it is to be asked for."""
        query = _query()
        return None if query is None else (query, self._memory[1].cuda_event)

    def synchronize(self) -> None:
        """Wait until it is, without holding the interpreter's lock or a core."""
        self._memory[1].synchronize()

    def __del__(self) -> None:
        self._free.append(self._memory)


@functools.cache
def _query() -> int | None:
    """The address of cuEventQuery."""
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuEventQuery, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
