"""A PrecisionDebugger among others: another in its process, a folder it can't write to, exits and forks."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import msprobe_graph
from msprobe_graph.dump.reader import StepDump, read, steps

from .conftest import Dumped, NewDebugger, forward, hooks


def test_two_debuggers_at_once(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, tmp_path: Path) -> None:
    one, two = new_debugger(level="mix"), new_debugger(level="L1", dump_path=str(tmp_path / "two"))
    one.start(model)
    two.start(model)
    model(torch.ones(1, 4))
    one.stop()
    model(torch.full((1, 4), 2.0))
    two.stop()
    one.step()
    two.step()
    msprobe_graph.flush()
    assert [name for name in dumped()[0].data if name.startswith("Functional")] == [
        "Functional.linear.0.forward",
        "Functional.relu.0.forward",
    ]
    linear = [
        t.record["Max"] for t in dumped("two")[0].tensors() if ".linear." in t.entry and t.position == "input_args.0"
    ]
    assert linear == [1.0, 2.0]
    assert_no_mode_is_left()


def assert_no_mode_is_left() -> None:
    assert torch.overrides._get_current_function_mode() is None


def test_one_after_the_other_on_one_dump_path(new_debugger: NewDebugger, model: nn.Module, tmp_path: Path) -> None:
    """The second is another capture: the first one's steps are moved aside."""
    for level in ("L0", "mix"):
        debugger = new_debugger(level=level)
        forward(debugger, model)
        debugger.flush()
    levels = {path.name == "dump": read(steps(path)[0]).level for path in tmp_path.iterdir()}
    assert levels == {True: "mix", False: "L0"}


def test_a_folder_that_cannot_be_written_to(
    new_debugger: NewDebugger, model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may become so after the settings were checked. The model goes on."""
    debugger = new_debugger(level="mix")
    (tmp_path / "dump").write_text("in the way")
    expected = model(torch.ones(2, 4))
    for _ in range(2):
        assert torch.equal(forward(debugger, model), expected)
    debugger.flush()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert str(tmp_path / "dump") in said[0]
    assert hooks(model) == 0


SCRIPT = """
import sys, torch
from torch import nn
from msprobe_graph import PrecisionDebugger
def main():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    debugger = PrecisionDebugger({"dump_path": sys.argv[1], "level": sys.argv[2]})
    debugger.start(model)
    model(torch.ones(1, 4))
    %s
main()
"""


@pytest.mark.parametrize("level", ["L0", "L1"])
@pytest.mark.parametrize("ending", ["pass", "debugger.stop()", "debugger.stop(); debugger.step()", "1 / 0"])
def test_exit_writes_what_was_captured(tmp_path: Path, level: str, ending: str) -> None:
    script = SCRIPT % ending
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dump"), level],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == (1 if "1 / 0" in ending else 0), finished.stderr
    assert ("Traceback" in finished.stderr) is ("1 / 0" in ending)
    (folder,) = steps(tmp_path / "dump")
    step: StepDump = read(folder)
    assert len(step.data) == (3 if level == "L0" else 2)
    assert step.finished


def test_a_forked_process_captures_nothing(tmp_path: Path) -> None:
    """Its parent's writer does not run in it; it goes on, and says so."""
    ending = (
        "debugger.stop(); debugger.step(); debugger.flush(); import os\n"
        "    if os.fork() == 0:\n"
        "        for _ in range(100):\n"
        "            debugger.start(model); out = model(torch.ones(1, 4)); debugger.stop(); debugger.step()\n"
        "        debugger.flush(); print(out.shape, flush=True); os._exit(0)\n"
        "    os.wait()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT % ending, str(tmp_path / "dump"), "L0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stdout == "torch.Size([1, 4])\n", finished.stderr
    assert "forked" in finished.stderr
    assert len(steps(tmp_path / "dump")) == 1


def test_a_debugger_made_before_the_fork_captures_in_it(tmp_path: Path) -> None:
    script = """
import os, sys, torch
from torch import nn
from msprobe_graph import PrecisionDebugger
debugger = PrecisionDebugger({"dump_path": sys.argv[1], "level": "L0"})
if os.fork() == 0:
    model = nn.ReLU()
    with debugger.start(model):
        model(torch.ones(1))
    os._exit(0)
os.wait()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "dump")], timeout=60, check=True)
    (folder,) = steps(tmp_path / "dump")
    assert list(read(folder).data) == ["Module.ReLU.forward.0"]
