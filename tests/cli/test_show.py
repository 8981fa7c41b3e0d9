"""msprobe-graph show, on dumps made by PrecisionDebugger."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.cli import main

from .conftest import Shown, forward, tensor, write_step

Show = Callable[..., Shown]
COMMAND = [sys.executable, "-m", "msprobe_graph.cli", "show"]


class Divide(nn.Module):
    """Makes a NaN where x is 0, between two layers that don't."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x) + torch.div(x, x.abs()))
        return y


def capture(dump: Path, *batches: torch.Tensor, **start: Any) -> None:
    debugger = PrecisionDebugger({"dump_path": str(dump), "level": "mix"})
    model = Divide()
    for batch in batches:
        with torch.no_grad(), debugger.start(model, **start):
            model(batch)


def test_table(tmp_path: Path, show: Show) -> None:
    capture(tmp_path / "dump", torch.full((2, 4), 3.0))
    shown = show(tmp_path / "dump")
    assert (shown.code, shown.err) == (0, "")
    (row,) = [row for row in shown.rows if "Torch.div.0.forward" in row and "input_args.0" in row]
    assert " ".join(row.split()) == "Torch.div.0.forward input_args.0 [2, 4] float32 3 3 3 8.48528 0 0 0"
    assert "0 of " in shown.out.splitlines()[-1]


def test_head_and_holes(tmp_path: Path, show: Show) -> None:
    capture(tmp_path / "dump", torch.ones(3, 4), scheduled_tokens={"cmpl-1": 2, "cmpl-2": 1})
    out = show(tmp_path / "dump").out
    for fact in (
        "task statistics",
        "level mix",
        "mode eager",
        "model Divide",
        "finished",
        "3 of 4 expected sites captured",
    ):
        assert f"{fact}," in out
    assert "requests: cmpl-1 (rows 0 to 1), cmpl-2 (rows 2 to 2)" in out
    assert "1 hole: Module.unused.Linear (its forward did not run in this step)" in out


def test_origin_of_nan(tmp_path: Path, show: Show) -> None:
    batch = torch.ones(2, 4)
    batch[0, 1] = 0
    capture(tmp_path / "dump", batch)
    shown = show(tmp_path / "dump")
    marks = {tuple(row[4:].split()[:2]): (row[:2].strip(), row.rstrip()) for row in shown.rows}
    mark, row = marks["Torch.div.0.forward", "output.0"]
    assert mark == "!!"
    assert row.endswith("1       0       0  makes the first NaN")
    assert marks["Torch.div.0.forward", "input_args.0"][0] == ""
    assert marks["Module.last.Linear.forward.0", "input_args.0"][0] == "!"
    assert [key for key, (mark, _) in marks.items() if mark == "!!"] == [("Torch.div.0.forward", "output.0")]
    assert shown.out.splitlines()[-1].endswith("suspicious: Torch.div.0.forward makes the first NaN")
    suspicious = show(tmp_path / "dump", "--suspicious").rows
    assert suspicious
    assert all(row.startswith("!") for row in suspicious)


def test_entry(tmp_path: Path, show: Show) -> None:
    capture(tmp_path / "dump", torch.ones(2, 4))
    shown = show(tmp_path / "dump", "--entry", "Module.last")
    assert shown.rows
    assert all(" Module.last.Linear.forward.0 " in row for row in shown.rows)
    nothing = show(tmp_path / "dump", "--entry", "nowhere")
    assert nothing.code == 0
    assert "No tensor in an entry whose name contains 'nowhere'." in nothing.out


def test_steps(tmp_path: Path, show: Show) -> None:
    capture(tmp_path / "dump", torch.ones(2, 4), torch.full((2, 4), 7.0))
    assert "step0/proc" in show(tmp_path / "dump").out
    assert "one of 2 steps (step0, step1)" in show(tmp_path / "dump").out
    second = show(tmp_path / "dump", "--step", 1).out
    assert " 7 " in second
    assert show(tmp_path / "dump" / "step1").out.splitlines()[1:] == second.splitlines()[1:]


def test_rank(tmp_path: Path, show: Show) -> None:
    for rank in (10, 2):
        write_step(tmp_path / "step0" / f"rank{rank}", {f"Torch.op{rank}.0.forward": forward(tensor(), tensor())})
    assert "Torch.op2.0.forward" in show(tmp_path).out
    assert "one of 2 processes (rank2, rank10)" in show(tmp_path).out
    assert "Torch.op10.0.forward" in show(tmp_path, "--rank", 10).out


