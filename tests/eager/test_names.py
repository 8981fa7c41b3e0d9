"""What entries are named, where they are placed, and the parts they have."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..capturing import Apply, Capture, modules, norms
from .models import Model, Residual


def test_root_is_an_entry_and_a_module_used_twice_is_numbered(capture: Capture) -> None:
    model = Residual()
    x = torch.randn(2, 6)
    step = capture(model, lambda: model(x), "L0")
    assert list(step.data) == [
        "Module.norm.LayerNorm.forward.0",
        "Module.fc.Linear.forward.0",
        "Module.fc.Linear.forward.1",
        "Module.Residual.forward.0",
    ]
    assert step.construct == {
        **dict.fromkeys(step.data, "Module.Residual.forward.0"),
        "Module.Residual.forward.0": None,
    }
    assert step.data["Module.fc.Linear.forward.1"]["site"] == {"module": "fc", "number": 1}
    assert list(step.data["Module.fc.Linear.forward.0"]) == [
        "input_args",
        "input_kwargs",
        "output",
        "parameters",
        "site",
    ]
    assert list(step.data["Module.fc.Linear.forward.0"]["parameters"]) == ["weight", "bias"]
    with torch.no_grad():
        exact = model.norm(x).double()
    assert norms(step)["Module.norm.LayerNorm.forward.0"] == pytest.approx(exact.norm().item(), rel=1e-6)


def test_a_shared_module_bears_its_first_name(capture: Capture) -> None:
    model = nn.Sequential(nn.ReLU())
    model.append(model[0])
    step = capture(model, lambda: model(torch.ones(1)), "L0")
    assert modules(step) == ["Module.0.ReLU.forward.0", "Module.0.ReLU.forward.1", "Module.Sequential.forward.0"]


def test_calls_are_placed_in_their_modules(capture: Capture) -> None:
    model = Model().eval()
    step = capture(model, lambda: model(torch.randn(2, 6)), "mix")
    construct, parents = step.construct, {}
    for name in step.data:
        if name.startswith("Torch.tanh"):
            parents[name] = construct[name]
    assert parents == {
        "Torch.tanh.0.forward": "Module.blocks.0.Residual.forward.0",
        "Torch.tanh.1.forward": "Module.blocks.1.Residual.forward.0",
    }
    linear = step.data["Functional.linear.3.forward"]
    assert linear["site"] == {"module": "blocks.1.fc", "number": 1}
    assert construct["Functional.linear.3.forward"] == "Module.blocks.1.fc.Linear.forward.1"
    order = list(step.data)  # an entry is placed when its call ends: children precede parents
    assert all(order.index(name) < order.index(parent) for name, parent in construct.items() if parent)
    frames = {entry: frames for entries, frames in step.stack.values() for entry in entries}
    assert set(frames) >= {name for name in order if name.endswith("forward")}
    assert "in forward, \n return x + self.fc" in frames["Torch.tanh.0.forward"][0]
    assert not any("msprobe_graph" in line and "/tests/" not in line for line in frames["Torch.tanh.0.forward"])


def test_list_of_models(capture: Capture) -> None:
    models = [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]
    step = capture(models, lambda: models[1](models[0](torch.ones(1, 2))), "L0")
    assert modules(step) == [
        "Module.0.Linear.forward.0",
        "Module.1.0.Linear.forward.0",
        "Module.1.Sequential.forward.0",
    ]


def test_arguments_by_keyword_alone(capture: Capture) -> None:
    model = Apply(lambda *, x, scale: x * scale)
    step = capture(model, lambda: model(x=torch.ones(3), scale=2.0), "mix")
    entry = step.data["Module.Apply.forward.0"]
    assert entry["input_args"] == []
    assert entry["input_kwargs"]["x"]["Norm"] == pytest.approx(3**0.5)
    assert entry["input_kwargs"]["scale"] == {"type": "float", "value": 2.0}


def test_nested_outputs(capture: Capture) -> None:
    Pair = collections.namedtuple("Pair", "low high")

    @dataclasses.dataclass
    class Answer:
        logits: Tensor
        extra: Any

    model = Apply(lambda x: Answer(x + 1, {"pair": Pair(x + 2, [x + 3]), "none": None}))
    step = capture(model, lambda: model(torch.zeros(4)), "L0")
    seen = {t.position: t.record["Max"] for t in step.tensors() if t.position.startswith("output")}
    assert seen == {"output.0.logits": 1, "output.0.extra.pair.low": 2, "output.0.extra.pair.high.0": 3}
    assert step.data["Module.Apply.forward.0"]["output"][0]["extra"]["none"] is None


def test_modules_that_did_not_run_are_holes(capture: Capture) -> None:
    model = Residual()
    model.unused = nn.Linear(1, 1)
    step = capture(model, lambda: model(torch.ones(1, 6)), "L0")
    assert step.manifest is not None
    assert step.manifest["sites"] == {"expected": 4, "captured": 3}
    assert step.manifest["holes"] == [
        {"site": "Module.unused.Linear", "reason": "its forward did not run in this step"}
    ]
