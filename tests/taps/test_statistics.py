"""A tensor's statistics, by C code and by torch operations, against values decoded and summed without torch."""

import contextlib
import math
import struct
import unittest.mock
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msprobe_graph.taps import Rows, Statistics, native, portable
from msprobe_graph.taps.statistics import ROW, read_row

needs_native = pytest.mark.skipif(native.library() is None, reason="the C code is not compiled")
both_ways = pytest.mark.parametrize("way", [pytest.param("native", marks=needs_native), "portable"])

NUMPY = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint64: np.uint64,
    torch.uint32: np.uint32,
    torch.uint16: np.uint16,
    torch.uint8: np.uint8,
    torch.bool: np.uint8,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}
# Exponent bits, mantissa bits, exponent bias, and whether 0x80 is the only NaN (the "fnuz" kind).
FLOAT8 = {
    torch.float8_e4m3fn: (4, 3, 7, False),
    torch.float8_e4m3fnuz: (4, 3, 8, True),
    torch.float8_e5m2: (5, 2, 15, False),
    torch.float8_e5m2fnuz: (5, 2, 16, True),
}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8, torch.float8_e8m0fnu]
INTEGERS = [dtype for dtype in NUMPY if not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)]
COMPLEX = [torch.complex64, torch.complex128]


def statistics_of(tensor: torch.Tensor, way: str) -> Statistics:
    without = unittest.mock.patch.object(native, "library", return_value=None)
    with contextlib.nullcontext() if way == "native" else without:
        rows = Rows()
    number = rows.add(tensor)
    return rows.fetch()[number]


def float8_value(byte: int, exponent_bits: int, mantissa_bits: int, bias: int, one_nan: bool) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if one_nan:
        if byte == 0x80:
            return math.nan
    elif exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    elif exponent_bits == 4 and byte & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa * 2.0**-mantissa_bits) * 2.0 ** (exponent - bias)


def values_of(tensor: torch.Tensor) -> list[float] | list[int]:
    """The elements as Python numbers; torch only lays out the bytes. Of complex ones the absolute values."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    raw = bytes(flat.view(torch.uint8).tolist())
    if tensor.dtype is torch.bfloat16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).tolist()
    if tensor.dtype is torch.float8_e8m0fnu:
        return [math.nan if byte == 255 else 2.0 ** (byte - 127) for byte in raw]
    if tensor.dtype in FLOAT8:
        return [float8_value(byte, *FLOAT8[tensor.dtype]) for byte in raw]
    numbers = np.frombuffer(raw, NUMPY[tensor.dtype])
    if tensor.dtype.is_complex:
        with np.errstate(all="ignore"):
            return np.abs(numbers.astype(np.complex128)).tolist()
    return numbers.tolist()


def moments(values: list[float] | list[int]) -> tuple[float, float]:
    """Mean and norm, correctly rounded or nearly so."""
    if isinstance(values[0], int):
        return sum(values) / len(values), math.sqrt(sum(value**2 for value in values))
    shrunk = math.fsum(value / 2**64 for value in values) / len(values)
    try:
        mean = math.fsum(values) / len(values)
    except OverflowError:
        mean = shrunk * 2**64
    return mean, math.hypot(*values)


def close(found: float, expected: float, size: float) -> bool:
    return found == expected or math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-12 * size)


def check(found: Statistics, tensor: torch.Tensor) -> None:
    values = values_of(tensor)
    finite = [value for value in values if math.isfinite(value)]
    assert found.nan_count == sum(math.isnan(value) for value in values)
    assert found.posinf_count == values.count(math.inf)
    assert found.neginf_count == values.count(-math.inf)
    if not values:
        assert found == Statistics(None, None, None, None)
        return
    if len(finite) == len(values):
        measured = (found.max, found.min, found.mean, found.norm)
        assert found.finite_max is found.finite_min is found.finite_mean is found.finite_norm is None
    else:
        measured = (found.finite_max, found.finite_min, found.finite_mean, found.finite_norm)
    if not finite:
        assert measured == (None, None, None, None)
        return
    high, low, mean, norm = measured
    assert high is not None
    assert low is not None
    assert mean is not None
    assert norm is not None
    expected_mean, expected_norm = moments(finite)
    size = max(abs(max(finite)), abs(min(finite)))
    assert type(high) is type(low) is (bool if tensor.dtype is torch.bool else type(finite[0]))
    if tensor.dtype.is_complex:  # hypot may differ in its last bit
        assert close(high, max(finite), 0)
        assert close(low, min(finite), 0)
    else:
        assert (high, low) == (max(finite), min(finite))
    assert close(mean, expected_mean, size)
    assert close(norm, expected_norm, 0)


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype]) -> torch.Tensor:
    """Any bits (so NaN, infinities and subnormals too) or small numbers, in any layout."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 7), max_size=4),
            st.sampled_from([[5000], [3, 2049], [70, 71], [2, 1, 1500, 2]]),
        )
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = math.prod(shape)
    if dtype is torch.bool:
        flat = torch.from_numpy(random.integers(0, 2, count).astype(bool))
    elif draw(st.booleans()):
        flat = torch.frombuffer(bytearray(random.bytes(count * dtype.itemsize)) or bytearray(16), dtype=dtype)[:count]
    else:
        flat = torch.from_numpy(random.integers(0, 100, count)).to(dtype)
    tensor = flat.reshape(shape)
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.sampled_from(["permute", "every other", "narrow", "expand", "select", "overlap"])):
            case "permute":
                tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
            case "every other" if tensor.dim():
                tensor = tensor[..., :: draw(st.integers(2, 3))]
            case "narrow" if tensor.dim() and tensor.shape[0]:
                tensor = tensor[draw(st.integers(0, tensor.shape[0] - 1)) :]
            case "expand":
                tensor = tensor.unsqueeze(0).expand(draw(st.integers(0, 3)), *tensor.shape)
            case "select" if tensor.dim() and tensor.shape[-1]:
                tensor = tensor[..., -1]
            case "overlap" if tensor.dim() and tensor.shape[0] > 1:
                tensor = tensor.unfold(0, 2, 1)
    return tensor


