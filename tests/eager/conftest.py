"""Runs a program under capture and reads the step that it has dumped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps

Capture: TypeAlias = Callable[..., StepDump]
"""capture(model, program, level="mix", **settings): the step that `program()` has dumped."""
LEVELS = ("L0", "L1", "mix", "L2")


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    numbers = itertools.count()

    def run(model: Any, program: Callable[[], object], level: str = "mix", **settings: Any) -> StepDump:
        dump_path = tmp_path / f"dump{next(numbers)}"
        debugger = PrecisionDebugger({"dump_path": str(dump_path), "level": level, "risk_level": "ALL", **settings})
        try:
            debugger.start(model)
            program()
        finally:
            debugger.stop()
            debugger.step()
            debugger.flush()
        (folder,) = steps(dump_path)
        for file in folder.glob("*.json"):
            json.loads(file.read_bytes(), parse_constant=_refuse)
        return read(folder)

    return run


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")
