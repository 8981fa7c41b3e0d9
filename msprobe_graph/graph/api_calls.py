"""Which torch calls the nodes of dynamo's graph stand for, as eager capture would see them.

A node holds what the program called: ``torch._C._nn.linear``, ``operator.add``, the method "view". Eager capture sees
the method that an operator becomes, and the calls in the bodies of higher-order operators.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from msprobe_graph.dump.records import StackFrame

from ._compat import example_value
from .arguments import Asked, asked

_METHODS = {
    name.strip("_"): name
    for name in vars(operator)
    if name.startswith("__") and name.endswith("__") and hasattr(torch.Tensor, name)
}
"""Of the functions of `operator`, by name: the method that each calls."""
_VIEWS = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT", torch.ops.aten.matrix_H: "H"}
"""What dynamo makes of an attribute that is a view, from torch 2.15 on; before, its graph asked for the attribute."""


def api_call(node: fx.Node) -> Asked:
    """The call that `node` is, as eager capture sees it: what was called, with which arguments."""
    target: Any = node.target
    if node.op == "call_method":
        return asked(getattr(torch.Tensor, target, None), node.args, node.kwargs)
    if node.op != "call_function":
        return Asked(None, (), {})
    attribute = str(node.args[1]) if target is getattr else _VIEWS.get(target)
    if attribute is not None:
        return Asked(getattr(getattr(torch.Tensor, attribute, None), "__get__", None), node.args[:1], {})
    if getattr(target, "__module__", None) != "_operator":
        return asked(target, node.args, node.kwargs)
    method = _METHODS.get(target.__name__.strip("_"))
    if method is None or not any(isinstance(example_value(arg), torch.Tensor) for arg in node.all_input_nodes):
        return Asked(None, (), {})
    first = node.args[0]
    if isinstance(first, fx.Node) and isinstance(example_value(first), torch.Tensor):
        return Asked(getattr(torch.Tensor, method, None), node.args, {})
    return Asked(getattr(torch.Tensor, f"__r{method[2:]}", None), node.args[::-1], {})


_RUN_ONCE = [
    "invoke_subgraph",
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
]
"""Higher-order operators whose body runs as if its calls stood in the program themselves."""


def in_body(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of the bodies that `node` runs: eager capture sees the calls in them, so they count."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or str(node.target) not in _RUN_ONCE:
        return
    for argument in node.all_input_nodes:
        body = getattr(node.graph.owning_module, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            for each in body.graph.nodes:
                yield each
                yield from in_body(each)


def stack(node: fx.Node) -> tuple[StackFrame, ...]:
    """Where in the program the call of a node stands, innermost frame first."""
    return frames(node.meta.get("stack_trace"))


def frames(trace: str | None) -> tuple[StackFrame, ...]:
    """A node's stack trace, innermost frame first."""
    return tuple(reversed(list(_frames(trace or ""))))


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def _frames(trace: str) -> Iterator[StackFrame]:
    for path, line, function in _FRAME.findall(trace):
        yield StackFrame(path, int(line), function)
