"""Dynamo's expressions for where a module or an input of a graph comes from.

``L['self']._modules['layers']._modules['0']``, for example: a variable of the frame, and members from there on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MEMBER = re.compile(r"\._modules\['([^']+)'\]|\._(?:parameters|buffers)\['([^']+)'\]|\.(\w+)|\['([^']+)'\]")
FRAME_MODULE = ("L['self']", "L['fn']")
"""Where a frame has the module whose method it is: in the latter if dynamo has put a function of its own around it, as
around the forward of torch's own containers."""
_ROOT = re.compile(r"[A-Z]\['[^']+'\]")


def split_expression(expression: str) -> tuple[str, str]:
    """The variable and the path of an expression of dynamo's.

    >>> split_expression("L['self']._modules['layers']._modules['0']"), split_expression("L['self'].layers.0")
    (("L['self']", 'layers.0'), ("L['self']", 'layers.0'))
    """
    root = _ROOT.match(expression)
    if root is None:
        return expression, ""
    members = _MEMBER.findall(expression[root.end() :])
    return root.group(), ".".join(next(filter(None, names)) for names in members)


def anchors(sources: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """Of the graph's inputs, given by where they come from, those that are parameters or buffers: see Plan.anchors."""
    found: dict[str, list[tuple[int, str]]] = {}
    for position, expression in enumerate(sources):
        if re.search(r"\._(parameters|buffers)\['[^']+'\]$", expression):
            root, path = split_expression(expression)
            found.setdefault(root, []).append((position, path))
    return found
