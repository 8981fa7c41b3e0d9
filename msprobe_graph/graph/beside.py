"""Tensors that module calls get, that no node of their graph uses, and that the graph therefore doesn't take.

They are what the compiled frame has in its variables when it calls the graph. Dynamo tells where from:
``L['position_ids']``, ``L['kwargs']['masks'][0]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ._compat import Code, running_frame

if TYPE_CHECKING:
    from .plan import Value

NOT_TAKEN = "nothing in the compiled graph uses this tensor, so it neither takes nor computes it"

Step = tuple[str, str | int]
"""(".", name of an attribute) or ("[]", key or index)."""

_STEP = re.compile(r"\.(\w+)|\['([^']+)'\]|\[(\d+)\]")


class Beside(msgspec.Struct, frozen=True):
    """Those of one graph."""

    code: Code
    """Of the frame that calls the graph."""
    ways: dict[int, list[Step]]
    """How each is reached from the frame's variables, by its value id."""

    def now(self, values: Mapping[int, Value]) -> list[torch.Tensor | None]:
        """Those that the frame has now; None for one that it hasn't, or that isn't like its value in `values`. To be
        asked while the frame calls the graph, on its thread."""
        frame = running_frame(self.code)
        variables = {} if frame is None else frame.f_locals
        found = ((values[id], follow(way, variables)) for id, way in self.ways.items())
        return [tensor if value.fits(tensor) else None for value, tensor in found]


def steps_of(expression: str) -> list[Step] | None:
    """The steps from a frame's variables to what an expression of dynamo's names; None where there is more to it.

    >>> steps_of("L['kwargs']['masks'][0]"), steps_of("L['self'].mask"), steps_of("L['x'].size()[0]")
    ([('[]', 'kwargs'), ('[]', 'masks'), ('[]', 0)], [('[]', 'self'), ('.', 'mask')], None)
    """
    if not expression.startswith("L["):
        return None
    steps: list[Step] = []
    at = 1
    while at < len(expression):
        step = _STEP.match(expression, at)
        if step is None:
            return None
        attribute, key, index = step.groups()
        steps.append((".", attribute) if attribute else ("[]", key or int(index)))
        at = step.end()
    return steps


def follow(steps: Sequence[Step], variables: Mapping[str, Any]) -> Any:
    """What the steps lead to; None where one of them leads nowhere."""
    found: Any = variables
    for kind, name in steps:
        try:
            found = getattr(found, str(name)) if kind == "." else found[name]
        except (AttributeError, LookupError, TypeError):
            return None
    return found
