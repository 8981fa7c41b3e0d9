"""Rows that Triton kernels measure on a GPU, one by one, against float64 on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from msprobe_graph.taps import row_memory
from msprobe_graph.taps import triton_kernels as kernels
from msprobe_graph.taps.triton_rows import KINDS, MOST_PARTS, TritonRows, layout

from .gpu_rows import BLOCK, DEVICE, VIEWS, bits, check, every_dtype, few_dtypes, numbers, statistics

pytestmark = pytest.mark.gpu


def measured(*tensors: torch.Tensor) -> list[bytes]:
    rows = TritonRows(DEVICE)
    for tensor in tensors:
        rows.add(tensor)
    return rows.fetch()


@every_dtype
def test_every_dtype_and_layout(dtype: torch.dtype) -> None:
    there = numbers(dtype, 40, 90)
    here = there.to(DEVICE)
    rows = measured(*(view(here) for view in VIEWS.values()))
    for row, view in zip(rows, VIEWS.values(), strict=True):
        check(row, view(there))


@pytest.mark.parametrize("dtype", [dtype for dtype in KINDS if dtype is not torch.bool], ids=str)
def test_any_bits(dtype: torch.dtype) -> None:
    there = bits(dtype, 60, 70)
    for row, view in zip(measured(there.to(DEVICE), there.to(DEVICE).t()), (there, there.t()), strict=True):
        check(row, view)


@pytest.mark.parametrize("dtype", [dtype for dtype in KINDS if dtype.itemsize == 1], ids=str)
def test_each_value_of_one_byte(dtype: torch.dtype) -> None:
    raw = torch.arange(2 if dtype is torch.bool else 256, dtype=torch.uint8)
    values = raw.view(dtype)
    here = values.to(DEVICE)
    for number, row in enumerate(measured(*(here[number] for number in raw.tolist()))):
        check(row, values[number])


@few_dtypes
@pytest.mark.parametrize(
    "count",
    [1, BLOCK - 1, BLOCK, BLOCK + 1, 64 * BLOCK, 64 * BLOCK + 1, MOST_PARTS * BLOCK, MOST_PARTS * BLOCK + 1],
)
def test_sizes_around_blocks_and_parts(dtype: torch.dtype, count: int) -> None:
    assert KINDS[dtype].block == BLOCK
    there = numbers(dtype, count)
    (row,) = measured(there.to(DEVICE))
    check(row, there)


@every_dtype
@pytest.mark.parametrize(
    ("height", "width", "begin", "end"),
    [
        (40, 640, 128, 512),
        (3, 4608, 0, 3584),
        (17, 4608, 3584, 4096),
        (5, 256, 0, 128),
        (700, 144, 16, 144),
        (300, 128, 64, 128),
        (129, 48, 16, 32),
    ],
)
def test_columns_that_are_whole_runs(dtype: torch.dtype, height: int, width: int, begin: int, end: int) -> None:
    """Such as q, k and v, which are columns of what one matrix product gives."""
    finite = numbers(dtype, height, width)
    everything = finite if dtype is torch.bool else bits(dtype, height, width)
    for there in (finite[:, begin:end], everything[:, begin:end]):
        here = there.to(DEVICE)
        assert here.is_contiguous()
        columns = torch.empty(height, width, dtype=dtype, device=DEVICE)[:, begin:end]
        columns.copy_(here)
        lies = layout(columns)
        assert lies is not None
        assert lies.strided == kernels.ROWS.value
        (row,) = measured(columns)
        check(row, there)


@few_dtypes
def test_five_dimensions_are_copied(dtype: torch.dtype) -> None:
    there = numbers(dtype, 3, 4, 5, 6, 10).permute(4, 2, 0, 3, 1)
    here = numbers(dtype, 3, 4, 5, 6, 10).to(DEVICE).permute(4, 2, 0, 3, 1)
    assert layout(here) is None
    (row,) = measured(here)
    check(row, there)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([60000.0] * 16, torch.float16),
        ([2.0**-24, 2.0**-15], torch.float16),
        ([1e38] * 9, torch.float32),
        ([3.4e38, -3.4e38, 1.0], torch.float32),
        ([1e-30, 2e-30], torch.float32),
        ([1e-45, 3e-45], torch.float32),
        ([1e-30, 1e30], torch.float32),
        ([1e38, 1e-38], torch.bfloat16),
        ([1e300, -1e300, 1e299], torch.float64),
        ([1.7e308, 1.7e308], torch.float64),
        ([3e-200, 4e-200], torch.float64),
        ([5e-324, 1e-323], torch.float64),
        ([1e300, 1.0, math.nan], torch.float64),
        ([math.inf] * 10, torch.float32),
        ([-math.inf, math.inf, 1.0], torch.bfloat16),
        ([math.nan] * 9, torch.float16),
        ([-0.0, 0.0], torch.float32),
        ([-3.0, -4.0], torch.float32),
        ([2**63 - 1, -(2**63), 2**53 + 1], torch.int64),
        ([-(2**63)] * 3, torch.int64),
        ([2**64 - 1, 2**63, 2**53 + 1], torch.uint64),
        ([2**63 - 1, 1], torch.uint64),
        ([2**32 - 1, 0], torch.uint32),
        ([False, False], torch.bool),
        ([False, True], torch.bool),
    ],
)
def test_values_at_the_ends_of_a_dtype(values: list[Any], dtype: torch.dtype) -> None:
    there = torch.tensor(values, dtype=dtype)
    (row,) = measured(there.to(DEVICE))
    check(row, there)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e5m2], ids=str)
def test_non_finite_values_are_counted_wherever_they_are(dtype: torch.dtype) -> None:
    there = torch.ones(20_000)
    for position, value in {0: math.nan, BLOCK - 1: math.inf, BLOCK: -math.inf, 19_999: math.inf}.items():
        there[position] = value
    there = there.to(dtype)
    (row,) = measured(there.to(DEVICE))
    check(row, there)
    assert statistics(row, dtype).finite_norm == pytest.approx(math.sqrt(19_996), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1e-30, 1e30, 1.0, math.nan, -1e38], torch.float32),
        ([1e-200, -1e200, math.inf], torch.float64),
        ([5, 2**64 - 1, 2**63, 1], torch.uint64),
        ([5, -(2**63), 2**63 - 1], torch.int64),
    ],
)
def test_parts_of_very_different_values(values: list[Any], dtype: torch.dtype) -> None:
    there = torch.tensor([value for value in values for _ in range(BLOCK)], dtype=dtype)
    (row,) = measured(there.to(DEVICE))
    check(row, there)


def test_more_elements_than_an_int32_counts() -> None:
    (row,) = measured(torch.arange(8.0, device=DEVICE).expand(2**28 + 1, 8))
    found = statistics(row, torch.float32)
    assert (found.max, found.min, found.nan_count) == (7.0, 0.0, 0)
    assert found.mean == pytest.approx(3.5, rel=1e-6)
    assert found.norm == pytest.approx(math.sqrt((2**28 + 1) * 140), rel=1e-6)


@every_dtype
def test_the_same_values_give_the_same_bits(dtype: torch.dtype) -> None:
    here = numbers(dtype, 300, 1001).to(DEVICE)
    one = measured(here, here.t(), here[:, ::2])
    assert measured(here, here.t(), here[:, ::2]) == one
    assert measured(here.clone())[0] == one[0]


def test_rows_fill_several_chunks_and_may_be_fetched_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "CHUNK", 16)
    tensors = [numbers(torch.float32, count) for count in (5, BLOCK, 20 * BLOCK, 7, 3 * BLOCK, 1, 9, 10, 11, 12, 13)]
    rows = TritonRows(DEVICE)
    assert rows.fetch() == []
    for count, tensor in enumerate(tensors, 1):
        assert rows.add(tensor.to(DEVICE)) == count - 1
        found = rows.fetch()
        assert len(found) == count
        check(found[-1], tensor)
    assert rows.fetch() == measured(*(tensor.to(DEVICE) for tensor in tensors))


def test_the_rows_of_one_step_after_the_other() -> None:
    memory = row_memory.RowMemory()
    there = [numbers(torch.float32, count) for count in (5, 20 * BLOCK)]
    here = [tensor.to(DEVICE) for tensor in there]
    chunks = set()
    for _ in range(3):
        rows = TritonRows(DEVICE, memory)
        for tensor in here:
            rows.add(tensor)
        chunks.update(chunk.data_ptr() for chunk in rows._chunks)
        rows.seal(finished=True)
        for found, tensor in zip(rows.fetch(), there, strict=True):
            check(found, tensor)
    assert len(chunks) == 1
