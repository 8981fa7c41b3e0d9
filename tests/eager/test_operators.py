"""Operators: custom ones, changes in place, aten names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..capturing import LEVELS, Apply, Capture


@torch.library.custom_op("msprobe_graph_capture::scale_into", mutates_args={"out", "count"})
def scale_into(out: Tensor, x: Tensor, factor: float, count: Tensor) -> None:
    out.copy_(x * factor)
    count.add_(1)


@torch.library.custom_op("msprobe_graph_capture::twice", mutates_args={"seen"})
def twice(x: Tensor, seen: Tensor) -> Tensor:
    seen.fill_(5)
    return x * 2


@pytest.mark.parametrize("level", ["L1", "mix", "L2"])
@pytest.mark.parametrize("spelling", ["custom_op", "packet", "overload"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_custom_operator_writes_is_its_output(capture: Capture, level: str, spelling: str, mode: Any) -> None:
    ops = torch.ops.msprobe_graph_capture
    void = {"custom_op": scale_into, "packet": ops.scale_into, "overload": ops.scale_into.default}[spelling]
    both = {"custom_op": twice, "packet": ops.twice, "overload": ops.twice.default}[spelling]

    def program(x: Tensor) -> Tensor:
        out, count = torch.zeros(3), torch.zeros(1)
        void(out, x, factor=3.0, count=count)
        return both(out, count)

    model = Apply(program)
    result = []

    def run() -> None:
        with mode():
            result.append(model(torch.ones(3)))

    step = capture(model, run, level)
    assert torch.equal(result[0], torch.full((3,), 6.0))
    entry = step.data["msprobe_graph_capture.scale_into.0.forward"]
    assert [value["Max"] for value in entry["output"]] == [3.0, 1.0]
    before = [*entry["input_args"], *entry["input_kwargs"].values()]
    assert [value["Max"] for value in before if value["type"] == "torch.Tensor"] == [0.0, 1.0, 0.0]
    entry = step.data["msprobe_graph_capture.twice.0.forward"]
    assert [value["Max"] for value in entry["output"]] == [6.0, 5.0]


@pytest.mark.parametrize("task", ["statistics", "tensor"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_later_change_in_place_alters_nothing(capture: Capture, level: str, task: str) -> None:
    x = torch.ones(3)

    def program(x: Tensor) -> Tensor:
        y = x.exp()
        y.mul_(0)
        x.fill_(7)
        return y

    model = Apply(program)
    step = capture(model, lambda: model(x), level, task=task)
    entry = next((name for name in step.data if ".exp." in name), "Module.Apply.forward.0")
    first = next(tensor for tensor in step.tensors() if tensor.entry == entry)
    assert first.record["Max"] == 1
    if ".exp." in entry:
        assert step.data[entry]["output"][0]["Max"] == pytest.approx(2.718281828, rel=1e-6)
    if task == "tensor":
        assert torch.equal(step.load(first), torch.ones(3))


def test_aten_names_at_L2(capture: Capture) -> None:
    model = nn.Linear(3, 3)

    def program() -> None:
        y = model(torch.ones(2, 3))
        y.mul_(2).sum().backward()

    step = capture(model, program, "L2")
    names = list(step.data)
    assert all(name.startswith("Aten.") and name.endswith(".forward") for name in names)
    assert {"Aten.addmm.0.forward", "Aten.mul.0.forward", "Aten.sum.0.forward", "Aten.mm.0.forward"} <= set(names)
    assert step.construct == {}
    assert step.data["Aten.addmm.0.forward"]["site"] == {"module": "", "number": 0}
