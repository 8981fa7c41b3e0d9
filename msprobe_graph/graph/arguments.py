"""The arguments of a call in dynamo's graph as eager capture gets them.

A Python function of torch's asks function modes with arguments of its own making: ``F.silu(x)`` arrives as ``silu(x,
inplace=False)``. Dynamo's graph holds the call as the program made it. So the function is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx


class Asked(NamedTuple):
    """What a function mode is asked."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stand:
    """Stands for a node's value in a call of a function that asks function modes."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Asked:
        return Asked(function, _nodes(args), _nodes(kwargs or {}))


def asked(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Asked:
    """What a function mode is asked when `function` is called with these arguments, in which nodes stand for tensors.

    For a function in C, or one that asks no modes, that is the call itself.
    """
    given = Asked(function, args, kwargs)
    if not inspect.isfunction(function) or not function.__module__.startswith("torch."):
        return given
    stands: tuple[Any, Any] = fx.node.map_arg((args, kwargs), _Stand)  # type: ignore[arg-type]
    try:
        found = function(*stands[0], **stands[1])
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it looked into its arguments
        return given
    return found if isinstance(found, Asked) else given


def _nodes(nest: Any) -> Any:
    if isinstance(nest, _Stand):
        return nest.node
    if isinstance(nest, dict):
        return {key: _nodes(item) for key, item in nest.items()}
    if type(nest) in (list, tuple):
        return type(nest)(_nodes(item) for item in nest)
    return nest


def written_arguments(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The tensors that a custom operator's schema says it writes, by the argument's name, in the schema's order. Those
    in lists have no name of their own: see `written_values`."""
    yield from ((name, value) for name, value in written_values(node) if isinstance(value, fx.Node))


def written_values(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """The same with what is given for each such argument, whatever it is."""
    overload: Any = node.target
    if isinstance(overload, torch._ops.OpOverloadPacket):
        names = overload.overloads()  # type: ignore[no-untyped-call]
        overload = getattr(overload, names[0]) if len(names) == 1 else None
    if not isinstance(overload, torch._ops.OpOverload):
        return
    for place, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield argument.name, node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
