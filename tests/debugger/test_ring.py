"""keep_last through a PrecisionDebugger: a NaN, a request, a signal and a call have the last steps written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger

from .conftest import ENTRIES, Dumped, NewDebugger, forward


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def run(debugger: PrecisionDebugger, model: nn.Module, count: int, **start: Any) -> None:
    for _ in range(count):
        forward(debugger, model, **start)
        debugger.flush()


def why(dumped: Dumped, number: int) -> dict[str, Any]:
    manifest = dumped()[number].manifest
    assert manifest is not None
    told: dict[str, Any] = manifest["flushed"]
    return told


def test_the_steps_before_the_first_nan(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture
) -> None:
    debugger = new_debugger(keep_last=3)
    run(debugger, model, 5, scheduled_tokens={"a": 2})
    assert dumped() == {}
    linear = model[0]  # type: ignore[index]
    with torch.no_grad():
        linear.bias[1] = float("nan")
    run(debugger, model, 3, scheduled_tokens={"a": 1, "b": 1})
    with torch.no_grad():
        linear.bias[1] = 0.0
    run(debugger, model, 3)
    assert list(dumped()) == [3, 4, 5]
    assert [list(step.data) for step in dumped().values()] == [ENTRIES] * 3
    assert all(step.finished for step in dumped().values())
    assert why(dumped, 3) == {
        "on": "nan",
        "step": 5,
        "entry": "Module.0.Linear.forward.0",
        "position": "output.0",
        "requests": ["a", "b"],
    }
    assert "step 5 has a NaN, first in Module.0.Linear.forward.0 output.0 (requests: a, b)" in caplog.text


def test_the_request_in_whose_rows_the_nan_is(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(keep_last=2, task="tensor")
    x = torch.ones(5, 4)
    forward(debugger, model, x, scheduled_tokens={"a": 2, "b": 3})
    x[4, 0] = float("nan")
    forward(debugger, model, x, scheduled_tokens={"a": 2, "b": 3})
    debugger.flush()
    assert list(dumped()) == [0, 1]
    assert why(dumped, 0)["requests"] == ["b"]
    weights = [
        dumped()[number].folder / "dump_tensor_data" / "Module.0.Linear.forward.0.parameters.weight.pt"
        for number in (0, 1)
    ]
    assert torch.equal(torch.load(weights[1]), model[0].weight.detach())  # type: ignore[index]
    assert weights[0].stat().st_ino == weights[1].stat().st_ino


def test_a_nan_in_a_gradient(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(keep_last=1, flush_sites=["backward"])
    for bad in (False, True):
        debugger.start(model)
        loss = model(torch.ones(2, 4)).sum()
        (loss * (float("nan") if bad else 1.0)).backward()
        debugger.stop()
        debugger.step()
    debugger.flush()
    assert list(dumped()) == [1]
    assert why(dumped, 1)["entry"] == next(name for name in dumped()[1].data if "backward" in name)


def test_level_debug_looks_at_what_is_saved(new_debugger: NewDebugger, dumped: Dumped) -> None:
    debugger = new_debugger(keep_last=1, level="debug")
    for value in (1.0, float("inf")):
        debugger.save({"x": torch.tensor([value])}, "loss")
        debugger.step()
    debugger.flush()
    assert list(dumped()) == [1]
    assert (why(dumped, 1)["entry"], why(dumped, 1)["position"]) == ("loss.0.debug", "output.x")


def test_flush_kept(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture
) -> None:
    debugger = new_debugger(keep_last=2, flush_on=["rpc"])
    run(debugger, model, 4)
    debugger.flush_kept()
    assert list(dumped()) == [2, 3]
    run(debugger, model, 1)
    debugger.start(model)
    model(torch.ones(1, 4))
    debugger.flush_kept()
    assert list(dumped()) == [2, 3, 4]
    debugger.stop()
    debugger.step()
    run(debugger, model, 2)
    assert list(dumped()) == [2, 3, 4, 5]  # with the step that ran
    assert dumped()[5].finished
    assert why(dumped, 5)["step"] == 5
    assert "flush_kept() was called" in caplog.text


def test_flush_kept_without_rpc(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture
) -> None:
    debugger = new_debugger(keep_last=2)
    run(debugger, model, 2)
    debugger.flush_kept()
    assert dumped() == {}
    assert 'flush_kept() does nothing, because flush_on in the config does not have "rpc"' in caplog.text


def test_the_end_of_a_request(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(keep_last=2, flush_on=["request"], statistics={"request_id": "mine"})
    run(debugger, model, 2, scheduled_tokens={"other": 2})
    run(debugger, model, 3, scheduled_tokens={"other": 1, "mine-0": 1})
    assert dumped() == {}
    run(debugger, model, 2, scheduled_tokens={"other": 2})
    assert list(dumped()) == [3, 4]
    assert why(dumped, 3) == {"on": "request", "step": 4, "entry": None, "position": None, "requests": ["mine"]}


def test_a_signal(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    debugger = new_debugger(keep_last=2, flush_on=["signal"])
    os.kill(os.getpid(), signal.SIGUSR1)
    run(debugger, model, 3)
    os.kill(os.getpid(), signal.SIGUSR1)
    debugger.flush()
    assert list(dumped()) == [1, 2]
    assert heard == [signal.SIGUSR1] * 2
    assert why(dumped, 2)["on"] == "signal"
    debugger.session.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(heard) == 3


def test_a_signal_that_cannot_be_watched(
    new_debugger: NewDebugger, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=lambda: run(new_debugger(keep_last=1, flush_on=["signal"]), model, 1))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert "SIGUSR1 will not have the steps that are kept written: capture began on another thread" in caplog.text


def test_without_a_signal_in_flush_on_no_handler_is_set(new_debugger: NewDebugger, model: nn.Module) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    run(new_debugger(keep_last=1), model, 1)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("flush_on", "written", "said"),
    [
        (["nan", "signal"], [], "2 steps were kept and none of nan, signal fired, so nothing was written to"),
        (["request"], [1, 2], "request r is over; steps 1, 2 are written to"),
    ],
)
def test_at_the_exit(tmp_path: Path, flush_on: list[str], written: list[int], said: str) -> None:
    config = {"dump_path": str(tmp_path / "dump"), "level": "L1", "keep_last": 2, "flush_on": flush_on}
    config["statistics"] = {"request_id": "r"}
    code = f"""
        import torch
        from msprobe_graph import PrecisionDebugger
        debugger = PrecisionDebugger({json.dumps(config)})
        for _ in range(3):
            debugger.start(scheduled_tokens={{"r": 1}})
            torch.ones(1, 2).exp()
            debugger.stop()
            debugger.step()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stderr
    assert said in output
    assert sorted(int(folder.name[4:]) for folder in (tmp_path / "dump").glob("step*")) == written


def test_a_handler_that_python_cannot_call(
    new_debugger: NewDebugger, model: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)  # set before Python was there
        run(new_debugger(keep_last=1, flush_on=["signal"]), model, 1)
    assert "it has a handler that was not set from Python" in caplog.text
