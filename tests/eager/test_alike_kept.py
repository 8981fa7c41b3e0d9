"""What is kept of calls for those of later steps: how long, and when it holds no longer."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import read, steps
from msprobe_graph.dump.records import Step
from msprobe_graph.dump.step_files import StepFiles
from msprobe_graph.taps.likeness import extension
from tests.capturing import Apply

from .alike import Net, captured, input_of, maxima

pytestmark = pytest.mark.skipif(extension() is None, reason="there is no compiled _pattern")


def test_nothing_is_kept_alive(tmp_path: Path) -> None:
    """Not by a weight that knows its module, either; and no frame, with what it holds, outlives its call."""

    def run() -> list[weakref.ref[Any]]:
        model = Net().eval()
        model.first.weight.owner = model.first  # type: ignore[attr-defined, unused-ignore]
        inputs = [input_of(n) for n in range(3)]
        with torch.no_grad():
            captured(model, tmp_path, "mix", [partial(model, x) for x in inputs])
        return [weakref.ref(model.first), *map(weakref.ref, inputs)]

    gone = run()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_no_activation_outlives_its_step(tmp_path: Path) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        local = x + 1
        seen.append(weakref.ref(local))
        return functional.relu(local) * 2

    model = nn.Sequential(Apply(forward), nn.Linear(6, 6))
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "mix"})
    for number in range(4):
        with torch.no_grad(), debugger.start(model):
            model(input_of(number))
        assert seen[-1]() is None


def test_a_weight_written_to_unnoticed_while_its_module_rests(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    def program(number: int) -> None:
        if number == 2:
            model["b"].weight.data.fill_(7)
        for name in "a" if number == 2 else "ab":
            model[name](torch.ones(1, 4))

    with torch.no_grad():
        found = captured(model, tmp_path, "L0", [partial(program, number) for number in range(5)])
    weights = [
        step.data[name]["parameters"]["weight"]["Max"] for step in found for name in step.data if "Module.b" in name
    ]
    assert weights[0] == weights[1] < 1
    assert weights[-2:] == [7, 7]


def test_after_a_step_that_was_dropped(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    for dump in (False, True, True):
        with torch.no_grad():
            debugger.start(model)
            model(torch.ones(1, 4))
            debugger.stop()
        debugger.step(dump)
    debugger.flush()
    for folder in steps(tmp_path):
        assert read(folder).data["Module.Linear.forward.0"]["parameters"]["weight"]["Max"] == model.weight.max().item()


def test_an_entry_that_waits_to_be_written_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where outputs become unlike and raise in turn, and nothing is written before the last step."""
    gate, take_step = threading.Event(), StepFiles.take_step

    def take_late(self: StepFiles, step: Step) -> None:
        gate.wait(60)
        take_step(self, step)

    monkeypatch.setattr(StepFiles, "take_step", take_late)

    def forward(x: torch.Tensor, number: int) -> torch.Tensor:
        if number == 5:
            raise ValueError("five")
        return (x + number).to(torch.complex64) if number == 2 else x + number

    numbers = [0, 1, 2, 3, 4, 5, 6, 7]
    state = iter(numbers)
    model = Apply(lambda x: forward(x, next(state)))

    def program() -> None:
        with torch.no_grad(), contextlib.suppress(ValueError):
            model(torch.zeros(2, 4))

    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    for _ in numbers:
        debugger.start(model)
        program()
        debugger.stop()
        debugger.step()
    gate.set()
    debugger.flush()
    found = [read(folder) for folder in steps(tmp_path)]
    assert maxima(found, "Module.Apply.forward.0") == [0, 1, 2, 3, 4, None, 6, 7]


def test_a_step_that_ends_inside_of_a_call(tmp_path: Path) -> None:
    inside: list[PrecisionDebugger] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        for debugger in inside:
            debugger.step()
        return x + 1

    model = Apply(forward)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    with torch.no_grad():
        for number in range(9):
            inside[:] = [debugger] * (number > 2)
            debugger.start(model)
            model(torch.full((2, 2), float(number)))
            debugger.stop()
            if not inside:
                debugger.step()
    debugger.step()
    debugger.flush()
    seen = [
        (entry["input_args"][0]["Max"], entry["output"][0]["Max"])
        for folder in steps(tmp_path)
        for entry in read(folder).data.values()
    ]
    assert seen == [(number, number + 1) for number in range(9)]


@pytest.mark.parametrize("odd", ["sparse", "freed", "nested", "cyclic", "without memory"])
def test_values_that_can_not_be_measured(odd: str, tmp_path: Path) -> None:
    """Now and then: they have a record with the reason, in each step the same holes, and the others are right."""
    freed = torch.ones(4, 4)
    freed.untyped_storage().resize_(0)
    cycle: dict[str, Any] = {"x": torch.ones(4, 4)}
    cycle["self"] = cycle
    values: dict[str, Any] = {
        "sparse": torch.ones(4, 4).to_sparse(),
        "freed": freed,
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "cyclic": cycle,
        "without memory": nn.Parameter(freed),
    }
    model = Apply(lambda x: 1)
    order = [values[odd], values[odd], torch.ones(4, 4), torch.zeros(4, 4), values[odd]]
    with torch.no_grad():
        found = captured(model, tmp_path, "L0", [partial(model, value) for value in order])
    assert len(found) == 5
    arguments = [step.data["Module.Apply.forward.0"]["input_args"][0] for step in found]
    assert [argument["Max"] for argument in arguments[2:4]] == [1, 0]
    assert arguments[0] == arguments[1] == arguments[4]
    holes = [[hole["reason"] for hole in step.manifest["holes"]] for step in found]
    assert holes[0] == holes[1] == holes[4]


def test_the_two_zeros_are_not_alike(tmp_path: Path) -> None:
    model = Apply(lambda x: x)
    order = [0.0, 0.0, -0.0, 0.0, -0.0]
    found = captured(model, tmp_path, "L0", [partial(model, value) for value in order])
    seen = [step.data["Module.Apply.forward.0"]["input_args"][0]["value"] for step in found]
    assert [math.copysign(1, value) for value in seen] == [1, 1, -1, 1, -1]


def test_an_exception_that_is_being_handled_is_let_go(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})

    def attempt() -> weakref.ref[torch.Tensor]:
        local = torch.ones(1, 4)
        try:
            raise MemoryError(local)
        except MemoryError:
            with torch.no_grad(), debugger.start(model):
                model(local)
        return weakref.ref(local)

    gone = [attempt() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
