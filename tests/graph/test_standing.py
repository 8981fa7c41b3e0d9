"""Values that a CUDA graph measures later than they are tapped: nothing overwrites them before they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import nn

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.graph import placement
from msprobe_graph.graph.generated import UNCACHED, generated_code

pytestmark = pytest.mark.gpu

NARROW, WIDE, BLOCKS = 16, 2048, 40


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(NARROW, WIDE, bias=False), nn.Linear(WIDE, NARROW, bias=False))
            for _ in range(BLOCKS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).relu()  # Inductor has that written in place of something
        return x


def captured(folder: Path, run: Callable[[PrecisionDebugger], None]) -> list[StepDump]:
    debugger = PrecisionDebugger({"dump_path": str(folder), "level": "L0"})
    with torch.no_grad(), torch._inductor.config.patch(UNCACHED):
        run(debugger)
    debugger.flush()
    return [read(step) for step in steps(folder)]


@pytest.mark.parametrize("together", [1, 40, placement.STANDING])
@pytest.mark.parametrize("rows", [8, 16384], ids=["many at once", "more than are kept"])
def test_nothing_overwrites_what_is_yet_to_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, together: int
) -> None:
    monkeypatch.setattr(placement, "STANDING", together)
    torch.manual_seed(1)
    batches = [torch.randn(rows, NARROW, device="cuda") for _ in range(4)]
    results: list[torch.Tensor] = []

    def replayed(debugger: PrecisionDebugger) -> None:
        compiled = torch.compile(Chain().cuda(), backend=msprobe_backend)
        x = batches[0].clone()
        with debugger.start(compiled):
            compiled(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compiled(x)
            results.append(y.clone())
            y.zero_()  # its values are in the dump all the same
        for batch in batches:
            x.copy_(batch)
            with debugger.start():
                graph.replay()

    def called(debugger: PrecisionDebugger) -> None:
        compiled = torch.compile(Chain().cuda(), backend=msprobe_backend)
        for batch in batches:
            with debugger.start(compiled):
                results.append(compiled(batch).clone())

    with generated_code() as programs:
        _, *found = captured(tmp_path / "replayed", replayed)
    torch._dynamo.reset()
    expected = captured(tmp_path / "called", called)
    (program,) = programs
    assert "msprobe_graph_tap_standing([" in program
    assert "msprobe_graph_hold([" in program
    assert len(found) == len(expected) == len(batches)
    for there, here in zip(expected, found, strict=True):
        assert len(here.data) == 3 * BLOCKS  # all but the root, whose call a replay does not make
        assert here.data == {name: there.data[name] for name in here.data}
    assert torch.equal(results[0], results[-1])  # of the last replay
