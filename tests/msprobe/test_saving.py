"""What save() writes is what msProbe's save() writes, gradients included."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph import PrecisionDebugger

from . import saving


def written(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """debug.json's entries, their statistics as msProbe rounds them, and the files beside it."""
    (file,) = directory.glob("step0/*/debug.json")
    tensors = {each.name: torch.load(each) for each in file.parent.glob("dump_tensor_data/*.pt")}
    return json.loads(file.read_text())["data"], tensors


def alike(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict) and theirs.get("type") == "torch.Tensor":
        exact = all(ours[name] == theirs[name] for name in ("dtype", "shape", "data_name", "requires_grad"))
        return exact and all(
            ours[name] == pytest.approx(theirs[name], rel=1e-5) for name in ("Max", "Min", "Mean", "Norm")
        )
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return bool(ours == theirs)


def test_what_is_saved_is_what_msprobe_saves(msprobe: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    command = [msprobe.with_name("python"), "-B", saving.__file__, theirs]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    debugger = PrecisionDebugger(saving.config(ours))
    saving.save(debugger)
    debugger.flush()
    expected, files = written(theirs)
    found, our_files = written(ours)
    # msProbe notes null for the gradient of what can have none; we have no such entry.
    expected = {name: value for name, value in expected.items() if value is not None}
    assert list(found) == list(expected)
    assert [name for name in expected if not alike(found[name], expected[name])] == []
    assert our_files.keys() == files.keys()
    assert all(torch.equal(our_files[name], values) for name, values in files.items())
