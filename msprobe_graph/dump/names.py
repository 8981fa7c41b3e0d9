"""Entry names: how a call is called in dump.json, and back.

An API call reads ``{prefix}.{api}.{call}.{direction}``, a module call ``Module.{path}.{Class}.{direction}.{call}``:
the call number stands before the direction for an API and after it for a module (msProbe's format, kept so that its
tools read ours).

    >>> api_entry("Functional.linear", 0, "forward")
    'Functional.linear.0.forward'
    >>> module_entry("layers.0.mlp", "MLP", "backward", 2)
    'Module.layers.0.mlp.MLP.backward.2'
    >>> parse("Module.layers.0.mlp.MLP.backward.2")
    EntryName(kind='module', name='layers.0.mlp', cls='MLP', direction='backward', call=2)
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Direction = Literal["forward", "backward", "parameters_grad"]

_API = re.compile(r"(?P<name>.+)\.(?P<call>\d+)\.(?P<direction>forward|backward)")
_MODULE = re.compile(
    r"Module\.(?:(?P<name>.+)\.)?(?P<cls>[^.]+)\.(?P<direction>forward|backward|parameters_grad)\.(?P<call>\d+)"
)


class EntryName(NamedTuple):
    """The parts of an entry name."""

    kind: Literal["api", "module"]
    name: str
    """``Functional.linear`` for an API, the qualified name for a module ("" for the root)."""
    cls: str | None
    """A module's class; None for an API."""
    direction: Direction
    call: int
    """Which call of that name within the step, from 0."""


def api_entry(api: str, call: int, direction: Direction) -> str:
    return f"{api}.{call}.{direction}"


def module_entry(path: str, cls: str, direction: Direction, call: int) -> str:
    return module_call(module_prefix(path, cls), direction, call)


def module_call(prefix: str, direction: Direction, call: int) -> str:
    """`module_entry` for a prefix that is at hand."""
    return f"{prefix}.{direction}.{call}"


def module_prefix(path: str, cls: str) -> str:
    """``Module.{path}.{Class}``; the root module, whose path is "", is ``Module.{Class}``."""
    return f"Module.{path}.{cls}" if path else f"Module.{cls}"


def parse(entry: str) -> EntryName:
    """The parts of `entry`; ValueError when it is no entry name."""
    if match := _MODULE.fullmatch(entry):
        kind: Literal["api", "module"] = "module"
    elif match := _API.fullmatch(entry):
        kind = "api"
    else:
        raise ValueError(
            f"{entry!r} is no entry name: expected {{prefix}}.{{api}}.{{call}}.{{forward|backward}} "
            "or Module.{path}.{Class}.{forward|backward|parameters_grad}.{call}"
        )
    parts = match.groupdict()
    direction: Direction = parts["direction"]  # type: ignore[assignment]  # one of them: it matched
    return EntryName(kind, parts["name"] or "", parts.get("cls"), direction, int(parts["call"]))
