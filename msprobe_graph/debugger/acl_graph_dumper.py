"""AclGraphDumper: capture of a model that a service replays as graphs, under msProbe's name and with its calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from msprobe_graph.dump.records import Request

from .precision_debugger import PrecisionDebugger
from .session import Session


class AclGraphDumper:
    """Captures a model from one start on, step by step.

    ::

        dumper = AclGraphDumper("config.json")
        dumper.start(model)          # once, before anything of it is compiled or captured as a graph
        model(batch)
        dumper.step()                # the step is on disk when this returns
        model(warm_up)
        dumper.step(dump=False)      # was no step: what was captured is forgotten

    It has no stop(): services ask whether it has one, and then call it between steps. Raises ConfigError when a setting
    is wrong, before anything runs.
    """

    def __init__(self, config_path: str | os.PathLike[str] | None = None) -> None:
        self._debugger = PrecisionDebugger(config_path)
        self._started = False
        self.awaits_batches = False
        """A step begins when `begin` says so, not where the one before has ended: what lies between is not captured.
        To be set before start(), by who knows when batches come."""

    @property
    def session(self) -> Session:
        return self._debugger.session

    def start(self, model: Any) -> None:
        """Capture `model`: an nn.Module, or what wraps one and gives it by unwrap(), as vLLM's graph wrappers do."""
        self._started = True
        if not self.awaits_batches:
            self._debugger.start(unwrapped(model))

    def begin(self, model: nn.Module, requests: Sequence[Request], padded_rows: int | None) -> None:
        """A batch is about to run: capture from here to step(), if the config wants this step. See
        `PrecisionDebugger.start` for its requests and rows."""
        if self._started:
            self._debugger.start(model, scheduled_tokens=requests, padded_rows=padded_rows)

    def step(self, dump: bool = True) -> None:
        """The step is over and, unless `dump` is False, on disk under its number. The next one begins."""
        if self._started:
            self._debugger.stop()
            self._debugger.step(dump)
            self._debugger.flush()
            if not self.awaits_batches:
                self._debugger.start()  # unless the config leaves this step out


def unwrapped(model: Any) -> Any:
    """The module in what wraps one."""
    while not isinstance(model, nn.Module) and hasattr(model, "unwrap"):
        model = model.unwrap()
    return model
