"""Which module calls a graph consists of, with their arguments and results: dynamo's graph itself doesn't say.

A graph knows of each node in which modules it was made, but not what these were called with, in which order and under
which keywords, nor what they returned. Dynamo does know while it traces. So it is asked to trace the frame once more,
with hooks on all modules that leave a mark in the graph where a module call begins and ends; that graph is read and
thrown away, and dynamo traces a third time, as at first. What is compiled is that third graph: it has never seen a
mark, and it is used with the marks only where it is, node for node, the marked one without them.

The cost is two more traces of the frame, without any compilation.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor import config as inductor

from ._compat import Retrace, example_value, hook_all_modules, on_compile_end, source
from .plan import Value

OTHER = "msprobe_graph.other"
"""Marks, in a nest of arguments, an object that a graph can't hold; its type's name and what is kept of it follow."""


class Mark(NamedTuple):
    """Where a module call begins or ends."""

    at: int
    """How many nodes of the graph, its inputs left out, come before it."""
    module: tuple[str, str, str]
    """Of the module call: its key in nn_module_stack (the module's id, and which call of it this is), the expression by
    which the module was reached, and its class."""
    returned: tuple[Any, Any, Any] | None
    """Of an end: positional arguments, keyword arguments and outputs, nests with `Seen` in place of what the graph
    computes. None: it is a beginning."""


class Seen(NamedTuple):
    """A node of a graph: an input by where it comes from, another by its place among the others."""

    node: str | int
    value: Value | None = None
    """Of an input that is a tensor: what it is."""


class _Reading(NamedTuple):
    """All that is kept of a marked graph: dynamo clears a graph that it traces anew."""

    nodes: list[tuple[str, Any, int]]
    """Operation, target and number of inputs of all that are neither inputs nor marks."""
    marks: list[Mark]


class Marks(threading.local):
    """Gathers the marks of the graph that dynamo is tracing on this thread."""

    def __init__(self) -> None:
        self._unhook: list[Callable[[], None]] = []
        """What takes the hooks away; empty when there are none."""
        self._marked: list[_Reading] = []
        """The marked graph, once it was handed over."""
        self._deterministic = False
        """Inductor's setting of that name when the frame was traced first: dynamo resets it whenever it has traced."""
        on_compile_end(partial(_forget, self._unhook, self._marked))

    def of(self, graph: fx.Graph) -> list[Mark] | None:
        """The marks of `graph`, handed over by dynamo on this thread; None where they could not be had.

        The first and the second time it raises, and dynamo traces the frame and hands over its graph once more; the
        caller lets that pass.
        """
        if self._unhook:
            _forget(self._unhook, self._marked)
            self._marked.append(_read(graph))
            raise Retrace
        if not self._marked:
            self._unhook.append(hook_all_modules(_begin, _end))
            self._deterministic = inductor.deterministic
            raise Retrace
        inductor.deterministic = self._deterministic
        marked = self._marked.pop()
        return marked.marks if _read(graph).nodes == marked.nodes else None


def _forget(unhook: list[Callable[[], None]], marked: list[_Reading]) -> None:
    while unhook:
        unhook.pop()()
    marked.clear()


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def begins(cls: str) -> None:
    """In a marked graph: here the call of a module of that class begins."""


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def ends(cls: str, args: Any, kwargs: Any, output: Any) -> None:
    """In a marked graph: here it ends."""


def _begin(module: torch.nn.Module, args: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        begins(type(module).__name__)


def _end(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        outputs = [_plain(item) for item in output] if isinstance(output, tuple) else [_plain(output)]
        ends(type(module).__name__, _plain(args), _plain(kwargs), outputs)


def _plain(value: Any) -> Any:
    """`value` with nothing in it that a graph can't hold. Traced by dynamo: nothing here may be beyond it."""
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.Size):
        return (OTHER, "torch.Size", list(value))
    if isinstance(value, slice):
        return (OTHER, "slice", [_plain(value.start), _plain(value.stop), _plain(value.step)])
    if isinstance(value, (list, tuple)):
        if hasattr(value, "_fields"):
            return {name: _plain(getattr(value, name)) for name in value._fields}
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return (OTHER, type(value).__name__, None)


def _read(graph: fx.Graph) -> _Reading:
    reading = _Reading([], [])
    seen: dict[fx.Node, Seen] = {}
    dead = _kept_by_marks(graph)
    for node in graph.nodes:
        value = example_value(node)
        if node.op == "placeholder":
            seen[node] = Seen(source(node), Value.of(value) if isinstance(value, torch.Tensor) else None)
        elif node.target in (begins, ends):
            cls, *returned = fx.node.map_arg(node.args, seen.__getitem__)  # type: ignore[arg-type]
            stack = node.meta.get("nn_module_stack") or {"": ("", "")}
            key, (path, kind) = next(reversed(stack.items()))
            if _class_name(kind) == cls:  # else it is a module that the program has made as it ran
                call: Any = tuple(returned) if node.target is ends else None
                reading.marks.append(Mark(len(reading.nodes), (key, path, cls), call))
        elif node in dead:
            seen[node] = Seen("", Value.of(value) if isinstance(value, torch.Tensor) else None)
        elif node.op != "output":
            seen[node] = Seen(len(reading.nodes))
            reading.nodes.append((node.op, node.target, len(node.all_input_nodes)))
    return reading


def _kept_by_marks(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that dynamo drops when nothing uses them, and that only marks do: indexing, constants, arithmetic with
    sizes."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        number = isinstance(example_value(node), (torch.SymInt, torch.SymFloat, torch.SymBool))
        dropped = node.op == "get_attr" or (node.op != "placeholder" and (node.target is operator.getitem or number))
        if dropped and node.users and all(user in dead or user.target is ends for user in node.users):
            dead.add(node)
    return dead


def _class_name(kind: type | str) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
