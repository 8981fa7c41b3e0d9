"""Running the command in this process, and dumps to run it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from msprobe_graph.cli import main


class Shown(NamedTuple):
    """What a command has printed."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[str]:
        """The rows of the table."""
        lines = self.out.splitlines()
        rule = next(number for number, line in enumerate(lines) if line.startswith("--"))
        return lines[rule + 1 : lines.index("", rule)]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    def run(*arguments: object) -> Shown:
        code = main(["show", *map(str, arguments)])
        return Shown(code, *capsys.readouterr())

    return run


def tensor(*shape: int, dtype: str = "torch.float32", **fields: Any) -> dict[str, Any]:
    """A tensor record as msProbe writes it: a plain one unless `fields` say otherwise."""
    statistics = {"Max": 1.5, "Min": -0.5, "Mean": 0.25, "Norm": 1.9, "requires_grad": False}
    return {"type": "torch.Tensor", "dtype": dtype, "shape": list(shape or (2, 4)), **statistics, **fields}


def forward(given: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """An entry with one input and one output."""
    return {"input_args": [given], "input_kwargs": {}, "output": [made]}


def write_step(folder: Path, data: dict[str, Any], **manifest: Any) -> Path:
    """A step's folder as msProbe leaves it, NaN and Infinity as bare words; with a manifest, ours."""
    folder.mkdir(parents=True)
    dump = {"task": "statistics", "level": "L1", "framework": "pytorch", "dump_data_dir": None, "data": data}
    (folder / "dump.json").write_text(json.dumps(dump, indent=1))
    (folder / "construct.json").write_text("{}")
    (folder / "stack.json").write_text("{}")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
