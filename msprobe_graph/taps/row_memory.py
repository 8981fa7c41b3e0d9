"""Memory of a GPU that one step after the other puts its rows into."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .landing import Landings

CHUNK = 1 << 17
"""Rows that are allocated at once: 8 MiB."""
MOST = 1 << 21
"""Rows that are ever allocated for calls like earlier ones: 128 MiB."""


class RowMemory:
    """Chunks of rows whose first words are zeros, for the stream that takes them.

    A step that is over gives its chunks back, so they are allocated in the first steps only, and never in a pool of
    memory that is set up for CUDA graphs, where torch finds what it did not expect.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.device, int], list[torch.Tensor]] = defaultdict(list)
        """By device and stream: what one stream zeroes, another may not use at once."""
        self._lock = threading.Lock()
        self._headers: tuple[bytes, torch.device, int, torch.Tensor] | None = None
        self.room = CHUNK
        """Rows for one step's calls that are like earlier ones."""

    @functools.cached_property
    def landings(self) -> Landings:
        """Where the rows of calls that are like earlier ones arrive."""
        from .landing import Landings  # which needs Triton

        return Landings()

    def make_room(self) -> None:
        """They were too few: from the next step on there are more."""
        self.room = min(2 * self.room, MOST)

    def take(self, rows: int, stream: torch.cuda.Stream) -> torch.Tensor:
        """int64s of shape [`rows` or more, 8]."""
        with self._lock:
            free = self._free[stream.device, stream.cuda_stream]
            fitting = next((at for at, chunk in enumerate(free) if rows <= len(chunk)), None)
            if fitting is not None:
                return free.pop(fitting)
        with ThreadPoolExecutor(1) as elsewhere:  # such pools take what one thread allocates
            return elsewhere.submit(_zeros, max(CHUNK, rows), stream).result()

    def give_back(self, chunk: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """A chunk whose rows begin with zeros again, and which nothing but what the stream has to do already still
        uses."""
        if len(chunk) in (CHUNK, self.room):
            with self._lock:
                self._free[stream.device, stream.cuda_stream].append(chunk)

    def headers(self, rows: bytes, stream: torch.cuda.Stream) -> torch.Tensor:
        """Numbers of rows, given as int64s, for the stream, which is the current one: the same tensor again as long as
        they are the same."""
        wanted = rows, stream.device, stream.cuda_stream
        if self._headers is None or self._headers[:3] != wanted:
            there = torch.frombuffer(bytearray(rows), dtype=torch.int64).pin_memory()
            self._headers = *wanted, there.to(stream.device, non_blocking=True)
        return self._headers[3]


def _zeros(rows: int, stream: torch.cuda.Stream) -> torch.Tensor:
    with torch.cuda.stream(stream):
        return torch.zeros((rows, 8), dtype=torch.int64, device=stream.device)
