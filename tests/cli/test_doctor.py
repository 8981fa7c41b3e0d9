"""msprobe-graph doctor on the CPU; tests/device runs it on a device that calls itself npu."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from msprobe_graph.cli import checks, main


@pytest.mark.slow
def test_it_says_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == 0 or torch.accelerator.is_available()
    assert len(out.splitlines()) < 45, "one screen"
    assert f" {importlib.metadata.version('torch')} " in out
    on_cpu = out.partition("on cpu")[2].partition("\non ")[0].splitlines()
    for way in ("eager, statistics", "compiled with inductor", "acl_save "):
        assert [" works " in line for line in on_cpu if line.startswith(way) and "graph" not in line] == [True]


def test_without_an_npu_it_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    if hasattr(torch, "npu"):
        pytest.skip("there is a torch.npu")
    assert main(["doctor", "--npu"]) == 2
    assert "needs torch_npu, which can't be imported" in capsys.readouterr().err


def test_what_fails_and_what_is_wrong_are_told(tmp_path: Path) -> None:
    def fails() -> str:
        raise RuntimeError("the first line\nand another")

    assert checks._tried("a way", fails) == ("a way", False, "RuntimeError: the first line")
    there = checks._captured(checks._model("cpu"), checks._x(), tmp_path / "there", "statistics")
    here = checks._captured(checks._model("cpu"), checks._x() + 1, tmp_path / "here", "statistics")
    with pytest.raises(checks.Wrong, match=r"input_args\.0 has norm"):
        checks._compared(here, there)
