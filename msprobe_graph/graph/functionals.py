"""Functions of torch.nn.functional that dynamo looks into: its graph holds what they call, eager capture them.

``F.rms_norm`` is ``torch.rms_norm`` in the graph, ``F.normalize`` four operators. The stack of a node tells in which
function of torch.nn.functional it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx

from msprobe_graph.dump.records import StackFrame

from .api_calls import stack
from .arguments import Asked, asked

ARGUMENTS_UNTOLD = "dynamo's graph holds what {} calls, not its arguments: they are not in its entries"


class Functional(NamedTuple):
    """A call of a function of torch.nn.functional."""

    function: Callable[..., Any]
    nodes: list[fx.Node]
    """What the graph holds of it, in order; the last one gives its result."""

    def call(self) -> Asked:
        """What was called, with which arguments; without any if that can't be told."""
        if len(self.nodes) == 1:
            told = asked(self.function, self.nodes[0].args, self.nodes[0].kwargs)
            if told.function is self.function:
                return told
        return Asked(self.function, (), {})

    @property
    def told(self) -> bool:
        return bool(self.call().args)


def functionals(nodes: Sequence[fx.Node], name: Callable[[Any], str | None]) -> dict[fx.Node, Functional]:
    """By node: the call that it belongs to, for functions that `name` knows and that are no nodes themselves."""
    found: dict[fx.Node, Functional] = {}
    running: tuple[Functional, tuple[StackFrame, ...], int] | None = None
    for node in nodes:
        frames = stack(node)
        depth = next((at for at, frame in enumerate(frames) if frame.path != F.__file__), len(frames))
        function = getattr(F, frames[depth - 1].function, None) if depth else None
        if function is None or name(function) is None or name(node.target) == name(function):
            running = None
            continue
        line, caller = frames[depth - 1].line, frames[depth:]
        if running is None or running[0].function is not function or running[1] != caller or line <= running[2]:
            running = (Functional(function, []), caller, line)
        running[0].nodes.append(node)
        running = (running[0], caller, line)
        found[node] = running[0]
    return found
