"""The life of a PrecisionDebugger: which steps are captured, under which number, and when they are on disk."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import msprobe_graph
from msprobe_graph.debugger.session import Session
from msprobe_graph.dump import writer
from msprobe_graph.dump.records import Step

from .conftest import ENTRIES, Dumped, NewDebugger, forward, hooks


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


def test_a_step_that_goes_on_waits_for_what_is_written_of_it(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk after stop() is what came before it, however slowly that is put together."""
    as_step, begun = Session._as_step, threading.Event()

    def slow(session: Session, finished: bool) -> Step:
        if not finished:
            begun.set()
            time.sleep(0.2)
        return as_step(session, finished)

    monkeypatch.setattr(Session, "_as_step", slow)
    monkeypatch.setattr(writer, "DRAFT_SECONDS", 0.01)
    debugger = new_debugger()
    debugger.start(model)
    model(torch.ones(1, 4))
    debugger.stop()
    assert begun.wait(20)
    debugger.start()
    model(torch.ones(1, 4))
    debugger.session.wait(0)
    (step,) = dumped().values()
    assert (list(step.data), step.finished) == (ENTRIES, False)


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
