"""What users pass to the backend: ``torch.compile(model, backend="msprobe", options={...})``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import msgspec

from msprobe_graph.config import ConfigError

Fidelity = Literal["exact", "full"]
Inner = str | Callable[..., Any]


class GraphOptions(msgspec.Struct, frozen=True):
    """The options of one compilation. ``config_path``: as PrecisionDebugger takes it; without it an active
    PrecisionDebugger says what to capture.

    What is not listed here goes to the inner backend as its own option.
    """

    config_path: str | os.PathLike[str] | Mapping[str, Any] | None = None
    inner: Inner = "inductor"
    """What compiles: the name of a dynamo backend or a callable. On an NPU, where nobody says, npugraph_ex or torchair,
    whichever is there."""
    fidelity: Fidelity = "exact"
    """exact: the values that the compiled program holds in memory anyway, its kernels unchanged. full: all of them,
    which changes the kernels."""
    full_modules: tuple[str, ...] = ()
    """Modules, by qualified name, for which fidelity is full; all that is inside them included."""
    verify: bool = False
    """Compile each graph four times more, run these programs at its first call and put the verdict into the manifest:
    see `verify`."""
    mode: str | None = None
    """The inner backend's mode ("max-autotune"), because torch.compile takes no mode beside options."""
    inner_options: Mapping[str, Any] = {}


OURS = tuple(name for name in GraphOptions.__struct_fields__ if name != "inner_options")


def graph_options(options: Mapping[str, Any] | None, mode: str | None, inner: str | None = None) -> GraphOptions:
    """`options` and `mode` as torch.compile hands them over; ConfigError, one sentence, for a wrong one. `inner`: what
    compiles where the options don't say."""
    given = dict(options or {})
    ours = {name: given.pop(name) for name in OURS if name in given}
    for name in given:
        close = difflib.get_close_matches(name, OURS, n=1, cutoff=0.75)
        if close:
            raise ConfigError(f"backend msprobe: the option {name!r} is unknown; did you mean {close[0]!r}?")
    fidelity = ours.get("fidelity", "exact")
    if fidelity not in get_args(Fidelity):
        raise ConfigError(
            f"backend msprobe: the option fidelity is {fidelity!r}; it is one of {', '.join(get_args(Fidelity))}"
        )
    inner = ours.setdefault("inner", inner or "inductor")
    if not isinstance(inner, str) and not callable(inner):
        raise ConfigError(f"backend msprobe: the option inner is {inner!r}; it is a backend's name or a callable")
    modules = ours.get("full_modules", ())
    if not isinstance(modules, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in modules):
        raise ConfigError(
            f"backend msprobe: the option full_modules is {modules!r}; it is a list of qualified module names"
        )
    if not isinstance(ours.get("verify", False), bool):
        raise ConfigError(f"backend msprobe: the option verify is {ours['verify']!r}; it is True or False")
    if mode is not None:
        ours.setdefault("mode", mode)
    ours["full_modules"] = tuple(modules)
    return GraphOptions(**ours, inner_options=given)
