"""msprobe-graph compare, on dumps made by PrecisionDebugger and on written ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.cli import main

from .conftest import Shown, forward, tensor, write_step

Compare = Callable[..., Shown]


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    def run(*arguments: object) -> Shown:
        code = main(["compare", *map(str, arguments)])
        return Shown(code, *capsys.readouterr())

    return run


class Net(nn.Module):
    def __init__(self, slope: float = 0.01) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.LeakyReLU(slope)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.act(self.first(x)))
        return y


def capture(dump: Path, slope: float = 0.01, steps: int = 1) -> Path:
    torch.manual_seed(0)
    model, debugger = Net(slope), PrecisionDebugger({"dump_path": str(dump), "level": "mix"})
    for _ in range(steps):
        with torch.no_grad(), debugger.start(model):
            model(torch.linspace(-1, 1, 8).reshape(2, 4))
    return dump


def written(dump: Path, value: float, step: int = 0, process: str = "rank0", **manifest: Any) -> Path:
    data = {"Torch.a.0.forward": forward(tensor(), tensor(Max=value))}
    write_step(dump / f"step{step}" / process, data, **manifest)
    return dump


def test_names_the_operator_that_parts(tmp_path: Path, compare: Compare) -> None:
    shown = compare(capture(tmp_path / "a"), capture(tmp_path / "b", slope=0.2))
    assert (shown.code, shown.err) == (1, "")
    sentence = shown.out.splitlines()[2]
    assert sentence.startswith(
        "Functional.leaky_relu.0.forward is the first whose inputs agree and whose output does not"
    )
    (row,) = [row for row in shown.rows if row.startswith("!!")]
    assert row.split()[1:4] == ["Functional.leaky_relu.0.forward", "agree", "output.0"]
    assert not any("first" in row for row in shown.rows)


def test_dumps_that_agree(tmp_path: Path, compare: Compare) -> None:
    shown = compare(capture(tmp_path / "a"), capture(tmp_path / "b"))
    assert shown.code == 0
    assert "no entry parts" in shown.out
    assert len(shown.out.splitlines()) == 1


def test_tolerance(tmp_path: Path, compare: Compare) -> None:
    a, b = written(tmp_path / "a", 1.5), written(tmp_path / "b", 1.6)
    assert compare(a, b).code == 1
    assert compare(a, b, "--tolerance", "0.1").code == 0


def test_the_first_step_that_parts_is_told_in_detail(tmp_path: Path, compare: Compare) -> None:
    for step, value in enumerate((1.5, 1.6, 1.7)):
        written(tmp_path / "a", 1.5, step)
        written(tmp_path / "b", value, step)
    lines = compare(tmp_path / "a", tmp_path / "b").out.splitlines()
    assert lines[0].startswith("step0/rank0: no entry parts")
    assert lines[1].startswith("step1/rank0: 1 of 1 entries part")
    assert lines[-2].startswith("step2/rank0: 1 of 1 entries part")
    assert "1.5 against 1.7" in lines[-1]
    assert sum(line.startswith("--") for line in lines) == 1
    assert compare(tmp_path / "a", tmp_path / "b", "--step", 0).code == 0
    assert compare(tmp_path / "a", tmp_path / "b", "--step", 2).out.startswith("step2/rank0")


def test_ranks_are_joined_by_number(tmp_path: Path, compare: Compare) -> None:
    for rank, value in ((0, 1.5), (1, 1.6)):
        written(tmp_path / "a", 1.5, process=f"rank{rank}")
        written(tmp_path / "b", value, process=f"rank{rank}")
    assert compare(tmp_path / "a", tmp_path / "b", "--rank", 0).code == 0
    assert compare(tmp_path / "a", tmp_path / "b", "--rank", 1).code == 1


def test_single_steps_and_processes_of_other_numbers_are_compared(tmp_path: Path, compare: Compare) -> None:
    written(tmp_path / "a", 1.5, step=0, process="proc11")
    written(tmp_path / "b", 1.5, step=3, process="rank0")
    assert compare(tmp_path / "a", tmp_path / "b").code == 0


def test_the_table_ends_unless_all_is_asked_for(tmp_path: Path, compare: Compare) -> None:
    for name, value in (("a", 1.5), ("b", 1.6)):
        data = {f"Torch.a.{number}.forward": forward(tensor(), tensor(Max=value)) for number in range(30)}
        write_step(tmp_path / name / "step0" / "rank0", data)
    assert "... and 10 entries more (--all)" in compare(tmp_path / "a", tmp_path / "b").out
    assert "Torch.a.29.forward" in compare(tmp_path / "a", tmp_path / "b", "--all").out


def test_what_is_missing_is_told_with_its_reason(tmp_path: Path, compare: Compare) -> None:
    written(tmp_path / "a", 1.5)
    holes = [{"site": "Torch.a.0.forward", "reason": "fused away"}]
    data = {"Torch.b.0.forward": forward(tensor(), tensor())}
    write_step(tmp_path / "b" / "step0" / "rank0", data, mode="graph", holes=holes)
    assert compare(tmp_path / "a", tmp_path / "b").err.endswith(
        "have no tensor in common whose values both of them hold\n"
    )
    both = {"Torch.a.0.forward": forward(tensor(), tensor()), "Torch.b.0.forward": forward(tensor(), tensor(Max=3.0))}
    write_step(tmp_path / "c" / "step0" / "rank0", both)
    shown = compare(tmp_path / "c", tmp_path / "b")
    assert "      1 fused away" in shown.out


@pytest.mark.parametrize("arguments", [["--step", "7"], ["--rank", "3"]])
def test_nothing_in_common_is_an_error(tmp_path: Path, compare: Compare, arguments: list[str]) -> None:
    shown = compare(written(tmp_path / "a", 1.5), written(tmp_path / "b", 1.5), *arguments)
    assert shown.code == 2
    assert shown.err.endswith("have no such step in common\n")


def test_no_dump_is_an_error(tmp_path: Path, compare: Compare) -> None:
    shown = compare(tmp_path / "a", tmp_path / "b")
    assert (shown.code, shown.out) == (2, "")
    assert "is no folder" in shown.err
