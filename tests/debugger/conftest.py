"""A small model, a whole step of it, and debuggers that write below tmp_path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps

NewDebugger: TypeAlias = Callable[..., PrecisionDebugger]
"""A debugger at level L0 with dump_path `dump`, and other settings as given."""
Dumped: TypeAlias = Callable[..., dict[int, StepDump]]
"""The steps below a folder of tmp_path, by number; there is one process."""

ENTRIES = ["Module.0.Linear.forward.0", "Module.1.ReLU.forward.0", "Module.Sequential.forward.0"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@pytest.fixture
def new_debugger(tmp_path: Path) -> Iterator[NewDebugger]:
    made = []

    def make(**settings: Any) -> PrecisionDebugger:
        where = {"dump_path": str(tmp_path / "dump"), "level": "L0", "risk_level": "ALL"}
        made.append(PrecisionDebugger({**where, **settings}))
        return made[-1]

    yield make
    for debugger in made:
        debugger.stop()
        debugger.flush()


@pytest.fixture
def dumped(tmp_path: Path) -> Dumped:
    def read_all(folder: str = "dump") -> dict[int, StepDump]:
        if not (tmp_path / folder).exists():
            return {}
        found = list((tmp_path / folder).glob("step*"))
        return {int(path.parent.name[4:]): read(path) for path in steps(tmp_path / folder)} if found else {}

    return read_all


def forward(debugger: PrecisionDebugger, model: nn.Module, x: torch.Tensor | None = None, **start: Any) -> torch.Tensor:
    """One whole step."""
    debugger.start(model, **start)
    out = model(torch.ones(2, 4) if x is None else x)
    debugger.stop()
    debugger.step()
    assert isinstance(out, torch.Tensor)
    return out


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
