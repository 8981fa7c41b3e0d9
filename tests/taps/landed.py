"""Slots of graphs on the host, as if a device had brought them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from msprobe_graph.taps.arrival import WORDS
from msprobe_graph.taps.statistics import ROW

Row = tuple[float | int, ...]


class Landed:
    """An `arrival.Landing` of rows, each with how often it was measured, and all of the first shape. `native` is what a
    driver would give; 0, 0: all is there."""

    def __init__(self, rows: Sequence[Row], fired: Sequence[int], native: tuple[int | None, int] | None) -> None:
        packed = b"".join(ROW.pack(*row) + struct.pack("=2q", times, 0) for row, times in zip(rows, fired, strict=True))
        self._words = np.frombuffer(bytearray(packed), dtype=np.int64).reshape(-1, WORDS)
        self.address = self._words.ctypes.data
        self.count = len(self._words)
        self.native = native

    def synchronize(self) -> None:
        pass
