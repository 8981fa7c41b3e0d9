"""Where a GPU's rows arrive on the host: a kernel writes them there, and an event tells when it has."""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from typing import NamedTuple

import torch

from .arrival import WORDS
from .launching import Kernel, launch
from .likeness import extension
from .triton_finish import finish
from .triton_rows import FINISHING_WARPS

LEAST = 256
"""Rows that there is room for at least."""


class Memory(NamedTuple):
    """What one step after the other uses, but no two at a time."""

    words: torch.Tensor
    """int64s in pinned memory, of shape [rows, WORDS]."""
    address: int
    event: torch.cuda.Event


class Landings:
    """Brings the rows of one step after the other. To get pinned memory and an event anew, or to have Triton launch a
    kernel, takes longer than a step has."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, int, int], list[Memory]] = defaultdict(list)
        """By device, stream, and how many rows there is room for: what one stream may still write, another may not."""
        self._kernels: dict[tuple[int, bool], Kernel | None] = {}
        """By device and `anew`."""

    def bring(
        self, rows: torch.Tensor, headers: torch.Tensor, count: int, stream: torch.cuda.Stream, anew: bool
    ) -> Landing:
        """Have the first `count` of the headers' rows brought, in the stream, which is the current one. anew: see
        `triton_finish.finish`. Both tensors begin at multiples of 16 bytes."""
        device, handle = stream.device_index, stream.cuda_stream
        room = max(LEAST, 1 << (count - 1).bit_length())
        free = self._free[device, handle, room]
        memory = free.pop() if free else _memory(room)
        compiled, kernel = extension(), self._kernels.get((device, anew))
        addresses = rows.data_ptr(), headers.data_ptr(), memory.address
        if compiled is None or kernel is None or not compiled.launch(kernel, count, handle, *addresses):
            parameters = rows, headers, memory.words
            launch(finish, count, *parameters, ANEW=anew, num_warps=FINISHING_WARPS)
            found = launch.kernel(finish, *parameters, ANEW=anew, num_warps=FINISHING_WARPS)
            self._kernels[device, anew] = found
        return Landing(free, memory, count)


class Landing:
    """The rows of one step: an `arrival.Landing`. When nobody refers to it any more its memory is another's."""

    def __init__(self, free: list[Memory], memory: Memory, count: int) -> None:
        self.address = memory.address
        self.count = count
        self._free = free
        self._memory = memory

    def expect(self, stream: torch.cuda.Stream) -> None:
        """All is there at this point of the stream."""
        self._memory.event.record(stream)

    @property
    def native(self) -> tuple[int, int] | None:
        """See `arrival.Event`."""
        query = _query()
        return None if query is None else (query, self._memory.event.cuda_event)

    def synchronize(self) -> None:
        """Wait until all is there, without holding the interpreter's lock or a core."""
        self._memory.event.synchronize()

    def __del__(self) -> None:
        self._free.append(self._memory)


def _memory(rows: int) -> Memory:
    words = torch.empty((rows, WORDS), dtype=torch.int64, device="cpu", pin_memory=True)
    return Memory(words, words.data_ptr(), torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]


@functools.cache
def _query() -> int | None:
    """The address of cuEventQuery."""
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuEventQuery, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
