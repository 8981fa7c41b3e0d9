"""What is told of two tensors in one memory, against the addresses of their elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from msprobe_graph.graph.elements import alike, disjoint, in_row_major, part_of, same_elements

MEMORY = torch.arange(48)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    stride = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=len(shape), max_size=len(shape)))
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    offset = draw(st.integers(0, max(0, 47 - last)))
    return MEMORY.as_strided(shape, stride, offset) if last + offset < 48 else MEMORY[offset:]


def addresses(tensor: Tensor) -> list[int]:
    return tensor.flatten().tolist()  # of an element its value is its address


@given(tensors(), tensors())
def test_tensors_called_disjoint_share_no_element(one: Tensor, other: Tensor) -> None:
    if disjoint(one, other):
        assert not set(addresses(one)) & set(addresses(other))


@given(tensors(), tensors())
def test_the_same_elements_are_the_same_addresses_each_once(one: Tensor, other: Tensor) -> None:
    if same_elements(one, other):
        assert sorted(addresses(one)) == sorted(addresses(other)) == sorted(set(addresses(one)))
        if in_row_major(one) and in_row_major(other):
            assert addresses(one) == addresses(other)


@given(tensors(), tensors())
def test_a_part_is_what_narrow_gives(one: Tensor, other: Tensor) -> None:
    place = part_of(one, other)
    if place is not None and place[1] + place[2] <= other.shape[place[0]]:
        assert torch.equal(other.narrow(*place), one)


@given(tensors(), st.data())
def test_what_narrow_gives_is_a_part(tensor: Tensor, data: st.DataObject) -> None:
    if tensor.ndim and max(tensor.shape) > 1:
        dim = data.draw(st.sampled_from([dim for dim, size in enumerate(tensor.shape) if size > 1]))
        start = data.draw(st.integers(0, tensor.shape[dim] - 1))
        length = data.draw(st.integers(1, min(tensor.shape[dim] - start, tensor.shape[dim] - 1)))
        part = tensor.narrow(dim, start, length)
        place = part_of(part, tensor)
        assert place is not None
        assert torch.equal(tensor.narrow(*place), part)


@given(tensors())
def test_row_major_is_what_torch_calls_contiguous(tensor: Tensor) -> None:
    assert in_row_major(tensor) == tensor.is_contiguous()


def test_columns_of_the_same_rows_are_disjoint() -> None:
    query, key, value = torch.zeros(5, 24).split([12, 6, 6], dim=1)
    assert disjoint(query, key)
    assert disjoint(query.view(5, 3, 4), value)
    assert not disjoint(query, query[:, 3:5])


def test_memory_of_another_is_not_the_same() -> None:
    one, other = torch.zeros(4), torch.zeros(4)
    assert alike(one, one.view(4))
    assert not alike(one, one.view(2, 2))
    assert same_elements(one, one.view(2, 2))
    assert not same_elements(one, other)
    assert not same_elements(one, one.view(torch.int32))


@pytest.mark.parametrize("inner", [(4, 32), (2, 2, 32), (128,)])
def test_symbolic_sizes_are_compared_without_a_guard(inner: tuple[int, ...]) -> None:
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        rows = shapes.create_unbacked_symint()
        torch._check(rows >= 2)
        tensor = torch.empty(rows, 128)
        view = tensor.view(rows, *inner)
        before = len(shapes.guards)
        assert same_elements(tensor, view)
        assert in_row_major(view)
        assert alike(tensor, view) == (inner == (128,))
        assert len(shapes.guards) == before


def test_a_part_of_a_batch_of_any_size() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    whole = mode.from_tensor(torch.zeros(5, 24))
    query, key, _ = whole.split([12, 6, 6], dim=1)
    assert part_of(key, whole) == (1, 12, 6)
    assert part_of(query, whole) == (1, 0, 12)
    assert part_of(whole, whole) is None
    assert part_of(key.view(-1, 2, 3), whole) is None
