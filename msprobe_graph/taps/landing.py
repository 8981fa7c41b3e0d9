"""Where a GPU's rows arrive on the host: kernels write them there, and an event tells when they have."""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict

import torch

from .arrival import WORDS

Memory = tuple[torch.Tensor, torch.cuda.Event]


class Landings:
    """Memory for the rows of one step after the other. To get pinned memory and an event anew takes longer than a step
    has."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Memory]] = defaultdict(list)
        """By their rows: from step to step these are the same, or one of a few numbers."""

    def take(self, rows: int) -> Landing:
        """Room for so many rows, for the stream that is current."""
        free = self._free[rows]
        if free:
            return Landing(free, *free.pop())
        words = torch.empty((rows, WORDS), dtype=torch.int64, device="cpu", pin_memory=True)
        return Landing(free, words, torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]


class Landing:
    """The rows of one step. When nobody refers to it any more its memory is another's."""

    def __init__(self, free: list[Memory], words: torch.Tensor, event: torch.cuda.Event) -> None:
        self._free = free
        self._event = event
        self.words = words
        """int64s in pinned memory, of shape [rows, WORDS]: kernels are to write all of them."""

    def expect(self, stream: torch.cuda.Stream) -> None:
        """All is written at this point of the stream."""
        self._event.record(stream)

    @property
    def native(self) -> tuple[int, int] | None:
        """The driver's function that tells whether an event has happened, and the event that it is to be asked for."""
        query = _query()
        return None if query is None else (query, self._event.cuda_event)

    def synchronize(self) -> None:
        """Wait until it is, without holding the interpreter's lock or a core."""
        self._event.synchronize()

    def __del__(self) -> None:
        self._free.append((self.words, self._event))


@functools.cache
def _query() -> int | None:
    """The address of cuEventQuery."""
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuEventQuery, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
