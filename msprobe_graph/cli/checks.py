"""Whether the ways of capturing work on a device: each is tried on a small model and compared with the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from msprobe_graph.debugger.graph_backend import msprobe_backend
from msprobe_graph.debugger.precision_debugger import PrecisionDebugger
from msprobe_graph.debugger.save_tensor import acl_save
from msprobe_graph.debugger.sessions import flush
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.graph import ascend
from msprobe_graph.taps.device import of

TOLERANCE = 1e-2
"""Of norms, relative: devices round differently, and a norm of another tensor is far away."""
GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
"""What torch.<device> calls a graph."""

Program = Callable[[torch.Tensor], Any]


class Finding(NamedTuple):
    """What came of one check."""

    way: str
    works: bool | None
    """None: not tried."""
    remark: str
    """Why not, or what was seen."""


class Wrong(ValueError):
    """Something ran to its end, and what came out is wrong."""


def findings(device: torch.device, folder: Path) -> Iterator[Finding]:
    """One for each way; `folder` takes the dumps."""
    inner = ascend.preferred([torch.empty(0, device=device)]) or "inductor"
    yield _tried("eager, statistics", _eager, device, folder / "statistics", "statistics")
    yield _tried("eager, tensors", _eager, device, folder / "tensor", "tensor")
    yield _tried("compiled with aot_eager", _compiled, device, folder / "aot_eager", "aot_eager")
    yield _tried(f"compiled with {inner}", _compiled, device, folder / inner, inner)
    yield _tried("acl_save", _saved, device, folder / "saved")
    graph, inside = "statistics in a replayed graph", "acl_save in a replayed graph"
    if device.type not in GRAPHS:
        yield from (Finding(way, None, f"{device.type} has no graphs to replay") for way in (graph, inside))
        return
    yield _tried(graph, _replayed, device, folder / "graph")
    if of(device).save_in_graph is not None:
        yield _tried(inside, _saved_in_graph, device, folder / "saved_in_graph")
    else:
        yield Finding(inside, None, f"nothing here hands values from a graph of {device.type} to the host")


def _tried(way: str, check: Callable[..., str], *arguments: Any) -> Finding:
    boundary = Boundary()
    log = logging.getLogger("msprobe_graph")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the finding says it
    try:
        remark = boundary.attempt(way, check, *arguments)
    finally:
        log.setLevel(level)
        torch.compiler.reset()
    if remark is not None:
        return Finding(way, True, remark)
    return Finding(way, False, boundary.holes[0].reason.removeprefix("capture failed: ").splitlines()[0])


def _model(device: torch.device | str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval().to(device)


def _x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 64)


def _captured(program: Any, x: torch.Tensor, folder: Path, task: str) -> StepDump:
    debugger = PrecisionDebugger({"dump_path": str(folder), "level": "mix", "risk_level": "ALL", "task": task})
    with torch.no_grad(), debugger.start(program):
        program(x)
    return read(steps(folder)[0])


def _eager(device: torch.device, folder: Path, task: str) -> str:
    there = _captured(_model("cpu"), _x(), folder / "cpu", task)
    here = _captured(_model(device), _x().to(device), folder / device.type, task)
    return _compared(here, there)


def _compiled(device: torch.device, folder: Path, inner: str) -> str:
    there = _captured(_model("cpu"), _x(), folder / "cpu", "statistics")
    program: Any = torch.compile(_model(device), backend=msprobe_backend, options={"inner": inner})
    here = _captured(program, _x().to(device), folder / device.type, "statistics")
    return _compared(here, there)


def _replayed(device: torch.device, folder: Path) -> str:
    there = _captured(_model("cpu"), _x(), folder / "cpu", "statistics")
    program: Any = torch.compile(_model(device), backend=msprobe_backend, options={"inner": "aot_eager"})
    debugger = PrecisionDebugger({"dump_path": str(folder / device.type), "level": "mix", "risk_level": "ALL"})
    x = torch.zeros(8, 64, device=device)
    with torch.no_grad():
        with debugger.start(program):
            program(x)
        graph = _graph_of(device, program, x)
        x.copy_(_x())
        with debugger.start():
            graph.replay()
    return _compared(read(steps(folder / device.type)[1]), there)


def _saved(device: torch.device, folder: Path) -> str:
    acl_save(_x().to(device), folder / "x.pt")
    flush()
    return _same(torch.load(folder / "x_0.pt", weights_only=True))


def _saved_in_graph(device: torch.device, folder: Path) -> str:
    x = torch.zeros(8, 64, device=device)
    with torch.no_grad():
        graph = _graph_of(device, lambda x: acl_save(x * 1, folder / "x.pt"), x)
    x.copy_(_x())
    graph.replay()
    of(device).synchronize()
    flush()
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise Wrong("no file was written")
    return f"{_same(torch.load(files[-1], weights_only=True))}, in {', '.join(file.name for file in files)}"


def _graph_of(device: torch.device, program: Program, x: torch.Tensor) -> Any:
    module = torch.get_device_module(device)
    graph = getattr(module, GRAPHS[device.type])()
    with module.graph(graph):
        program(x)
    return graph


def _compared(here: StepDump, there: StepDump) -> str:
    norms = {(each.entry, each.position): each.record.get("Norm") for each in there.tensors()}
    compared = 0
    for each in here.tensors():
        norm, expected = each.record.get("Norm"), norms.get((each.entry, each.position))
        if norm is None or expected is None:
            continue
        compared += 1
        if abs(norm - expected) > TOLERANCE * max(abs(expected), 1):
            raise Wrong(f"{each.entry} {each.position} has norm {norm:.6g}, on the CPU {expected:.6g}")
    if not compared:
        raise Wrong("nothing was captured")
    return f"{compared} of {len(norms)} tensors, as on the CPU"


def _same(saved: torch.Tensor) -> str:
    if not torch.equal(saved.cpu(), _x()):
        raise Wrong("what was saved differs from what was computed")
    return "what was computed"
