"""Handing a graph on to Inductor: its options, with our passes chained behind the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx

from msprobe_graph.config import ConfigError

from .handoff import Compiled, Taps
from .options import GraphOptions
from .passes import EXACT, FULL, PIN, passes


def compile_with_taps(module: fx.GraphModule, inputs: Sequence[Any], taps: Taps, options: GraphOptions) -> Compiled:
    """See `handoff.hand_on`."""
    patches = inductor_config(options)
    pin, full, exact = (patches.get(slot, getattr(config, slot)) for slot in (PIN, FULL, EXACT))
    ours = passes(taps, _as_sequence(pin), _as_sequence(full), exact)
    patches |= {PIN: ours.pin, FULL: ours.full, EXACT: ours.exact}
    # As an argument, because a config.patch() around the call would not reach the backward pass, which is compiled
    # later.
    compiled: Any = compile_fx(module, inputs, config_patches=patches)
    return Compiled(compiled, reports=ours.exact.reports)


def _as_sequence(theirs: Any) -> tuple[Any, ...]:
    """The user's passes at one place: none, one or several."""
    return () if theirs is None else tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)


def inductor_config(options: GraphOptions) -> dict[str, Any]:
    """The user's mode and options as Inductor's configuration; ConfigError for what Inductor does not know."""
    found: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        try:
            found |= torch._inductor.list_mode_options(options.mode)
        except RuntimeError as error:
            raise ConfigError(f"backend msprobe: {error}") from error
    for name, value in options.inner_options.items():
        key = name.replace("-", "_")
        if not hasattr(config, key):
            raise ConfigError(f"backend msprobe: the option {name!r} is neither msprobe's nor Inductor's")
        found[key] = value
    return found