@both_ways
@settings(max_examples=150)
@given(tensor=tensors(FLOATS))
def test_floats(way: str, tensor: torch.Tensor) -> None:
    check(statistics_of(tensor, way), tensor)


@both_ways
@settings(max_examples=100)
@given(tensor=tensors([*INTEGERS, torch.bool]))
@example(tensor=torch.tensor([2**63 - 1, -(2**63), 2**53 + 1]))
@example(tensor=torch.tensor([2**64 - 1, 2**63, 2**53 + 1], dtype=torch.uint64))
def test_integers_have_exact_extremes(way: str, tensor: torch.Tensor) -> None:
    check(statistics_of(tensor, way), tensor)


@both_ways
@settings(max_examples=40)
@given(tensor=tensors(COMPLEX))
def test_complex_tensors_are_measured_by_their_absolute_values(way: str, tensor: torch.Tensor) -> None:
    check(statistics_of(tensor, way), tensor)


@needs_native
@settings(max_examples=100)
@given(tensor=tensors([*FLOATS, *INTEGERS, torch.bool]))
def test_both_ways_give_the_same(tensor: torch.Tensor) -> None:
    native_way, portable_way = (statistics_of(tensor, way) for way in ("native", "portable"))
    size = max((abs(value) for value in values_of(tensor) if math.isfinite(value)), default=0)
    for field in Statistics.__struct_fields__:
        first, second = getattr(native_way, field), getattr(portable_way, field)
        if isinstance(first, float) and isinstance(second, float) and not (math.isnan(first) and math.isnan(second)):
            assert close(first, second, size if "mean" in field else 0), field
        else:
            assert type(first) is type(second), field
            assert first == second or math.isnan(first), field


@both_ways
@settings(max_examples=100)
@given(values=st.lists(st.sampled_from([1.0, -2.0, 0.5, math.nan, math.inf, -math.inf]), min_size=1, max_size=40))
@example(values=[1.0, math.inf, -math.inf])
@example(values=[math.nan, math.inf])
@example(values=[-math.inf, -math.inf])
def test_nan_and_infinities_propagate_as_in_torch(way: str, values: list[float]) -> None:
    tensor = torch.tensor(values)
    found = statistics_of(tensor, way)
    torchs = [tensor.max(), tensor.min(), tensor.mean(), torch.linalg.vector_norm(tensor)]
    for ours, theirs in zip((found.max, found.min, found.mean, found.norm), torchs, strict=True):
        assert ours == pytest.approx(theirs.item(), rel=1e-5, nan_ok=True)


