"""Checksums against zlib and numpy over the same bytes."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msprobe_graph.taps import Unmeasurable, crc32, native, xor_checksum

DTYPES = [*native.DTYPES, torch.complex64]


@st.composite
def tensors_and_bytes(draw: st.DrawFn) -> tuple[torch.Tensor, bytes]:
    """A tensor in some layout, and its elements' bytes in order, taken by numpy."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 40))
    raw = draw(st.binary(min_size=rows * columns * dtype.itemsize, max_size=rows * columns * dtype.itemsize))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    elements = np.frombuffer(raw, np.dtype(("V", dtype.itemsize))).reshape(rows, columns)
    tensor = torch.frombuffer(bytearray(raw) or bytearray(16), dtype=dtype)[: rows * columns].reshape(rows, columns)
    if draw(st.booleans()):
        tensor, elements = tensor.t(), elements.T
    if draw(st.booleans()):
        tensor, elements = tensor[1:, ::2], elements[1:, ::2]
    return tensor, elements.tobytes()


def folded(raw: bytes) -> int:
    words = np.frombuffer(raw + bytes(-len(raw) % 8), np.int64)
    return int(np.bitwise_xor.reduce(words)) if len(words) else 0


@settings(max_examples=100, deadline=None)
@given(tensors_and_bytes())
def test_crc32_is_zlibs_of_the_contiguous_bytes(case: tuple[torch.Tensor, bytes]) -> None:
    tensor, raw = case
    assert crc32(tensor) == f"{zlib.crc32(raw):08x}"


@pytest.mark.parametrize("library", [native.library(), None], ids=["native", "portable"])
@settings(max_examples=100, deadline=None)
@given(case=tensors_and_bytes())
def test_xor_folds_the_contiguous_bytes(library: native.Library | None, case: tuple[torch.Tensor, bytes]) -> None:
    tensor, raw = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library)
        assert xor_checksum(tensor) == folded(raw)


@pytest.mark.parametrize("library", [native.library(), None], ids=["native", "portable"])
def test_xor_of_a_single_element_of_any_stride(library: native.Library | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: library)
    assert xor_checksum(torch.tensor(7).expand(1)) == 7


def test_xor_of_a_number_is_the_number() -> None:
    assert xor_checksum(torch.tensor(2.5)) == 2.5
    assert xor_checksum(torch.tensor(7)) == 7


def test_views_that_hide_a_sign_are_resolved() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert crc32(numbers.conj()) == crc32(torch.tensor([1 - 2j, 3 + 4j]))
    assert crc32(numbers.conj().imag) == crc32(torch.tensor([-2.0, 4.0]))


@pytest.mark.parametrize("checksum", [crc32, xor_checksum])
def test_no_values_no_checksum(checksum) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Unmeasurable, match="meta"):
        checksum(torch.empty(3, device="meta"))
