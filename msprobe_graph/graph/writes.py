"""Tensors that a program changes in place: which node of dynamo's graph has the value that one has at a given moment.

``x = a * 2; x.add_(1); y = x - 3`` subtracts from the node of `mul`, whose value is no longer what `mul` gave but what
`add_` did. After a write into a part (``x[0] = 1``) no node has the value.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ._compat import example_value, memory
from .arguments import asked
from .stamps import written_arguments


class Writes:
    """Those of one graph. Positions are indices into `nodes`, which hold no inputs of the graph."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._positions = {node: position for position, node in enumerate(nodes)}
        self._writers: dict[int, list[tuple[int, fx.Node]]] = defaultdict(list)
        for position, node in enumerate(nodes):
            for written in _written(node):
                for storage in _storages(written):
                    self._writers[storage].append((position, node))

    def value_at(self, node: fx.Node, position: int) -> fx.Node | None:
        """The node that gave the value which the tensor of `node` has right before `position`; None if none did."""
        made = self._positions.get(node, -1)
        writers = [
            writer
            for storage in _storages(node)
            for at, writer in self._writers.get(storage, ())
            if made < at < position
        ]
        if not writers:
            return node
        return writers[-1] if _alike(writers[-1], node) else None


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What `node` writes."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    args, kwargs = node.args, node.kwargs
    if node.op == "call_function":
        _, args, kwargs = asked(target, args, kwargs)
    first = args[0] if args else next(iter(kwargs.values()), None)
    in_place = name.endswith("_") and not name.endswith("__")
    if target in (operator.setitem, *_AUGMENTED) or in_place or kwargs.get("inplace") is True:
        yield from _nodes(first)
    yield from _nodes(kwargs.get("out"))
    if name in ("batch_norm", "instance_norm"):
        yield from _nodes([*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")])
    if node.op == "call_function":
        yield from (argument for _, argument in written_arguments(node))


_AUGMENTED = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)


def _nodes(nest: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(nest, found.append)
    yield from found


def _storages(node: fx.Node) -> Iterator[int]:
    value = example_value(node)
    for tensor in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(tensor, torch.Tensor) and (found := memory(tensor)) is not None:
            yield found


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether both are the same elements of the same memory."""
    left, right = example_value(one), example_value(other)
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return left is right or (
        left.dtype == right.dtype
        and _plain((*left.shape, *left.stride(), left.storage_offset()))
        == _plain((*right.shape, *right.stride(), right.storage_offset()))
        and next(_storages(one)) == next(_storages(other))
    )


def _plain(sizes: Sequence[Any]) -> list[str]:
    """Compared as text, symbolic sizes add no guards."""
    return [str(size) for size in sizes]
