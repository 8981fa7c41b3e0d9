"""The rows of one step: a tensor is measured where it passes, its statistics are read when the step is over."""

import ctypes
import itertools
import struct

import torch

from msprobe_graph.dump.records import Statistics

from . import native, portable
from .statistics import ROW, read_row
from .unmeasurable import Unmeasurable, address_of, refuse_unmeasurable

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

    def __init__(self) -> None:
        self._native = native.library()
        self._numbers = itertools.count()
        self._dtypes: dict[int, torch.dtype] = {}
        self._addresses: list[int] = []  # of all rows allocated
        self._chunks: list[ctypes.Array[ctypes.c_char]] = []  # their memory
        # Rows that lie on a device until fetch() puts them into their places, with their numbers.
        self._elsewhere: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Measure `tensor`, of any shape, strides and dtype, as it is now, and return the number of its row.

        Numbers count from 0. `Unmeasurable` with the reason if it has no values to read: sparse, nested, quantized,
        meta, fake, inside a torch.func transform, or of a dtype without arithmetic. Call it with torch functions and
        dispatch modes disabled.
        """
        dtype = tensor.dtype
        code = native.CODES.get(dtype)
        if code is None or self._native is None or not tensor.is_cpu:
            return self._add_portably(tensor)
        address = address_of(tensor)
        count = tensor.numel()
        number = next(self._numbers)
        self._dtypes[number] = dtype
        if number >= len(self._addresses):
            self._grow(number)
        if count:
            self._native.measure(tensor, address, count, code, self._addresses[number])
        return number

    def fetch(self) -> list[Statistics]:
        """The statistics of all rows, by number. Waits for the devices that hold some; call it off the hot path."""
        elsewhere, self._elsewhere = self._elsewhere, {}  # at once: rows may be added meanwhile
        for (device, real), rows in elsewhere.items():
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # rows were written on whatever stream was current
            transferred = torch.stack([row for _, row in rows]).cpu()
            words = transferred if real is torch.float64 else portable.widen(transferred)
            for (number, _), row in zip(rows, words.tolist(), strict=True):
                ctypes.memmove(self._addresses[number], struct.pack("=8q", *row), ROW.size)
        measured = itertools.chain.from_iterable(ROW.iter_unpack(chunk) for chunk in self._chunks)
        return [
            read_row(row, self._dtypes[number]) for number, row in zip(range(len(self._dtypes)), measured, strict=False)
        ]

    def _add_portably(self, tensor: torch.Tensor) -> int:
        refuse_unmeasurable(tensor)
        dtype = tensor.dtype
        if dtype.is_complex:
            return self.add(portable.absolute(tensor))
        if dtype not in native.CODES:
            raise Unmeasurable(f"torch does not compute with {dtype}")
        real = portable.precision(tensor)
        measured = portable.measure(tensor, real)
        number = next(self._numbers)
        self._dtypes[number] = dtype
        self._grow(number)
        self._elsewhere.setdefault((measured.device, real), []).append((number, measured))
        return number

    def _grow(self, number: int) -> None:
        """Allocate up to row `number`. A new row is 64 bytes of zeros, which is the row of an empty tensor."""
        while number >= len(self._addresses):
            chunk = (ctypes.c_char * (CHUNK * ROW.size))()
            start = ctypes.addressof(chunk)
            self._chunks.append(chunk)
            self._addresses.extend(range(start, start + CHUNK * ROW.size, ROW.size))
