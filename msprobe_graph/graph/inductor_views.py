"""What Inductor has lowered an FX node to: a buffer, or a strided view of one. Private Inductor; torch 2.13."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

from torch._inductor import dependencies, ir
from torch._inductor.utils import sympy_dot
from torch._inductor.virtualized import V


class Hole(NamedTuple):
    """Why a value can't be tapped; a key of exact.REASONS."""

    reason: str


def strided(box: ir.TensorBox) -> ir.IRNode | Hole:
    """What was lowered for an FX node as a buffer or a strided view of one. Nothing is computed or copied for it."""
    base: Any = box
    while isinstance(base, (ir.MutableBox, ir.BaseView)):
        base = base.data
    if not isinstance(base, ir.Buffer):
        return Hole("fused" if isinstance(base, ir.Loops) else "constant")
    if isinstance(base.layout, (ir.NoneLayout, ir.MultiOutputLayout)):
        return Hole("not_strided")
    view: Any = box
    while isinstance(view, ir.MutableBox):
        view = view.data
    if isinstance(view, ir.Buffer):
        layout = view.layout
        if isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
            return Hole("overwritten")
        return view
    if isinstance(view, ir.ReinterpretView):
        return view
    if not _is_indexed(view) or isinstance(base.layout, ir.MutationLayoutSHOULDREMOVE):
        return Hole("not_strided")
    return _reinterpreted(view)


def _is_indexed(view: Any) -> TypeGuard[ir.BaseView]:
    """Whether Inductor knows where the elements of a view lie: of one in another dtype it doesn't say."""
    if isinstance(view, ir.MutableBox):
        return _is_indexed(view.data)
    if isinstance(view, (ir.Buffer, ir.ReinterpretView)):
        return True
    return type(view).make_reindexer is not ir.BaseView.make_reindexer and _is_indexed(view.data)


def _reinterpreted(view: ir.BaseView) -> ir.ReinterpretView | Hole:
    """ir.ExternKernel.convert_to_reinterpret_view, without its say in the layout of the buffer: that is settled."""
    index_args, ranges = dependencies.index_vars_squeeze(view.get_size(), prefix="r")
    variables = index_args[0]
    index = V.graph.sizevars.simplify_with_ranges(view.make_indexer()(variables), ranges)
    strides = V.graph.sizevars.stride_vars(index, variables)
    offset = V.graph.sizevars.offset_var(index, variables)
    if index != sympy_dot(variables, strides) + offset:
        return Hole("not_strided")
    return ir.ReinterpretView(
        data=_storage_box(view),
        layout=ir.FixedLayout(
            device=view.get_device_or_error(),
            dtype=view.get_dtype(),
            size=view.get_size(),
            stride=strides,
            offset=offset,
        ),
    )


def _storage_box(view: ir.BaseView) -> ir.IRNode:
    data: Any = view.data
    while isinstance(data, (ir.BaseView, ir.TensorBox)):
        data = data.data
    assert isinstance(data, ir.IRNode)
    return data
