"""msprobe-graph verify: whether taps change a model's compiled code."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import msgspec

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.reader import read, steps

from .command import Commands, Outcome


def add_parser(commands: Commands) -> None:
    """Tell the command line of this command."""
    parser = commands.add_parser(
        "verify",
        help="check whether taps change a compiled model",
        description="Compiles a model with taps and without, calls each, and compares results, gradients and generated "
        "functions. Exit code 1 where they differ. FUNCTION takes nothing and returns (model, args) or (model, args, "
        "kwargs); gradients are compared if the model is in training mode.",
    )
    parser.add_argument("target", metavar="FILE.py:FUNCTION", help="what builds the model and its inputs")
    parser.add_argument("--level", choices=["L0", "L1", "mix"], default="mix", help="(default: mix)")
    parser.add_argument("--fidelity", choices=["exact", "full"], default="exact", help="(default: exact)")
    parser.add_argument("--inner", default="inductor", metavar="NAME", help="what compiles (default: inductor)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the verdicts there too, as JSON")
    parser.set_defaults(run=run)


def run(options: Namespace) -> Outcome:
    """The command, with the options of its parser."""
    backend_options = {"fidelity": options.fidelity, "inner": options.inner}
    return verify(options.target, options.level, backend_options, options.output)


def verify(target: str, level: str, options: Mapping[str, Any], verdict_file: Path | None) -> Outcome:
    """A verdict for each graph; the last line tells whether all are the same.

    `target` is ``FILE.py:FUNCTION``; the function returns a model and the arguments of a call: ``(model, args)`` or
    ``(model, args, kwargs)``. `options` are the backend's. ConfigError for what can't be used.
    """
    import torch

    from msprobe_graph.debugger.graph_backend import msprobe_backend
    from msprobe_graph.debugger.precision_debugger import PrecisionDebugger

    model, args, kwargs = _built(_function(target), target)
    with tempfile.TemporaryDirectory() as folder:
        debugger = PrecisionDebugger({"task": "statistics", "level": level, "dump_path": folder})
        compiled: Any = torch.compile(model, backend=msprobe_backend, options={**options, "verify": True})
        with torch.set_grad_enabled(model.training), debugger.start(compiled):
            compiled(*args, **kwargs)
        manifest = read(steps(Path(folder))[0]).manifest or {}
    graphs = manifest.get("graphs", [])
    verdicts = [graph["verdict"] for graph in graphs if graph.get("verdict")]
    if verdict_file is not None:
        verdict_file.write_bytes(msgspec.json.format(msgspec.json.encode(verdicts)))
    same = bool(graphs) and len(verdicts) == len(graphs) and all(each["same"] for each in verdicts)
    return Outcome(_lines(verdicts, len(graphs)), int(not same))


def _lines(verdicts: list[dict[str, Any]], graphs: int) -> Iterator[str]:
    for number, verdict in enumerate(verdicts):
        results, noise = verdict["results"], verdict["noise"]
        yield f"graph {number}: {verdict['sentence']}"
        yield (
            f"  largest difference {results['largest_difference']:.3g}; between two untapped compilations, tuned each "
            f"by itself, {noise['largest_difference']:.3g} ({noise['bit_equal']} of {noise['tensors']} bit-equal)"
        )
        yield from (f"  changed: {name}" for name in verdict["functions"]["changed"])
    if len(verdicts) < graphs or not graphs:
        yield f"{len(verdicts)} of {graphs} graphs have a verdict; the log says why the others have none"
    elif all(verdict["same"] for verdict in verdicts):
        yield "verified: tapped and untapped program are the same"
    else:
        yield "not the same: the taps change the compiled program"


def _function(target: str) -> Callable[[], Any]:
    file, colon, name = target.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ConfigError(f"verify takes FILE.py:FUNCTION with a file that exists, not {target!r}")
    spec = spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    # Where its classes can be found by the name of their module, as the compiler looks for them.
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
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
