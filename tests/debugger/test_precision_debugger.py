"""The life of a PrecisionDebugger: which steps are captured, under which number, and when they are on disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import msprobe_graph
from msprobe_graph import PrecisionDebugger
from msprobe_graph.config import ConfigError, watch
from msprobe_graph.dump.reader import StepDump, read, steps

from .conftest import Dumped, NewDebugger

ENTRIES = ["Module.0.Linear.forward.0", "Module.1.ReLU.forward.0", "Module.Sequential.forward.0"]


def forward(debugger: PrecisionDebugger, model: nn.Module, x: torch.Tensor | None = None, **start: Any) -> torch.Tensor:
    """One whole step."""
    debugger.start(model, **start)
    out = model(torch.ones(2, 4) if x is None else x)
    debugger.stop()
    debugger.step()
    assert isinstance(out, torch.Tensor)
    return out


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_each_step_has_its_folder(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    for number in range(3):
        forward(debugger, model, torch.full((2, 4), float(number)))
    debugger.flush()
    found = dumped()
    assert list(found) == [0, 1, 2]
    for number, step in found.items():
        assert list(step.data) == ENTRIES
        assert step.finished
        assert next(step.tensors()).record["Max"] == number
        assert step.folder.name == f"proc{os.getpid()}"


def test_nothing_is_captured_after_stop(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    debugger.start(model)
    model(torch.ones(1, 4))
    debugger.stop()
    model(torch.ones(1, 4))
    debugger.start()  # the model is known, and the step goes on
    model(torch.ones(1, 4))
    debugger.stop()
    debugger.step()
    debugger.flush()
    assert [name for name in dumped()[0].data if "Linear" in name] == [
        "Module.0.Linear.forward.0",
        "Module.0.Linear.forward.1",
    ]


def test_steps_are_counted_while_capture_is_off(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    for number in range(4):
        if number == 2:
            forward(debugger, model)
        else:
            model(torch.ones(1, 4))
            debugger.step()
    debugger.flush()
    assert list(dumped()) == [2]


def test_step_without_stop_goes_on_in_the_next(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    debugger.start(model)
    for _ in range(2):
        model(torch.ones(1, 4))
        debugger.step()
    debugger.stop()
    debugger.flush()
    assert [list(dumped()[number].data) for number in (0, 1)] == [ENTRIES, ENTRIES]


def test_step_list(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(step=[1, "3-4"])
    hooked = []
    for _ in range(7):
        debugger.start(model)
        hooked.append(hooks(model) > 0)
        model(torch.ones(1, 4))
        debugger.stop()
        debugger.step()
    debugger.flush()
    assert list(dumped()) == [1, 3, 4]
    assert hooked == [False, True, False, True, True, False, False]  # disabled means gone


@pytest.mark.parametrize(("rank_id", "captured"), [(0, False), (2, True), (None, False)])
def test_rank_list(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, rank_id: int | None, captured: bool
) -> None:
    debugger = new_debugger(rank=["2-3"])
    forward(debugger, model, rank_id=rank_id)
    debugger.flush()
    found = dumped()
    assert bool(found) is captured
    if captured:
        assert found[0].folder.name == "rank2"


@pytest.mark.parametrize("level", ["L0", "L1"])
def test_token_range(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, level: str) -> None:
    debugger = new_debugger(level=level)
    for _ in range(2):
        debugger.start(model, token_range=[1, 2])
        torch.ones(3).exp()  # outside any forward
        for token in range(5):
            model(torch.full((1, 4), float(token)))
        debugger.stop()
        debugger.step()
    forward(debugger, model)  # and without it all is captured again
    debugger.flush()
    for step in (0, 1):
        seen = [
            t.record["Max"] for t in dumped()[step].tensors() if "inear" in t.entry and t.position == "input_args.0"
        ]
        assert seen == [1.0, 2.0]
        assert not any("exp" in entry for entry in dumped()[step].data)
    assert len(dumped()[2].data) == (3 if level == "L0" else 2)


def test_requests_are_named_with_their_rows(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    forward(debugger, model, torch.ones(5, 4), scheduled_tokens={"a": 2, "b": 3})
    forward(debugger, model, torch.ones(1, 4), scheduled_tokens={"b": 1})
    debugger.flush()
    told = [dumped()[step].manifest for step in (0, 1)]
    assert told[0] is not None
    assert told[1] is not None
    assert told[0]["requests"] == [
        {"request": "a", "begin": 0, "end": 2},
        {"request": "b", "begin": 2, "end": 5},
    ]
    assert told[1]["requests"] == [{"request": "b", "begin": 0, "end": 1}]


def test_request_id_keeps_one_requests_rows(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(task="tensor", tensor={"request_id": "b"})
    rows = torch.arange(5.0)[:, None].expand(5, 4).contiguous()
    forward(debugger, model, rows, scheduled_tokens={"a": 2, "b-7f": 2, "c": 1})
    forward(debugger, model, rows, scheduled_tokens={"a": 5})  # not in the batch
    forward(debugger, model, rows, scheduled_tokens={"c": 1, "b": 4})
    debugger.flush()
    found = dumped()
    assert list(found) == [0, 2]
    for step, expected in ((0, rows[2:4]), (2, rows[1:5])):
        first = next(found[step].tensors())
        assert first.record["shape"] == list(expected.shape)
        assert torch.equal(found[step].load(first), expected)
        weight = next(tensor for tensor in found[step].tensors() if tensor.position == "parameters.weight")
        assert weight.record["shape"] == [4, 4]  # no batch: whole


def test_slice(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(statistics={"slice": [{"dim": 0, "begin": 1, "end": 3, "size": 8}]})
    forward(debugger, model, torch.arange(8.0)[:, None].expand(8, 4))
    debugger.flush()
    first, *_, last = dumped()[0].tensors()
    assert (first.record["shape"], first.record["Min"], first.record["Max"]) == ([2, 4], 1.0, 2.0)
    assert last.record["shape"] == [2, 4]


def test_context_manager(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    for _ in range(2):
        with debugger.start(model):
            model(torch.ones(1, 4))
    assert [step.finished for step in dumped().values()] == [True, True]  # without flush()


def test_context_manager_with_an_exception(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    with pytest.raises(RuntimeError, match="shapes"), debugger.start(model):
        model(torch.ones(1, 3))
    with debugger.start(model):
        model(torch.ones(1, 4))
    assert list(dumped()) == [0, 1]
    assert list(dumped()[1].data) == ENTRIES


def test_flush_in_the_middle_of_a_step(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    debugger.start(model)
    model(torch.ones(1, 4))
    debugger.flush()
    assert not dumped()[0].finished
    assert list(dumped()[0].data) == ENTRIES
    model(torch.ones(1, 4))
    debugger.stop()
    debugger.step()
    msprobe_graph.flush()  # of all debuggers
    assert dumped()[0].finished
    assert len(dumped()[0].data) == 2 * len(ENTRIES)


def test_stop_alone_is_written_soon_as_unfinished(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    debugger.start(model)
    model(torch.ones(1, 4))
    debugger.stop()
    until(lambda: bool(dumped()))
    assert not dumped()[0].finished
    assert list(dumped()[0].data) == ENTRIES
    debugger.step()
    debugger.flush()
    assert dumped()[0].finished


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_level_debug_saves_what_it_is_given(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(level="debug", task="tensor")
    x = torch.randn(3)
    kept = x.clone()
    debugger.start(model)
    debugger.save(x, "x")
    x.zero_()
    debugger.save({"deep": [x, 2]}, "x")
    debugger.save(x, "a.b")
    model(torch.ones(1, 4))
    debugger.stop()
    debugger.step()
    debugger.save(x, "x")
    debugger.step()
    debugger.flush()
    step = dumped()[0]
    written = json.loads((step.folder / "debug.json").read_text())["data"]
    assert list(written) == ["x.0.debug", "x.1.debug", "a.b.0.debug"]
    assert written["x.0.debug"]["Norm"] == pytest.approx(kept.norm().item())
    assert written["x.1.debug"]["deep"][1] == {"type": "int", "value": 2}
    assert json.loads((step.folder / "dump.json").read_text())["data"] == {}
    saved = torch.load(step.folder / "dump_tensor_data" / written["x.0.debug"]["data_name"])
    assert torch.equal(saved, kept)
    assert list(json.loads((dumped()[1].folder / "debug.json").read_text())["data"]) == ["x.0.debug"]
    assert hooks(model) == 0


def test_save_is_for_level_debug_alone(new_debugger: NewDebugger, dumped: Dumped) -> None:
    debugger = new_debugger()
    debugger.save(torch.ones(1), "x")
    debugger.step()
    debugger.flush()
    assert dumped() == {}


def test_max_steps(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture
) -> None:
    debugger = new_debugger(max_steps=2, step=["1-9"])
    for _ in range(5):
        forward(debugger, model)
    debugger.flush()
    assert list(dumped()) == [1, 2]
    assert hooks(model) == 0
    assert sum("max_steps (2) is reached" in record.getMessage() for record in caplog.records) == 1
    told = {number: step.manifest for number, step in dumped().items()}
    assert told[1] is not None
    assert told[2] is not None
    assert told[1]["holes"] == []
    assert told[2]["holes"] == [{"site": "later steps", "reason": "max_steps (2) is reached"}]


@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_max_bytes(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture, task: str
) -> None:
    debugger = new_debugger(max_bytes="20kB", task=task)
    for _ in range(50):
        forward(debugger, model)
        debugger.flush()
    found = dumped()
    assert 1 <= len(found) < 20
    assert all(step.finished for step in found.values())
    assert sum("max_bytes (20000) is reached" in record.getMessage() for record in caplog.records) == 1
    ended = {"site": "later steps", "reason": "max_bytes (20000) is reached"}
    saying = [number for number, step in found.items() if step.manifest is not None and ended in step.manifest["holes"]]
    assert saying == [max(found)]
    # A tensor that is not on disk has no data_name, and a hole.
    names = [tensor.record["data_name"] for tensor in found[max(found)].tensors() if "data_name" in tensor.record]
    assert all((found[max(found)].folder / "dump_tensor_data" / name).exists() for name in names)


def test_dump_enable_switches_a_running_program(
    tmp_path: Path, model: nn.Module, dumped: Dumped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0)
    config = tmp_path / "config.json"
    settings = {"dump_path": str(tmp_path / "dump"), "level": "L0"}

    def switch(on: bool) -> None:
        config.write_text(json.dumps({**settings, "dump_enable": on}) + " " * on)

    switch(False)
    debugger = PrecisionDebugger(config)
    for on in (False, True, True, False, True):
        switch(on)
        forward(debugger, model)
        assert bool(hooks(model)) is on
    debugger.flush()
    assert list(dumped()) == [1, 2, 4]
    assert all(list(step.data) == ENTRIES for step in dumped().values())


def test_list_of_models(new_debugger: NewDebugger, dumped: Dumped) -> None:
    models = [nn.Linear(4, 4), nn.Sequential(nn.ReLU())]
    debugger = new_debugger()
    debugger.start(models)
    models[1](models[0](torch.ones(1, 4)))
    debugger.stop()
    debugger.step()
    debugger.flush()
    assert list(dumped()[0].data) == [
        "Module.0.Linear.forward.0",
        "Module.1.0.ReLU.forward.0",
        "Module.1.Sequential.forward.0",
    ]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({}, r"start\(\) needs the model at level L0: start\(model\) or start\(\[model, ...\]\)"),
        ({"model": []}, r"start\(\) needs the model at level L0"),
        ({"model": 3}, r"start\(\) got a int as model; it takes an nn.Module or a list of them"),
        ({"model": "model"}, r"start\(\) got a str as model"),
        ({"model": [nn.ReLU(), None]}, r"start\(\) got a NoneType as model"),
        ({"model": nn.ReLU(), "token_range": [1]}, r"token_range \[1\]; it takes two numbers, \[first, last\]"),
        ({"model": nn.ReLU(), "token_range": [3, 1]}, r"token_range \[3, 1\]; it takes"),
        ({"model": nn.ReLU(), "token_range": 3}, r"token_range 3; it takes"),
        ({"model": nn.ReLU(), "token_range": ["a", "b"]}, r"token_range \['a', 'b'\]; it takes"),
    ],
)
def test_wrong_arguments_of_start(new_debugger: NewDebugger, dumped: Dumped, start: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said) as raised:
        new_debugger().start(**start)
    assert "\n" not in str(raised.value)
    assert dumped() == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "dump_path is missing"),
        (
            {"config_path": {"dump_path": "d", "levle": "L0"}},
            'unknown key "levle" in the top level, did you mean level',
        ),
        ({"config_path": "nowhere.json"}, "nowhere.json: the config file cannot be read"),
        ({"config_path": {"dump_path": "d"}, "level": "L9"}, 'level is "L9"; it must be one of'),
        ({"dump_path": "d", "step": ["x"]}, r"step is \[\"x\"\]; it must be"),
        ({"config_path": {"dump_path": "d", "operators": {"remove": ["Tensor.mull"]}}}, "did you mean 'Tensor.mul'"),
    ],
)
def test_wrong_arguments_of_the_constructor(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        PrecisionDebugger(**arguments)
    assert "\n" not in str(raised.value)


def test_arguments_override_the_file(tmp_path: Path, model: nn.Module, dumped: Dumped) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"dump_path": str(tmp_path / "other"), "level": "L1", "task": "statistics"}))
    debugger = PrecisionDebugger(config, task="tensor", dump_path=str(tmp_path / "dump"), level="L0", step=[0])
    forward(debugger, model)
    debugger.flush()
    assert (dumped()[0].task, dumped()[0].level) == ("tensor", "L0")
    assert not (tmp_path / "other").exists()


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
