"""What is known about a tensor's values, and how it is read off a row."""

import math
import struct

import torch

from msprobe_graph.dump.records import Statistics

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


def read_row(row: tuple[float, float, float, float, int, int, int, int], dtype: torch.dtype) -> Statistics:
    """The statistics that a row (unpacked by `ROW`) of a tensor of `dtype` holds."""
    high, low, mean, norm, nans, posinfs, neginfs, finites = row
    if dtype not in REAL:
        return _read_integers(row, dtype)
    if finites and not (nans or posinfs or neginfs):
        return Statistics(high, low, mean, norm)
    if not (nans or posinfs or neginfs):
        return EMPTY
    if nans:
        propagated = (math.nan, math.nan, math.nan, math.nan)
    else:
        propagated = (
            math.inf if posinfs else high if finites else -math.inf,
            -math.inf if neginfs else low if finites else math.inf,
            math.nan if posinfs and neginfs else math.inf if posinfs else -math.inf,
            math.inf,
        )
    finite = (high, low, mean, norm) if finites else ()
    return Statistics(*propagated, nans, posinfs, neginfs, *finite)


def _read_integers(row: tuple[float, float, float, float, int, int, int, int], dtype: torch.dtype) -> Statistics:
    _, _, mean, norm, high, low, _, count = row
    if not count:
        return EMPTY
    if dtype is torch.bool:
        return Statistics(bool(high), bool(low), mean, norm)
    if dtype is torch.uint64:
        high, low = high % 2**64, low % 2**64
    return Statistics(high, low, mean, norm)
