"""What is known about a tensor's values, and how it is read off a row."""

import math
import struct
from typing import TypeAlias

import torch

from msprobe_graph.dump.records import Replayed, Statistics

ROW = struct.Struct("=4d4q")
"""One row, 64 bytes: max, min, mean and norm of the finite values as float64; the counts of NaN, +Inf, -Inf and finite
values as int64. In a row of an integer dtype (bool too) the exact maximum and minimum stand in place of the counts of
NaN and +Inf; those of an uint64 as the int64 with the same bits. `struct row` in statistics.c is the same layout."""


REAL = frozenset(
    value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex)
)
"""Dtypes whose values may be NaN or infinite."""

EMPTY = Statistics(None, None, None, None)
"""Of a tensor without elements."""

Row: TypeAlias = tuple[float, float, float, float, int, int, int, int]
"""A row, unpacked by `ROW`."""


def read_row(row: Row, dtype: torch.dtype, replayed: Replayed | None = None) -> Statistics:
    """The statistics that a row of a tensor of `dtype` holds."""
    high, low, mean, norm, nans, posinfs, neginfs, finites = row
    if dtype not in REAL:
        return _read_integers(row, dtype, replayed)
    if not (nans or posinfs or neginfs):
        if not finites:
            return _empty(replayed)
        return Statistics(high, low, mean, norm, replayed=replayed)
    if nans:
        propagated = (math.nan, math.nan, math.nan, math.nan)
    else:
        propagated = (
            math.inf if posinfs else high if finites else -math.inf,
            -math.inf if neginfs else low if finites else math.inf,
            math.nan if posinfs and neginfs else math.inf if posinfs else -math.inf,
            math.inf,
        )
    if not finites:
        return Statistics(*propagated, nans, posinfs, neginfs, replayed=replayed)
    return Statistics(*propagated, nans, posinfs, neginfs, high, low, mean, norm, replayed)


def _read_integers(row: Row, dtype: torch.dtype, replayed: Replayed | None) -> Statistics:
    _, _, mean, norm, high, low, _, count = row
    if not count:
        return _empty(replayed)
    if dtype is torch.bool:
        return Statistics(bool(high), bool(low), mean, norm, replayed=replayed)
    if dtype is torch.uint64:
        high, low = high % 2**64, low % 2**64
    return Statistics(high, low, mean, norm, replayed=replayed)


def _empty(replayed: Replayed | None) -> Statistics:
    return Statistics(None, None, None, None, replayed=replayed)
