"""Compiled code that is replayed as a CUDA graph: the dump of a replay is that of the same call without a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.dump.records import OVERRUN

from ..capturing import holes, modules
from ..models import Block

pytestmark = pytest.mark.gpu

FIELDS = ("dtype", "shape", "Max", "Min", "Mean", "Norm", "nan_count", "reason")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(64), Block(64)).cuda().eval()


def inputs(count: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 64, device="cuda") for _ in range(count)]


def dumped(folder: Path, calls: Callable[[PrecisionDebugger], Any], **settings: Any) -> list[StepDump]:
    debugger = PrecisionDebugger({"dump_path": str(folder), "risk_level": "ALL", "level": "L0", **settings})
    with torch.no_grad():
        calls(debugger)
    debugger.flush()
    return [read(step) for step in steps(folder)]


def plain(folder: Path, batches: list[torch.Tensor], **settings: Any) -> list[StepDump]:
    """A step for each batch, compiled, without CUDA graphs."""

    def calls(debugger: PrecisionDebugger) -> None:
        compiled = torch.compile(model(), backend=msprobe_backend)
        for batch in batches:
            with debugger.start(compiled):
                compiled(batch)

    return dumped(folder, calls, **settings)


def captured(debugger: PrecisionDebugger) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
    """A graph of the compiled model, its input and its output. The debugger has had one step."""
    compiled = torch.compile(model(), backend=msprobe_backend)
    x = torch.zeros(4, 64, device="cuda")
    with debugger.start(compiled):
        compiled(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x)
    return graph, x, y


def differences(one: StepDump, other: StepDump) -> list[Any]:
    """How the entries of two dumps differ; parents of replayed entries aside."""
    if modules(one) != modules(other):
        return [modules(one), modules(other)]
    found = []
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        values = [[pytest.approx(r.get(f), rel=1e-6, abs=1e-7) if isinstance(r.get(f), float) else r.get(f)
                   for f in FIELDS] for r in (a.record,)]  # fmt: skip
        if (a.entry, a.position) != (b.entry, b.position) or values[0] != [b.record.get(f) for f in FIELDS]:
            found.append((a.entry, a.position, a.record, b.record))
    return found


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_a_replayed_step_is_a_step_without_graphs(tmp_path: Path, level: str) -> None:
    batches, results = inputs(3), []

    def calls(debugger: PrecisionDebugger) -> None:
        graph, x, y = captured(debugger)
        for batch in batches:
            x.copy_(batch)
            with debugger.start():
                graph.replay()
            results.append(y.clone())

    _, *replayed = dumped(tmp_path / "graph", calls, level=level)
    expected = plain(tmp_path / "plain", batches, level=level)
    assert len(replayed) == len(expected) == 3
    for there, here in zip(expected, replayed, strict=True):
        assert differences(there, here) == []
    reference = torch.compile(model())
    with torch.no_grad():
        assert all(torch.equal(reference(batch), result) for batch, result in zip(batches, results, strict=True))


def test_what_is_replayed_while_nothing_captures_is_in_no_step(tmp_path: Path) -> None:
    batches = inputs(3)

    def calls(debugger: PrecisionDebugger) -> None:
        graph, x, _ = captured(debugger)
        graph.replay()
        x.copy_(batches[0])
        with debugger.start():
            graph.replay()
        graph.replay()

    _, step = dumped(tmp_path / "graph", calls)
    (expected,) = plain(tmp_path / "plain", batches[:1])
    assert differences(expected, step) == []
    assert OVERRUN not in holes(step).values()


def test_a_step_without_a_replay_has_nothing_of_the_graph(tmp_path: Path) -> None:
    def calls(debugger: PrecisionDebugger) -> None:
        captured(debugger)
        with debugger.start():
            pass

    _, step = dumped(tmp_path, calls)
    assert step.data == {}


def test_two_replays_in_a_step_are_an_overrun(tmp_path: Path) -> None:
    batches = inputs(2)

    def calls(debugger: PrecisionDebugger) -> None:
        graph, x, _ = captured(debugger)
        with debugger.start():
            for batch in batches:
                x.copy_(batch)
                graph.replay()

    _, step = dumped(tmp_path / "graph", calls)
    (expected,) = plain(tmp_path / "plain", batches[1:])
    assert differences(expected, step) == []
    assert OVERRUN in holes(step).values()


def reduced(debugger: PrecisionDebugger) -> None:
    compiled = torch.compile(model(), backend=msprobe_backend, options={"mode": "reduce-overhead"})
    for batch in inputs(5):
        torch.compiler.cudagraph_mark_step_begin()
        with debugger.start(compiled):
            compiled(batch)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_reduce_overhead(tmp_path: Path, level: str) -> None:
    batches = inputs(5)
    found = dumped(tmp_path / "graph", reduced, level=level)
    expected = plain(tmp_path / "plain", batches, level=level)
    for there, here in zip(expected, found, strict=True):
        assert differences(there, here) == []


# ---- tensors ------------------------------------------------------------------------------------------


def files(step: StepDump) -> dict[str, torch.Tensor]:
    """The tensors that the folder has, by the names of their files."""
    return {file.name: torch.load(file, weights_only=True) for file in (step.folder / "dump_tensor_data").glob("*.pt")}


def replayed(debugger: PrecisionDebugger) -> None:
    """The first step is without a graph, three are with one, and behind each it is replayed in none."""
    graph, x, _ = captured(debugger)
    for batch in inputs(3):
        x.copy_(batch)
        with debugger.start():
            graph.replay()
            debugger.stop()
            x.fill_(7.0)
            graph.replay()


def assert_saved(here: StepDump, there: StepDump) -> None:
    """The same files, bit for bit, and the records tell of them."""
    found, expected = files(here), files(there)
    assert found.keys() == expected.keys()
    assert found.keys() == {each.record["data_name"] for each in here.tensors() if "data_name" in each.record}
    for name, value in found.items():
        assert value.untyped_storage().nbytes() == value.nbytes
        assert value.is_contiguous()
        assert torch.equal(value, expected[name]), name
    assert not any("not saved" in reason for reason in holes(here).values())


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_the_files_of_a_replay_are_those_of_a_run_without_graphs(tmp_path: Path, level: str) -> None:
    _, *found = dumped(tmp_path / "graph", replayed, level=level, task="tensor")
    expected = plain(tmp_path / "plain", inputs(3), level=level, task="tensor")
    for there, here in zip(expected, found, strict=True):
        assert differences(there, here) == []
        assert_saved(here, there)
        assert any(".output." in name for name in files(here))


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_reduce_overhead_saves_tensors(tmp_path: Path, level: str) -> None:
    batches = inputs(5)
    found = dumped(tmp_path / "graph", reduced, level=level, task="tensor")
    expected = plain(tmp_path / "plain", batches, level=level, task="tensor")
    for there, here in zip(expected, found, strict=True):
        assert differences(there, here) == []
        assert_saved(here, there)


def test_tensors_without_room_are_named(tmp_path: Path) -> None:
    _, *found = dumped(tmp_path / "graph", replayed, task="tensor", graph_copy_bytes=4096)
    expected = plain(tmp_path / "plain", inputs(3), task="tensor")
    for there, here in zip(expected, found, strict=True):
        assert differences(there, here) == []
        saved, wanted = files(here), files(there)
        lacking = {name for name, reason in holes(here).items() if "graph_copy_bytes (4096)" in reason}
        assert lacking
        assert any(".output." in name or ".input." in name for name in saved)
        assert saved.keys().isdisjoint(lacking)
        assert saved.keys() | lacking == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in saved.items())


def test_statistics_alone_take_no_memory_for_copies(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    dumped(tmp_path / "statistics", replayed, graph_copy_bytes="1GiB")
    assert torch.cuda.memory_allocated() - before < 1 << 29