def test_process_folder_from_inside(tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_step(tmp_path / "step3" / "rank0", {"Torch.abs.0.forward": forward(tensor(), tensor())}))
    assert show(".", "--step", 3).code == 0


def test_unfinished_step(tmp_path: Path, show: Show) -> None:
    debugger = PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "L0"})
    model = Divide()
    debugger.start(model)
    model(torch.ones(1, 4))
    debugger.stop()
    debugger.flush()
    assert "UNFINISHED" in show(tmp_path / "dump").out
    debugger.step()
    debugger.flush()
    assert "UNFINISHED" not in show(tmp_path / "dump").out


def test_saved_tensors(tmp_path: Path, show: Show) -> None:
    debugger = PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "debug"})
    debugger.save(torch.tensor([1.0, float("inf")]), "x")
    debugger.step()
    debugger.flush()
    (row,) = show(tmp_path / "dump").rows
    assert row.startswith("!!  x.0.debug")


@pytest.mark.parametrize(("mode", "checksum"), [("md5", r" [0-9a-f]{8}$"), ("xor", r" - +[0-9]{6,}$")])
def test_checksums(tmp_path: Path, show: Show, mode: str, checksum: str) -> None:
    settings = {"dump_path": str(tmp_path / "dump"), "level": "L1", "statistics": {"summary_mode": mode}}
    with PrecisionDebugger(settings).start(nn.Identity()):
        torch.softmax(torch.ones(3, 3), -1)
    shown = show(tmp_path / "dump")
    assert " md5 " in shown.out
    assert len(shown.rows) == 2
    assert all(re.search(checksum, row) for row in shown.rows)
    assert "0 of 2 tensors suspicious" in shown.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "holds no dump.json"),
        (["dump", "--step", "7"], "dump has no step7: there is step0/rank0"),
        (["dump", "--step", "0", "--rank", "1"], "dump has no step0/rank1: there is step0/rank0"),
        (["broken"], "can't be read as JSON"),
        (["list"], "holds a JSON list: expected an object"),
        (["newer"], "has schema version 99"),
        (["two"], "two holds several dumps: show one of"),
    ],
)
def test_wrong_paths(
    tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments != ["."]:
        write_step(tmp_path / "dump" / "step0" / "rank0", {})
        (write_step(tmp_path / "broken" / "step0" / "rank0", {}) / "dump.json").write_text("{")
        (write_step(tmp_path / "list" / "step0" / "rank0", {}) / "dump.json").write_text("[]")
        write_step(tmp_path / "newer" / "step0" / "rank0", {}, schema_version=99)
        for dump in ("a", "a.20260122T101500Z"):
            write_step(tmp_path / "two" / dump / "step0" / "rank0", {})
    shown = show(*arguments)
    assert shown.code == 2
    assert shown.out == ""
    assert sentence in shown.err
    assert shown.err.startswith("msprobe-graph: ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["show"], ["show", "dump", "--step", "x"], ["print", "dump"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: msprobe-graph" in capsys.readouterr().err


LONG = "Module." + ".".join(f"layer{number}" for number in range(30)) + ".Linear.forward.0"


@pytest.fixture
def long_name(tmp_path: Path) -> Path:
    write_step(tmp_path / "step0" / "rank0", {LONG: forward(tensor(), tensor())})
    return tmp_path


def in_terminal(dump: Path, columns: int) -> list[str]:
    """The lines that the command prints in a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment: Mapping[str, str] = os.environ | {"COLUMNS": str(columns)}
    with subprocess.Popen([*COMMAND, dump], stdout=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                text += chunk
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    return text.decode().splitlines()


def test_long_names_are_whole_in_a_pipe(long_name: Path) -> None:
    environment = os.environ | {"COLUMNS": "40"}
    done = subprocess.run([*COMMAND, long_name], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count(LONG) == 2


def test_long_names_are_fitted_to_a_terminal(long_name: Path) -> None:
    rows = [line for line in in_terminal(long_name, 150) if "Linear" in line]
    assert len(rows) == 2
    assert all("..." in row and len(row) <= 150 for row in rows)
    assert sum(LONG in line for line in in_terminal(long_name, 400)) == 2


def test_a_reader_that_stops_early(long_name: Path) -> None:
    """As in ``msprobe-graph show DUMP | head -1``."""
    data = {f"Torch.abs.{number}.forward": forward(tensor(), tensor()) for number in range(3000)}
    folder = write_step(long_name / "step1" / "rank0", data)
    with subprocess.Popen([*COMMAND, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
