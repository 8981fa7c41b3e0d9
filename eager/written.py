"""What a custom operator writes into its arguments, read off its schema.

``torch.ops._C.rms_norm(out, input, weight, eps)`` returns nothing: what it computes lies in `out`, which the schema
marks ``Tensor(a!)``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The tensors among the arguments that `func` wrote to, in the order of its schema; () for what is no operator."""
    if not isinstance(func, (OpOverload, OpOverloadPacket)):
        return ()
    found = []
    for position, name in _mutable(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, torch.Tensor))
    return tuple(found)


@cache
def _mutable(func: OpOverload | OpOverloadPacket) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that the operator writes to."""
    overload: Any = func
    if isinstance(func, OpOverloadPacket):
        names = func.overloads()  # type: ignore[no-untyped-call]
        overload = getattr(func, "default" if "default" in names else names[0])
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
