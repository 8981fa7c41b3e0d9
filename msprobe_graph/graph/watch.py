"""What a compiled graph needs to know of the capture that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from msprobe_graph.config import Settings
from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.eager.context import Context

from .replay import Replays


class Watch(NamedTuple):
    """A capture, as the graphs see it that are compiled under it."""

    settings: Settings
    operators: OperatorTable
    boundary: Boundary
    """Where it ends if something of ours fails."""
    replays: Replays
    """Follows what is replayed as a CUDA graph."""
    running: Callable[[], Context | None]
    """Gives what captures now on this thread; None while nothing does."""
