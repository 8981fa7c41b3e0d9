"""What is known about a tensor's values, and how it is read off a row."""

import math
import struct

import msgspec
import torch

ROW = struct.Struct("=4d4q")
"""One row, 64 bytes: max, min, mean and norm of the finite values as float64; the counts of NaN, +Inf, -Inf and finite
values as int64. In a row of an integer dtype (bool too) the exact maximum and minimum stand in place of the counts of
NaN and +Inf; those of an uint64 as the int64 with the same bits. `struct row` in statistics.c is the same layout."""


class Statistics(msgspec.Struct, frozen=True, gc=False):
    """The statistics of one tensor.

    `max`, `min`, `mean` and `norm` (the L2 norm over all elements) are what torch.max, torch.min, torch.mean and
    torch.norm make of NaN and infinities, but computed in float64: 16 elements of 60000 in float16 have the norm
    240000. Of a complex tensor they are those of its absolute values. `max` and `min` are exact ints for integer
    dtypes and bools for torch.bool. All four are None for an empty tensor.

    `finite_max` to `finite_norm` are the same over the finite values alone: None unless the tensor holds finite values
    and others.

    Of torch.tensor([3.0, 4.0, float("inf")]):
    Statistics(max=inf, min=3.0, mean=inf, norm=inf, nan_count=0, posinf_count=1, neginf_count=0,
               finite_max=4.0, finite_min=3.0, finite_mean=3.5, finite_norm=5.0)
    """

    max: float | int | bool | None
    min: float | int | bool | None
    mean: float | None
    norm: float | None
    nan_count: int = 0
    posinf_count: int = 0
    neginf_count: int = 0
    finite_max: float | None = None
    finite_min: float | None = None
    finite_mean: float | None = None
    finite_norm: float | None = None


EMPTY = Statistics(None, None, None, None)


def read_row(row: tuple[float, float, float, float, int, int, int, int], dtype: torch.dtype) -> Statistics:
    """The statistics that a row (unpacked by `ROW`) of a tensor of `dtype` holds."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return _read_integers(row, dtype)
    high, low, mean, norm, nans, posinfs, neginfs, finites = row
    if not (nans or posinfs or neginfs):
        return Statistics(high, low, mean, norm) if finites else EMPTY
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
