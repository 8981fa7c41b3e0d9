"""What the tests of rows on a GPU share: values of all dtypes and layouts, and a row against float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from msprobe_graph.taps import Statistics
from msprobe_graph.taps.statistics import ROW, read_row
from msprobe_graph.taps.triton_rows import KINDS

DEVICE = torch.device("cuda", 0)
BLOCK = 2048
"""Elements that a program reads at once."""
FEW = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]

every_dtype = pytest.mark.parametrize("dtype", list(KINDS), ids=str)
few_dtypes = pytest.mark.parametrize("dtype", FEW, ids=str)

View = Callable[[torch.Tensor], torch.Tensor]

VIEWS: dict[str, View] = {  # of a matrix of 40 by 90
    "dense": lambda x: x,
    "unaligned": lambda x: x.reshape(-1)[1:],
    "transposed": lambda x: x.t(),
    "columns": lambda x: x[:, 7:40],
    "every third": lambda x: x[::3, ::2],
    "column": lambda x: x[:, 5],
    "expanded": lambda x: x[:, 3:4].expand(3, 40, 90),
    "overlapping": lambda x: x.unfold(1, 4, 1),
    "four dimensions": lambda x: x.reshape(4, 9, 10, 10).permute(3, 1, 0, 2)[1:],
    "one element": lambda x: x[7:8, 7:8],
    "0-d": lambda x: x[3, 4],
}


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Small floats, integers anywhere in their range."""
    torch.manual_seed(0)
    if dtype is torch.bool:
        return torch.rand(shape) > 0.3
    if not dtype.is_floating_point:
        return bits(dtype, *shape)
    values = torch.randn(shape, dtype=torch.float64).mul(3)
    return (values.abs() if dtype is torch.float8_e8m0fnu else values).float().to(dtype)


def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits: of floats NaN, infinities, huge values and subnormals."""
    torch.manual_seed(1)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def statistics(row: bytes, dtype: torch.dtype) -> Statistics:
    return read_row(ROW.unpack(row), dtype)


def check(row: bytes, tensor: torch.Tensor) -> None:
    """`tensor`, on the CPU, is what was measured."""
    found = statistics(row, tensor.dtype)
    if tensor.dtype.is_floating_point:
        check_floats(found, tensor)
    else:
        values = [int(value) for value in tensor.flatten().tolist()]
        kind = bool if tensor.dtype is torch.bool else int
        assert (type(found.max), found.max, type(found.min), found.min) == (kind, max(values), kind, min(values))
        norm = math.sqrt(sum(value**2 for value in values))
        assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-12, abs=1e-12 * norm)
        assert found.norm == pytest.approx(norm, rel=1e-12)


def check_floats(found: Statistics, tensor: torch.Tensor) -> None:
    exact = tensor.to(torch.float64).flatten()
    finite = exact[exact.isfinite()]
    whole = len(finite) == len(exact)
    assert found.nan_count == int(exact.isnan().sum())
    assert found.posinf_count == int((exact == math.inf).sum())
    assert found.neginf_count == int((exact == -math.inf).sum())
    finites = (found.finite_max, found.finite_min, found.finite_mean, found.finite_norm)
    if whole:
        assert finites == (None, None, None, None)
        finites = (found.max, found.min, found.mean, found.norm)
    if not len(finite):
        assert finites == (None, None, None, None)
        return
    high, low, mean, norm = finites
    assert (high, low) == (finite.max().item(), finite.min().item())
    size = finite.abs().max().item()
    scaled = finite / (size or 1.0)  # its squares stay in range
    tolerance = 1e-12 if tensor.dtype is torch.float64 else 2e-6
    least = 5e-324  # of which a mean so small is a multiple
    assert mean == pytest.approx(math.fsum(scaled.tolist()) / len(scaled) * size, rel=0, abs=tolerance * size + least)
    assert norm == pytest.approx(scaled.norm().item() * size, rel=tolerance, abs=least)
