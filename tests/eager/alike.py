"""A model, and captures of several of its steps, for the tests of calls that are like those of the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps
from tests.capturing import Apply, capture_into

Program = Callable[[nn.Module, int], object]
"""Runs the model as a step of that number does."""


class Net(nn.Module):
    """With a module that is called twice, a buffer, an output that is a tuple, and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.twice = nn.Linear(6, 6, bias=False)
        self.last = Apply(lambda x, scale=1.0, extra=None: (x * scale, x if extra is None else x + extra))

    def forward(self, x: torch.Tensor, scale: float = 1.0, depth: int = 1) -> Any:
        x = functional.relu(self.norm(self.first(x)))
        for _ in range(depth):
            x = self.twice(self.twice(x))
        return self.last(x, scale=scale, extra={"a": x}["a"])


def captured(model: nn.Module, folder: Path, level: str, programs: Iterable[Callable[[], object]]) -> list[StepDump]:
    """Steps of one capture, each begun in the same line."""
    debugger = PrecisionDebugger({"dump_path": str(folder), "level": level, "risk_level": "ALL"})
    for program in programs:
        with debugger.start(model):
            program()
    debugger.flush()
    debugger.session.close()
    return [read(each) for each in steps(folder)]


def check(folder: Path, level: str, program: Program, count: int = 4) -> list[StepDump]:
    """Run `count` steps in one capture, and each in a capture of its own: they hold the same."""
    torch.manual_seed(0)
    model, alone = Net().eval(), Net().eval()
    alone.load_state_dict(model.state_dict())
    found = captured(model, folder / "together", level, ((lambda n=n: program(model, n)) for n in range(count)))
    for number, step in enumerate(found):
        expected = capture_into(folder / f"alone{number}", alone, lambda n=number: program(alone, n), level)
        assert step.data == expected.data
        assert step.construct == expected.construct
    return found


def input_of(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 6)), generator=torch.Generator().manual_seed(number))


def maxima(found: list[StepDump], entry: str, part: str = "output") -> list[float | None]:
    return [step.data[entry][part][0]["Max"] if step.data[entry].get(part) else None for step in found]
