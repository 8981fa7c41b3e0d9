"""The gradients of what save() was given."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from .conftest import Dumped, NewDebugger


def written(dumped: Dumped, step: int = 0) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((dumped()[step].folder / "debug.json").read_text())["data"]
    return data


def test_a_gradient_that_comes_within_the_step(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(level="debug", task="tensor")
    x = torch.randn(2, 4, requires_grad=True)
    hidden = model(x)
    debugger.save(hidden, "hidden")
    debugger.save([x, {"scale": 2.0, "mask": torch.ones(2)}], "nest")
    (hidden * torch.arange(hidden.numel()).view_as(hidden)).sum().backward()
    debugger.step()
    debugger.flush()
    found = written(dumped)
    assert list(found) == ["hidden.0.debug", "hidden_grad.0.debug", "nest.0.debug", "nest_grad.0.debug"]
    gradient = torch.arange(hidden.numel(), dtype=torch.float64)
    assert found["hidden_grad.0.debug"]["Norm"] == pytest.approx(gradient.norm().item())
    assert found["hidden_grad.0.debug"]["data_name"] == "hidden_grad.0.debug.pt"
    file = dumped()[0].folder / "dump_tensor_data" / "nest_grad.0.debug.0.pt"
    assert torch.equal(torch.load(file), x.grad if x.grad is not None else torch.empty(0))
    assert found["nest_grad.0.debug"][1] == {"scale": None, "mask": None}


def test_a_gradient_that_comes_too_late(new_debugger: NewDebugger, dumped: Dumped) -> None:
    debugger = new_debugger(level="debug")
    x = torch.ones(3, requires_grad=True)
    debugger.save(x, "x")
    debugger.step()
    (x * 2).sum().backward()
    debugger.save(x, "x", save_backward=False)
    debugger.step()
    debugger.flush()
    assert written(dumped)["x_grad.0.debug"] is None
    assert list(written(dumped, 1)) == ["x.0.debug"]
    assert torch.equal(x.grad if x.grad is not None else torch.empty(0), torch.full((3,), 2.0))


def test_what_can_have_no_gradient_has_no_entry_for_it(new_debugger: NewDebugger, dumped: Dumped) -> None:
    debugger = new_debugger(level="debug")
    debugger.save([torch.ones(3), 1], "x")
    with torch.no_grad():
        debugger.save(torch.ones(3, requires_grad=True) * 2, "y")
    debugger.step()
    debugger.flush()
    assert list(written(dumped)) == ["x.0.debug", "y.0.debug"]
