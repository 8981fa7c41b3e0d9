"""What raises: the program, where it catches that, and a tap, which costs an entry and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import read, steps

from ..capturing import Apply, Capture, holes, modules


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_an_exception_that_the_program_catches(tmp_path: Any, level: str) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise ValueError("too large")
            return x

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Fails())
            self.after = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except ValueError:
                return self.after(x)

    model = Catches()
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": level, "risk_level": "ALL"})
    for x in (torch.ones(2), -torch.ones(2), torch.ones(2)):
        with debugger.start(model):
            model(x)
    first, second, third = (read(folder) for folder in steps(tmp_path))
    assert modules(first) == modules(third)
    assert first.construct["Module.after.ReLU.forward.0"] == "Module.Catches.forward.0"
    assert first.construct["Module.Catches.forward.0"] is None
    assert first.data["Module.after.ReLU.forward.0"]["site"]["module"] == "after"
    assert "output" in first.data["Module.Catches.forward.0"]
    assert "ValueError" in holes(first)["Module.inner.0.Fails.forward.0.output"]
    assert modules(second) == [
        "Module.inner.0.Fails.forward.0",
        "Module.inner.Sequential.forward.0",
        "Module.Catches.forward.0",
    ]


@pytest.mark.parametrize("level", ["L1", "mix"])
def test_an_operator_that_raises(capture: Capture, level: str) -> None:
    def program(x: Tensor) -> Tensor:
        try:
            return x @ x
        except RuntimeError:
            return x.exp()

    model = Apply(program)
    step = capture(model, lambda: model(torch.ones(2, 3)), level)
    assert "Tensor.exp.0.forward" in step.data


class Unreadable(Tensor):
    """Computes like a Tensor, and raises when its data is asked for."""

    @staticmethod
    def wrap(data: Tensor) -> Unreadable:
        return data.as_subclass(Unreadable)

    def data_ptr(self) -> int:
        raise RuntimeError("no data for you")

    @property
    def shape(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no shape either")

    @property
    def is_sparse(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nor this")

    @property
    def nbytes(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nor the size")


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_a_tap_that_fails_costs_an_entry_and_nothing_else(
    capture: Capture, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(Apply(lambda x: torch.exp(x).as_subclass(Tensor)), nn.ReLU())
    x = torch.arange(3.0)
    result = []
    step = capture(model, lambda: result.append(model(Unreadable.wrap(x.clone()))), level)
    assert torch.equal(result[0], torch.relu(torch.exp(x)))
    assert any("RuntimeError: no" in reason for reason in holes(step).values()), holes(step)
    assert any(
        record.levelno == logging.ERROR and "the model goes on" in record.getMessage() for record in caplog.records
    )
    if level in ("L0", "mix"):  # what comes after stands where it belongs
        assert step.construct["Module.1.ReLU.forward.0"] == "Module.Sequential.forward.0"
        assert step.data["Module.1.ReLU.forward.0"]["site"]["module"] == "1"
    if level == "mix":
        assert step.construct["Functional.relu.0.forward"] == "Module.1.ReLU.forward.0"


def test_sparse_tensors_are_refused_with_a_reason(capture: Capture) -> None:
    model = Apply(lambda x: torch.sparse.mm(x, torch.eye(2)))
    step = capture(model, lambda: model(torch.eye(2).to_sparse()), "L0")
    record = step.data["Module.Apply.forward.0"]["input_args"][0]
    assert (record["type"], record["Max"]) == ("torch.Tensor", None)
    assert "sparse" in record["reason"]
    assert step.data["Module.Apply.forward.0"]["output"][0]["Max"] == 1
