"""The examples run, and the tutorial's commands print what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

_SHELL = re.compile(r"^```\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = {"python": [sys.executable], "msprobe-graph": [sys.executable, "-m", "msprobe_graph.cli"]}


def run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False).stdout


def plain(output: str) -> list[str]:
    """The lines without what another machine may make otherwise: statistics, process ids, widths of columns."""
    lines = (re.sub(r"-?\b\d+\.\d[\d.e-]*|(?<=proc)\d+|-{2,}", "#", line) for line in output.splitlines())
    return [text for line in lines if (text := " ".join(line.split()))]


@pytest.mark.slow
def test_the_tutorial_finds_the_planted_bug(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKOUT / "examples" / "planted_bug", tmp_path / "planted_bug")
    shutil.rmtree(folder / "output", ignore_errors=True)
    shown = "".join(_SHELL.findall((CHECKOUT / "docs" / "tutorial.md").read_text()))
    for block in shown.removeprefix("$ ").split("\n$ "):
        command, _, expected = block.partition("\n")
        program, *arguments = shlex.split(command)
        printed = plain(run([*_PROGRAMS[program], *arguments], folder))
        wanted = [line for line in plain(expected) if line != "..."]
        assert [line for line in printed if line in wanted] == wanted, command
    assert "Torch.tanh.0.forward is the first whose inputs agree" in shown


@pytest.mark.slow
def test_a_compiled_model_is_captured(tmp_path: Path) -> None:
    out = run([sys.executable, str(CHECKOUT / "examples" / "compiled_model" / "capture.py"), str(tmp_path)], tmp_path)
    assert "mode graph" in out
    assert "5 of 5 expected sites captured" in out
    assert "Module.2.SiLU.forward.0" in out
    assert "Module.1.Linear.parameters_grad.0" in out
