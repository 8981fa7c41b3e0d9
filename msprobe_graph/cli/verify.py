"""msprobe-graph verify: whether taps change a model's compiled code."""

from __future__ import annotations

import runpy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.reader import read, steps


def verify(target: str, level: str, options: Mapping[str, Any], verdict_file: Path | None) -> Iterator[str]:
    """Lines with a verdict for each graph; the last one tells whether all are the same.

    `target` is ``FILE.py:FUNCTION``; the function returns a model and the arguments of a call: ``(model, args)`` or
    ``(model, args, kwargs)``. `options` are the backend's. ConfigError for what can't be used.
    """
    import torch

    from msprobe_graph.debugger.graph_backend import msprobe_backend
    from msprobe_graph.debugger.precision_debugger import PrecisionDebugger

    model, args, kwargs = _built(_function(target), target)
    with tempfile.TemporaryDirectory() as folder:
        debugger = PrecisionDebugger({"task": "statistics", "level": level, "dump_path": folder})
        compiled = torch.compile(model, backend=msprobe_backend, options={**options, "verify": True})
        with torch.set_grad_enabled(model.training), debugger.start(compiled):
            compiled(*args, **kwargs)
        manifest = read(steps(Path(folder))[0]).manifest or {}
    graphs = manifest.get("graphs", [])
    verdicts = [graph["verdict"] for graph in graphs if graph.get("verdict")]
    for number, verdict in enumerate(verdicts):
        noise = verdict["noise"]
        yield f"graph {number}: {verdict['sentence']}"
        yield (
            f"  largest difference {verdict['results']['largest_difference']:.3g}; between two untapped compilations, "
            f"tuned each by itself, {noise['largest_difference']:.3g} ({noise['bit_equal']} of {noise['tensors']} bit-equal)"
        )
        yield from (f"  changed: {name}" for name in verdict["functions"]["changed"])
    if verdict_file is not None:
        verdict_file.write_bytes(msgspec.json.format(msgspec.json.encode(verdicts)))
    if len(verdicts) < len(graphs) or not graphs:
        yield f"{len(graphs) - len(verdicts) or 'all'} graphs have no verdict; the log says why"
    elif all(verdict["same"] for verdict in verdicts):
        yield "verified: tapped and untapped program are the same"
    else:
        yield "not the same: the taps change the compiled program"


def _function(target: str) -> Callable[[], Any]:
    file, colon, name = target.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ConfigError(f"verify takes FILE.py:FUNCTION with a file that exists, not {target!r}")
    function = runpy.run_path(file).get(name)
    if not callable(function):
        raise ConfigError(f"{file} has no function {name!r}")
    found: Callable[[], Any] = function
    return found


def _built(function: Callable[[], Any], target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    built = function()
    if not isinstance(built, tuple) or len(built) not in (2, 3):
        raise ConfigError(f"{target} is to return (model, args) or (model, args, kwargs), not {type(built).__name__}")
    model, args, *rest = built
    return model, tuple(args), dict(rest[0]) if rest else {}
