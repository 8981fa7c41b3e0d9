"""The dynamo backend as users name it: ``torch.compile(model, backend=msprobe_backend)`` or ``backend="msprobe"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from msprobe_graph.config import ConfigError, load_settings
from msprobe_graph.eager.context import Context
from msprobe_graph.eager.in_trace import hide_hooks
from msprobe_graph.graph._compat import module_calls
from msprobe_graph.graph.lower import lower
from msprobe_graph.graph.options import GraphOptions, graph_options

from . import sessions
from .session import Session


def msprobe_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A dynamo backend that captures what compiled code computes, and leaves the compiling to another.

    ::

        debugger = PrecisionDebugger("config.json")
        compiled = torch.compile(model, backend=msprobe_backend)
        with debugger.start(compiled):
            compiled(batch)

    or without a debugger, all calls in step0: ``torch.compile(model, backend="msprobe", options={"config_path":
    "config.json"})``. `options`: see GraphOptions; what is not listed there is the inner backend's. Raises ConfigError,
    one sentence, for a wrong option and where neither says what to capture.
    """
    hide_hooks()
    asked = graph_options(options, mode)
    if asked.config_path is None:
        session = sessions.latest(Session)
        if session is None:
            raise ConfigError(
                "backend msprobe does not know what to capture: create a PrecisionDebugger before the first call, or "
                'pass torch.compile(..., options={"config_path": ...})'
            )
        running = _capturing
    else:
        session = _session_of(asked)
        running = session.context
    return lower(module, inputs, asked, session.settings, session.operators, running)


def _capturing() -> Context | None:
    """What the debugger that was started last captures with, now."""
    session = sessions.latest(Session, lambda session: session.capturing)
    return None if session is None else session.context()


def _session_of(options: GraphOptions) -> Session:
    """The capture that an options["config_path"] stands for: one for all graphs that name the same."""
    settings = load_settings(options.config_path)
    known = sessions.latest(Session, lambda session: session.settings == settings and not session.debugged)
    if known is None:
        known = Session(settings, debugged=False)
    outermost = module_calls()[-1:]
    known.follow({"": module for module in outermost})
    return known