@both_ways
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([60000.0] * 16, torch.float16),
        ([1e38] * 9, torch.float32),
        ([1e-45, 3e-45], torch.float32),
        ([2.0**-24, 2.0**-15], torch.float16),
        ([1e300, -1e300, 1e299], torch.float64),
        ([1.7e308, 1.7e308], torch.float64),
        ([3e-200, 4e-200], torch.float64),
        ([5e-324, 1e-323], torch.float64),
        ([1e300, 1.0, math.nan], torch.float64),
        ([-0.0, 0.0], torch.float32),
    ],
)
def test_values_at_the_ends_of_a_dtype(way: str, values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    check(statistics_of(tensor, way), tensor)


@both_ways
def test_complex_values_whose_absolute_value_their_dtype_cannot_hold(way: str) -> None:
    assert statistics_of(torch.tensor([3e38 + 3e38j]), way).max == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


@both_ways
def test_half_precision_norm_is_not_infinite(way: str) -> None:
    assert statistics_of(torch.full((4, 4), 60000.0, dtype=torch.float16), way).norm == 240000.0


@both_ways
def test_a_long_sum_keeps_its_small_values(way: str) -> None:
    tensor = torch.full((300_000,), 0.1)
    tensor[0] = 1e8
    found = statistics_of(tensor, way)
    tenth = struct.unpack("f", struct.pack("f", 0.1))[0]
    assert found.mean == pytest.approx((1e8 + 299_999 * tenth) / 300_000, rel=1e-13)
    assert found.norm == pytest.approx(math.sqrt(1e16 + 299_999 * tenth**2), rel=1e-13)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_non_finite_values_are_counted_wherever_they_are(way: str, dtype: torch.dtype) -> None:
    tensor = torch.ones(20_000).to(dtype)
    for position, value in {0: math.nan, 4095: math.inf, 4096: -math.inf, 19_998: math.inf}.items():
        tensor[position : position + 1] = torch.tensor([value]).to(dtype)
    found = statistics_of(tensor, way)
    assert (found.nan_count, found.posinf_count, found.neginf_count) == (1, 2, 1)
    assert (found.finite_max, found.finite_min, found.finite_mean) == (1.0, 1.0, 1.0)
    assert found.finite_norm == pytest.approx(math.sqrt(19_996), rel=1e-14)


@both_ways
def test_an_expanded_tensor_counts_every_repetition(way: str) -> None:
    found = statistics_of(torch.tensor([3.0, math.nan]).expand(1000, 2000, 2)[:, :3], way)
    assert (found.nan_count, found.finite_mean) == (3000, 3.0)
    assert found.finite_norm == pytest.approx(3.0 * math.sqrt(3000))


@both_ways
@pytest.mark.parametrize(
    "layout",
    [
        lambda numbers: numbers[:, 7:],  # long runs
        lambda numbers: numbers[:, :33],  # short runs, which fill a buffer to its last element
        lambda numbers: numbers[::3, ::2],
        lambda numbers: numbers.t()[1:, ::2],
        lambda numbers: numbers.reshape(40, 100, 30).permute(2, 0, 1)[:, 1:, :50],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_large_tensors_that_are_not_dense(
    way: str, dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensor = layout((torch.arange(120_000) % 251).to(dtype).reshape(100, 1200))
    check(statistics_of(tensor, way), tensor)


@needs_native
def test_repetitions_without_number_cost_nothing() -> None:
    found = statistics_of(torch.ones(1).expand(2**20, 2**20), "native")
    assert (found.mean, found.norm) == (1.0, 2.0**20)


@both_ways
def test_a_view_with_the_negative_bit(way: str) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 7j])
    assert statistics_of(numbers.conj().imag, way).max == 7.0
    assert statistics_of(numbers[:1].conj().imag, way).max == -2.0


def test_single_precision_rows_are_widened() -> None:
    for tensor in (torch.tensor([3.0, 4.0, math.inf, 1e38]), torch.tensor([2**62 + 1, -5]), torch.empty(0)):
        rows = portable.widen(portable.measure(tensor, torch.float32).unsqueeze(0))
        found = read_row(ROW.unpack(struct.pack("=8q", *rows[0].tolist())), tensor.dtype)
        expected = statistics_of(tensor, "portable")
        for field in Statistics.__struct_fields__:
            ours, exact = getattr(found, field), getattr(expected, field)
            assert ours is exact is None or ours == pytest.approx(exact, rel=1e-6), field
        if not tensor.dtype.is_floating_point:
            assert (found.max, found.min) == (expected.max, expected.min)
