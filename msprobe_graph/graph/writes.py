"""Tensors that a program changes in place: which node of dynamo's graph has the value that one has at a given moment.

``x = a * 2; x.add_(1); y = x - 3`` subtracts from the node of `mul`, whose value is no longer what `mul` gave but what
`add_` did. After a write into a part (``x[0] = 1``) no node has the value.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from ._compat import example_value, memory
from .arguments import asked, written_arguments, written_values
from .elements import alike, disjoint, in_row_major, same_elements


class Written(NamedTuple):
    """The value that an operator has written into one of its arguments."""

    writer: fx.Node
    nth: int
    """Which of the arguments that it writes, counted from 1."""
    reshaped: bool
    """Whether the tensor that was asked for has another shape than the argument."""


class Writes:
    """Those of one graph. Positions are indices into `nodes`, which hold no inputs of the graph."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._positions = {node: position for position, node in enumerate(nodes)}
        self._writers: dict[int, list[tuple[int, fx.Node, Any]]] = defaultdict(list)
        """By memory: where it is written, by what, and through which tensor."""
        for position, node in enumerate(nodes):
            for written in _written(node):
                for storage in _storages(written):
                    self._writers[storage].append((position, node, example_value(written)))

    def behind(self, node: fx.Node) -> Iterator[fx.Node]:
        """What writes into the memory of the tensor of `node` after it was made."""
        made = self._positions.get(node, -1)
        for storage in _storages(node):
            yield from (writer for at, writer, _ in self._writers.get(storage, ()) if at > made)

    def stands(self, node: fx.Node, since: fx.Node) -> bool:
        """Whether nothing writes into the memory of the tensor of `node` behind the node `since`. False where it can't
        be told, as of operators of higher order."""
        begin = self._positions[since]
        memory = set(_storages(node))
        later = (each for each, position in self._positions.items() if position > begin)
        written = any(at > begin for storage in memory for at, _, _ in self._writers.get(storage, ()))
        return bool(memory) and not written and not any(isinstance(each.target, HigherOrderOperator) for each in later)

    def value_at(self, node: fx.Node, position: int) -> fx.Node | Written | None:
        """What gave the value which the tensor of `node` has right before `position`: a node, or the write of an
        operator that does not return it; None if nothing that can be told."""
        made, value = self._positions.get(node, -1), example_value(node)
        writers = [
            writer
            for storage in _storages(node)
            for at, writer, written in self._writers.get(storage, ())
            if made < at < position and not disjoint(written, value)
        ]
        if not writers:
            return node
        last = writers[-1]
        if alike(example_value(last), value):
            return last
        for nth, (_, argument) in enumerate(written_arguments(last), 1):
            written = example_value(argument)
            if alike(written, value):
                return Written(last, nth, False)
            if same_elements(written, value) and in_row_major(written) and in_row_major(value):
                return Written(last, nth, True)
        return None


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
        yield from _nodes([value for _, value in written_values(node)])


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
