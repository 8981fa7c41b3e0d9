"""Whether two fake tensors are the same elements of the same memory. Asked of symbolic sizes, it adds no guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from ._compat import memory


def alike(one: object, other: object) -> bool:
    """The same elements in the same shape."""
    return _same_memory(one, other) and _layout(one) == _layout(other)


def same_elements(one: object, other: object) -> bool:
    """The same elements, all of a block of memory, in whatever shape."""
    if not _same_memory(one, other):
        return False
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    ones, others = _numbers(one.shape), _numbers(other.shape)
    return bool(
        math.prod(ones) == math.prod(others)
        and _number(one.storage_offset()) == _number(other.storage_offset())
        and _is_dense(ones, _numbers(one.stride()))
        and _is_dense(others, _numbers(other.stride()))
    )


def part_of(one: object, other: object) -> tuple[int, int, int] | None:
    """How `one` is ``other.narrow(dim, start, length)``, as these three; None if it is not, or nobody knows."""
    if not _same_memory(one, other):
        return None
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    strides, sizes, others = _numbers(one.stride()), _numbers(one.shape), _numbers(other.shape)
    if strides != _numbers(other.stride()) or len(sizes) != len(others):
        return None
    differ = [dim for dim, (size, whole) in enumerate(zip(sizes, others, strict=True)) if size != whole]
    if len(differ) != 1:
        return None
    (dim,) = differ
    moved = _number(one.storage_offset()) - _number(other.storage_offset())
    if not all(number.is_Integer for number in (moved, strides[dim], sizes[dim])):
        return None
    start, rest = divmod(int(moved), int(strides[dim]) or 1)
    fits = not others[dim].is_Integer or start + sizes[dim] <= others[dim]
    return (dim, start, int(sizes[dim])) if fits and not rest and start >= 0 else None


def disjoint(one: object, other: object) -> bool:
    """Whether two tensors, both of them columns of the same rows of memory, have no element in common."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or not (one.ndim and other.ndim):
        return False
    rows = one.stride(0)
    if type(rows) is not int or rows <= 0 or type(other.stride(0)) is not int or other.stride(0) != rows:
        return False
    columns = [_columns(tensor) for tensor in (one, other)]
    if None in columns:
        return False
    (first, last), (begin, end) = columns  # type: ignore[misc]
    return last < begin or end < first


def _columns(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The first and the last place in its rows, which begin with dimension 0, that a tensor takes; None if unknown."""
    offset, inner = tensor.storage_offset(), list(zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    if any(type(number) is not int for number in (offset, *(number for pair in inner for number in pair))):
        return None
    first = offset % tensor.stride(0)
    last = first + sum((size - 1) * stride for size, stride in inner)
    return (int(first), int(last)) if last < tensor.stride(0) else None


def in_row_major(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements lie densely in the order of its indices."""
    return _is_dense(_numbers(tensor.shape), _numbers(tensor.stride()), ordered=True)


def _same_memory(one: object, other: object) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one is other or (one.dtype == other.dtype and memory(one) is not None and memory(one) == memory(other))


def _layout(tensor: Any) -> tuple[Any, ...]:
    return (_numbers(tensor.shape), _numbers(tensor.stride()), _number(tensor.storage_offset()))


def _is_dense(shape: Sequence[Any], strides: Sequence[Any], ordered: bool = False) -> bool:
    """Whether each element has its own place, with none between them. If `ordered`, and where sizes are symbolic: in
    row-major order."""
    dims = [(stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1]
    ordered = ordered or not all(number.is_number for pair in dims for number in pair)
    room: Any = sympy.Integer(1)
    for stride, size in reversed(dims) if ordered else sorted(dims):
        if stride != room:
            return False
        room *= size
    return True


def _numbers(sizes: Sequence[Any]) -> list[Any]:
    return [_number(size) for size in sizes]


def _number(size: Any) -> Any:
    """An int, or the formula that a symbolic one stands for."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr
