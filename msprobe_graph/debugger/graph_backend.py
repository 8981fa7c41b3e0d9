"""The dynamo backend as users name it: ``torch.compile(model, backend=msprobe_backend)`` or ``backend="msprobe"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx

from msprobe_graph.config import ConfigError, load_settings
from msprobe_graph.eager.context import Context
from msprobe_graph.graph import ascend
from msprobe_graph.graph._compat import Traced, module_calls
from msprobe_graph.graph.lower import lower
from msprobe_graph.graph.options import GraphOptions, graph_options
from msprobe_graph.graph.region import Region

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
    asked = graph_options(options, mode, ascend.preferred(inputs))
    if asked.config_path is None:
        open_sessions = sessions.opened(Session)
        if not open_sessions:
            raise ConfigError(
                "backend msprobe does not know what to capture: create a PrecisionDebugger before the first call, or "
                'pass torch.compile(..., options={"config_path": ...})'
            )
        session, running = open_sessions[0], _capturing
    else:
        session = _session_of(asked)
        running = session.context
    compiled = lower(module, inputs, asked, session.watch(running), Traced.now())
    return compiled if isinstance(compiled, Region) else partial(_run_unseen, compiled, running)


def _run_unseen(compiled: Callable[..., Any], running: Callable[[], Context | None], *inputs: Any) -> Any:
    """Run a graph of which nothing is captured; but eager capture, which goes on around it, must learn of it."""
    context = running()
    if context is None:
        return compiled(*inputs)
    with context.quiet():
        return compiled(*inputs)


def _capturing() -> Context | None:
    """What the debugger that was started last captures with, now."""
    debugged = (session for session in sessions.opened(Session) if session.debugged)
    return next((session.context() for session in debugged if session.capturing), None)


def _session_of(options: GraphOptions) -> Session:
    """The capture that an options["config_path"] stands for: one for all graphs that name the same."""
    settings = load_settings(options.config_path or {})
    alike = (each for each in sessions.opened(Session) if not each.debugged and each.settings == settings)
    session = next(alike, None) or Session(settings, debugged=False)
    session.follow(module_calls())
    return session


def _meet_dynamo() -> None:
    """Captures that began before dynamo was imported, for this module at the latest, learn of it."""
    for session in sessions.opened(Session):
        if session.capture is not None:
            session.capture.meet_dynamo()


_meet_dynamo()
