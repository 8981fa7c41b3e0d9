"""A batch that was padded: what is recorded is what a batch without padding gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph.dump.reader import StepDump
from msprobe_graph.dump.records import Request

from .conftest import Dumped, NewDebugger, forward

ROWS, PADDED = 5, 8
REQUESTS = [Request("a", 0, 2, "decode", (9, 11)), Request("b", 2, 5, "prefill", (0, 3))]


def batch() -> torch.Tensor:
    """Rows of which those that pad would show in every statistic."""
    rows = torch.full((PADDED, PADDED), float("nan"))
    rows[:ROWS] = torch.arange(ROWS * PADDED).reshape(ROWS, PADDED).float().sin()
    return rows


@pytest.fixture
def model() -> nn.Module:
    """Its weights have as many rows as the padded batch."""
    return nn.Sequential(nn.Linear(PADDED, PADDED), nn.ReLU(), nn.Linear(PADDED, PADDED))


def recorded(step: StepDump) -> dict[tuple[str, str], dict[str, Any]]:
    return {(tensor.entry, tensor.position): tensor.record for tensor in step.tensors()}


@pytest.mark.parametrize("level", ["L0", "L1", "mix", "L2"])
@pytest.mark.parametrize("request_id", [None, "b"])
def test_padding_is_in_no_record(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, level: str, request_id: str | None
) -> None:
    debugger = new_debugger(task="tensor", level=level, tensor={"request_id": request_id})
    with torch.no_grad():
        forward(debugger, model, batch(), scheduled_tokens=REQUESTS, padded_rows=PADDED)
        forward(debugger, model, batch()[:ROWS], scheduled_tokens=REQUESTS)
    debugger.flush()
    padded, exact = dumped()[0], dumped()[1]
    assert recorded(padded).keys() == recorded(exact).keys()
    for ours, other in zip(padded.tensors(), exact.tensors(), strict=True):
        assert ours.record["shape"] == other.record["shape"]
        assert not ours.record["nan_count"]
        torch.testing.assert_close(padded.load(ours), exact.load(other))
    shapes = [record["shape"][0] for record in recorded(padded).values()]
    assert {3 if request_id else ROWS, PADDED} == set(shapes), "activations are cut, weights aren't"


@pytest.mark.parametrize("padded_rows", [None, ROWS - 1, ROWS])
def test_no_padding(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, padded_rows: int | None) -> None:
    debugger = new_debugger()
    forward(debugger, model, batch()[:ROWS], scheduled_tokens={"a": 2, "b": 3}, padded_rows=padded_rows)
    debugger.flush()
    inputs = [record for (_, position), record in recorded(dumped()[0]).items() if position == "input_args.0"]
    assert [record["shape"] for record in inputs] == [[ROWS, PADDED]] * len(inputs)


def test_the_slice_is_of_the_rows_that_count(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(task="tensor", tensor={"slice": [{"dim": 0, "begin": -2}]})
    forward(debugger, model, batch(), scheduled_tokens=REQUESTS, padded_rows=PADDED)
    debugger.flush()
    step = dumped()[0]
    assert torch.equal(step.load(next(step.tensors())), batch()[ROWS - 2 : ROWS])


def test_phase_and_positions_are_in_the_manifest(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    forward(debugger, model, batch(), scheduled_tokens=REQUESTS, padded_rows=PADDED)
    debugger.flush()
    manifest = dumped()[0].manifest
    assert manifest is not None
    assert manifest["requests"] == [
        {"request": "a", "begin": 0, "end": 2, "phase": "decode", "positions": [9, 11]},
        {"request": "b", "begin": 2, "end": 5, "phase": "prefill", "positions": [0, 3]},
    ]
