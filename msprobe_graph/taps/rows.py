"""The rows of one step: a tensor is measured where it passes, its statistics are read when the step is over."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from msprobe_graph.dump.records import Statistics

from . import native, portable
from .device import of as device_of
from .row_memory import RowMemory
from .statistics import ROW, read_row
from .unmeasurable import Unmeasurable, address_of, refuse_unmeasurable

if TYPE_CHECKING:
    from .arrival import Arrival, Slot
    from .rows_in_graphs import RowsInGraphs
    from .triton_rows import TritonRows

CHUNK = 1024
"""Rows that are allocated at once; the memory of a row never moves."""


class Rows:
    """Measures tensors now and gives their statistics later.

    >>> rows = Rows()
    >>> number = rows.add(tensor)        # 2 us and one pass over a CPU tensor; no synchronisation on other devices
    >>> rows.fetch()[number]             # later, in any thread: one transfer per device for all rows
    Statistics(max=4.0, min=3.0, mean=3.5, norm=5.0, ...)

    `add` may be called from several threads (a backward pass has its own), `fetch` once, after the last of them.
    """

    def __init__(self, memory: RowMemory | None = None) -> None:
        """`memory` of GPUs that the rows of earlier steps have used."""
        self._memory = memory
        self._native = native.library()
        self._numbers = itertools.count()
        self._dtypes: dict[int, torch.dtype] = {}
        self._addresses: list[int] = []  # of all rows allocated
        self._chunks: list[ctypes.Array[ctypes.c_char]] = []  # their memory
        # Rows that lie on a device until fetch() puts them into their places, with their numbers.
        self._elsewhere: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
        # Rows that Triton kernels make, with the numbers that they have here.
        self._on_gpus: dict[tuple[torch.device, int], tuple[TritonRows, list[int]]] = {}
        """By stream."""
        self._lock = threading.Lock()
        self._reserved: dict[int, tuple[RowsInGraphs, Sequence[Slot]]] = {}
        self._copied: defaultdict[RowsInGraphs, set[Slot]] = defaultdict(set)
        self._arrivals: dict[RowsInGraphs, Arrival | None] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Measure `tensor`, of any shape, strides and dtype, as it is now, and return the number of its row.

        Numbers count from 0. `Unmeasurable` with the reason if it has no values to read: sparse, nested, quantized,
        meta, fake, inside a torch.func transform, or of a dtype without arithmetic. Call it with torch functions and
        dispatch modes disabled.
        """
        dtype = tensor.dtype
        code = native.CODES.get(dtype)
        if code is None or self._native is None or not tensor.is_cpu:
            return self._add_elsewhere(tensor)
        address = address_of(tensor)
        count = tensor.numel()
        number = next(self._numbers)
        self._dtypes[number] = dtype
        if number >= len(self._addresses):
            self._grow(number)
        if count:
            self._native.measure(tensor, address, count, code, self._addresses[number])
        return number

    def reserve(self, graph: RowsInGraphs, slots: Sequence[Slot], dtype: torch.dtype) -> int:
        """The number of a row for what a CUDA graph measures into one of the slots."""
        number = next(self._numbers)
        self._dtypes[number] = dtype
        self._grow(number)
        self._reserved[number] = graph, tuple(slots)  # as they are now
        return number

    def want_copies(self, graph: RowsInGraphs, slots: Iterable[Slot]) -> None:
        """Have the copies brought to the host, too, that CUDA graphs have made of the values of these slots."""
        self._copied[graph].update(slots)

    def seal(self, finished: bool, graphs: Iterable[RowsInGraphs] = ()) -> None:
        """Have the GPUs bring to the host what they have measured so far, without waiting for it, and what their graphs
        have, these and those that rows are reserved for, if the step is `finished`. To be called in the stream's
        order."""
        with self._lock:
            for rows, _ in self._on_gpus.values():
                rows.seal(finished)
        if finished:
            for graph in {*graphs, *(graph for graph, _ in self._reserved.values())}:
                self._arrivals[graph] = graph.arrive(self._copied[graph])

    def arrival(self, graph: RowsInGraphs) -> Arrival | None:
        """What CUDA graphs have measured in this step, which is over and sealed."""
        return self._arrivals.get(graph)

    @property
    def arriving(self) -> int:
        """Bytes of the host's memory for what CUDA graphs have copied."""
        copies = (arrival.copies for arrival in self._arrivals.values() if arrival is not None)
        return sum(each.host.nbytes for each in copies if each is not None)

    def fetch(self) -> list[Statistics | None]:
        """The statistics of all rows, by number; None for one that was reserved and not written. Waits for the devices
        that hold some; call it off the hot path."""
        elsewhere, self._elsewhere = self._elsewhere, {}  # at once: rows may be added meanwhile
        for (device, real), rows in elsewhere.items():
            device_of(device).synchronize()  # rows were written on whatever stream was current
            transferred = torch.stack([row for _, row in rows]).cpu()
            words = transferred if real is torch.float64 else portable.widen(transferred)
            for (number, _), row in zip(rows, words.tolist(), strict=True):
                ctypes.memmove(self._addresses[number], struct.pack("=8q", *row), ROW.size)
        for on_gpu, numbers in list(self._on_gpus.values()):
            for number, packed in zip(numbers, on_gpu.fetch(), strict=False):  # rows may be added meanwhile
                ctypes.memmove(self._addresses[number], packed, ROW.size)
        measured = itertools.chain.from_iterable(ROW.iter_unpack(chunk) for chunk in self._chunks)
        found: list[Statistics | None] = [
            read_row(row, self._dtypes[number]) for number, row in zip(range(len(self._dtypes)), measured, strict=False)
        ]
        for number in self._reserved:
            found[number] = self._replayed(number)
        return found

    def _replayed(self, number: int) -> Statistics | None:
        graph, slots = self._reserved[number]
        arrival = self.arrival(graph)
        written = None if arrival is None else arrival.first(slots)
        return None if written is None else written.statistics(self._dtypes[number])

    def _add_elsewhere(self, tensor: torch.Tensor) -> int:
        """A tensor that the C code doesn't read."""
        refuse_unmeasurable(tensor)
        dtype = tensor.dtype
        if dtype.is_complex:
            return self.add(portable.absolute(tensor))
        if tensor.is_cuda and dtype in native.CODES and has_triton() and tensor.numel():
            return self._add_on_gpu(tensor)
        if dtype not in native.CODES:
            raise Unmeasurable(f"torch does not compute with {dtype}")
        real = portable.precision(tensor)
        measured = portable.measure(tensor, real)
        number = next(self._numbers)
        self._dtypes[number] = dtype
        self._grow(number)
        self._elsewhere.setdefault((measured.device, real), []).append((number, measured))
        return number

    def _add_on_gpu(self, tensor: torch.Tensor) -> int:
        from .triton_rows import TritonRows

        with self._lock:
            stream = tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream
            known = self._on_gpus.get(stream)
            if known is None:
                known = self._on_gpus[stream] = TritonRows(tensor.device, self._memory), []
            rows, numbers = known
            number = next(self._numbers)
            self._dtypes[number] = tensor.dtype
            self._grow(number)
            rows.add(tensor.detach().resolve_neg())
            numbers.append(number)
            return number

    def _grow(self, number: int) -> None:
        """Allocate up to row `number`. A new row is 64 bytes of zeros, which is the row of an empty tensor."""
        while number >= len(self._addresses):
            chunk = (ctypes.c_char * (CHUNK * ROW.size))()
            start = ctypes.addressof(chunk)
            self._chunks.append(chunk)
            self._addresses.extend(range(start, start + CHUNK * ROW.size, ROW.size))


@functools.cache
def has_triton() -> bool:
    """Whether there is a Triton to make kernels for GPUs; without it plain torch measures, many times slower."""
    return importlib.util.find_spec("triton") is not None
