"""Captures one step of a program, and says what its dump holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps

LEVELS = ("L0", "L1", "mix", "L2")
Capture: TypeAlias = Callable[..., StepDump]
"""capture(model, program, level="mix", **settings): the one step that `program()` has dumped."""


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def capture_into(
    dump_path: Path, model: Any, program: Callable[[], object], level: str = "mix", **settings: Any
) -> StepDump:
    """The one step that `program()` has dumped into `dump_path`."""
    debugger = PrecisionDebugger({"dump_path": str(dump_path), "level": level, "risk_level": "ALL", **settings})
    try:
        debugger.start(model)
        program()
    finally:
        debugger.stop()
        debugger.step()
        debugger.flush()
    (folder,) = steps(dump_path)
    return read_strictly(folder)


def read_strictly(folder: Path) -> StepDump:
    """A step whose files hold no bare NaN or Infinity: these words are no JSON, and fail the test."""
    for file in folder.glob("*.json"):
        json.loads(file.read_bytes(), parse_constant=_refuse)
    return read(folder)


def modules(step: StepDump) -> list[str]:
    """The entries of modules, in their order."""
    return [name for name in step.data if name.startswith("Module.")]


def norms(step: StepDump, part: str = "output") -> dict[str, float]:
    """The norm of the first tensor whose position starts with `part`, by entry."""
    found: dict[str, float] = {}
    for tensor in step.tensors():
        if tensor.position.startswith(part):
            found.setdefault(tensor.entry, tensor.record["Norm"])
    return found


def holes(step: StepDump) -> dict[str, str]:
    """What the manifest says is missing, and why."""
    assert step.manifest is not None
    return {hole["site"]: hole["reason"] for hole in step.manifest["holes"]}


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")
