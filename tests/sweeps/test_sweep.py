"""The command itself, on three architectures: python tests/sweeps/sweep.py runs all."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).with_name("sweep.py")
NAMES = ["llama", "vit", "convnext"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_dumps_agree_with_eager_ones(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "reports.json"
    command = [sys.executable, str(SWEEP), *NAMES, "--dtype", dtype, "--json", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[2].split()[:2] == ["llama", "bit-equal"]
    reports = json.loads(file.read_text())
    assert [(report["name"], report["error"], report["equal"]) for report in reports] == [
        (name, None, True) for name in NAMES
    ]


def test_an_architecture_that_fails_is_a_row_and_ends_in_status_1() -> None:
    command = [sys.executable, str(SWEEP), "vit", "--untapped", "--timeout", "0.1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "vit: error: it took more than 0.1 s" in ended.stdout


def test_an_unknown_name_is_refused() -> None:
    ended = subprocess.run([sys.executable, str(SWEEP), "lama"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "no architecture is called lama" in ended.stderr
