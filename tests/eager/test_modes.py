"""Grad modes, autocast, the program's own modes, other threads; nothing of ours stays behind."""

from __future__ import annotations

import collections
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import read, steps

from ..capturing import LEVELS, Apply, Capture, modules
from .models import Model


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def no_mode_is_left() -> bool:
    from torch.overrides import _get_current_function_mode
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_function_mode() is None and _get_current_dispatch_mode() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("level", LEVELS)
def test_grad_modes(capture: Capture, level: str, mode: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def program() -> None:
        with mode():
            model(torch.ones(2, 3))

    step = capture(model, program, level)
    names = list(step.data)
    if level in ("L0", "mix"):
        assert modules(step) == ["Module.0.Linear.forward.0", "Module.1.ReLU.forward.0", "Module.Sequential.forward.0"]
    if level in ("L1", "mix"):
        assert {"Functional.linear.0.forward", "Functional.relu.0.forward"} <= set(names)
        assert step.data["Functional.relu.0.forward"]["output"][0]["requires_grad"] is (mode is torch.enable_grad)
    if level == "L2":
        assert {name.split(".")[1] for name in names} >= {"relu"}
        assert {"linear", "addmm"} & {name.split(".")[1] for name in names}


def test_autocast(capture: Capture) -> None:
    model = nn.Linear(3, 3)

    def program() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(2, 3))

    step = capture(model, program, "mix")
    entry = step.data["Functional.linear.0.forward"]
    assert entry["input_args"][0]["dtype"] == "torch.float32"
    assert entry["output"][0]["dtype"] == "torch.bfloat16"
    assert step.data["Module.Linear.forward.0"]["parameters"]["weight"]["dtype"] == "torch.float32"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [SeesFunctions, SeesOperators])
def test_modes_of_the_program(tmp_path: Any, level: str, kind: Any) -> None:
    """The program's own mode, pushed above ours: stop() inside it, and its end after that."""
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": level, "risk_level": "ALL"})
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.ones(1, 2)
    for _ in range(2):
        debugger.start(model)
        with kind() as mode:
            model(x)
            inside = mode.seen
            assert inside > 0
            debugger.stop()
            model(x)
            assert mode.seen == 2 * inside
        model(x)
        debugger.step()
    debugger.start(model)
    debugger.stop()
    assert no_mode_is_left()
    debugger.step()
    debugger.flush()
    first, second = (read(folder) for folder in steps(tmp_path)[:2])
    assert list(first.data) == list(second.data)
    assert len(first.data) >= 2
    names = collections.Counter(name.split(".")[1] for name in first.data if not name.startswith("Module"))
    assert max(names.values(), default=1) == 1


@pytest.mark.parametrize("level", LEVELS)
def test_another_thread_runs_undisturbed(capture: Capture, level: str) -> None:
    """Its operators are not seen; its modules are, where they are hooked. Nothing of it breaks our own entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    other = Apply(lambda x: x.cos())
    x = torch.randn(1024, 64)  # large enough for taps of several threads to overlap
    expected, results = model(x), []

    def elsewhere() -> None:
        for _ in range(20):
            results.append(model(x))
            other(x)

    def program() -> None:
        threads = [threading.Thread(target=elsewhere) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            results.append(model(x))
        for thread in threads:
            thread.join()

    step = capture(model, program, level)
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)
    assert not any(".cos." in name for name in step.data)
    if level in ("L1", "mix"):
        assert sum(name.startswith("Functional.linear") and name.endswith("forward") for name in step.data) == 20
    assert step.manifest is not None
    assert step.manifest["holes"] == []
    calls = collections.Counter(name.rsplit(".", 1)[0] for name in modules(step))
    if level in ("L0", "mix"):
        assert calls["Module.0.Linear.forward"] == calls["Module.Sequential.forward"] == 80
    with SeesFunctions() as mode:
        x.cos()
    assert mode.seen == 1  # functions of this thread still ask modes


@pytest.mark.parametrize("level", LEVELS)
def test_the_model_is_left_as_it_was_found(tmp_path: Any, level: str) -> None:
    model = Model()
    before = [dict(module.__dict__) for module in model.modules()]
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": level, "step": [0]})
    debugger.start(model)
    model(torch.randn(2, 6)).sum().backward()
    debugger.stop()
    debugger.step()
    debugger.start(model)  # step 1 is not wanted: every hook goes
    assert no_mode_is_left()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__ == attributes
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())  # type: ignore[attr-defined]
    debugger.flush()
