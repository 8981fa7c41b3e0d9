"""What a worker of vLLM's measures of its own steps: functions that collective_rpc has it call, between steps."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch

EDGE = 3
"""Intervals left out at either end: prefills, and steps in which requests begin or are over."""


class Took(NamedTuple):
    """Medians in milliseconds; None where there were too few."""

    step: float | None
    """From one call of execute_model to the next."""
    graph: float | None
    """A CUDA graph from end to end, on the GPU."""


class Watch:
    """Notes when steps begin, and has events recorded around each replay of a CUDA graph while `timing`, which costs
    the step more than it is measured for."""

    def __init__(self, worker: Any) -> None:
        self.begun: list[float] = []
        self.replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.timing = False
        worker.execute_model = functools.partial(self._execute_model, worker.execute_model)
        if torch.cuda.is_available():
            replay = torch.cuda.CUDAGraph.replay
            torch.cuda.CUDAGraph.replay = lambda graph: self._replay(replay, graph)  # type: ignore[method-assign]

    def _execute_model(self, execute_model: Any, *args: Any, **kwargs: Any) -> Any:
        self.begun.append(time.perf_counter())
        return execute_model(*args, **kwargs)

    def _replay(self, replay: Any, graph: Any) -> Any:
        if not self.timing:
            return replay(graph)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay(graph)
        end.record()
        self.replays.append((begin, end))
        return None


def _inner(worker: Any) -> Any:
    return getattr(worker, "worker", worker)  # the one that vLLM wraps


def watch(worker: Any) -> None:
    """From now on."""
    _inner(worker).benchmark_watch = Watch(_inner(worker))


def begin(worker: Any, timing: bool) -> None:
    """Forget what was noted. timing: of graphs, too."""
    found = _inner(worker).benchmark_watch
    found.begun.clear()
    found.replays.clear()
    found.timing = timing


def end(worker: Any) -> Took:
    """What was noted since."""
    found = _inner(worker).benchmark_watch
    found.timing = False
    if found.replays:
        torch.cuda.synchronize()
    steps = [later - earlier for earlier, later in zip(found.begun, found.begun[1:], strict=False)][EDGE:-EDGE]
    graphs = [begun.elapsed_time(over) for begun, over in found.replays]
    return Took(
        statistics.median(steps) * 1e3 if steps else None,
        statistics.median(graphs) if graphs else None,
    )
