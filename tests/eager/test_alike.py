"""Steps whose calls are like those of the step before hold what a capture of that step alone holds."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.dump.records import Step
from msprobe_graph.dump.step_files import StepFiles
from msprobe_graph.taps.likeness import extension
from msprobe_graph.taps.recorder import Recorder
from tests.capturing import Apply, capture_into

pytestmark = pytest.mark.skipif(extension() is None, reason="there is no compiled _pattern")

Program = Callable[[nn.Module, int], object]
"""Runs the model as a step of that number does."""


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step of each value that is described."""
    steps_of_values: list[int] = []
    value = Recorder.value
    monkeypatch.setattr(
        Recorder, "value", lambda self, *args: steps_of_values.append(self._number) or value(self, *args)
    )
    return steps_of_values


class Net(nn.Module):
    """With a module that is called twice, a buffer, an output that is a tuple, and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.twice = nn.Linear(6, 6, bias=False)
        self.last = Apply(lambda x, scale=1.0, extra=None: (x * scale, x if extra is None else x + extra))

    def forward(self, x: torch.Tensor, scale: float = 1.0, depth: int = 1) -> Any:
        x = functional.relu(self.norm(self.first(x)))
        for _ in range(depth):
            x = self.twice(self.twice(x))
        return self.last(x, scale=scale, extra={"a": x}["a"])


def captured(model: nn.Module, folder: Path, level: str, programs: Iterable[Callable[[], object]]) -> list[StepDump]:
    """Steps of one capture, each begun in the same line."""
    debugger = PrecisionDebugger({"dump_path": str(folder), "level": level, "risk_level": "ALL"})
    for program in programs:
        with debugger.start(model):
            program()
    debugger.flush()
    debugger.session.close()
    return [read(each) for each in steps(folder)]


def check(folder: Path, level: str, program: Program, count: int = 4) -> list[StepDump]:
    """Run `count` steps in one capture, and each in a capture of its own: they hold the same."""
    torch.manual_seed(0)
    model, alone = Net().eval(), Net().eval()
    alone.load_state_dict(model.state_dict())
    found = captured(model, folder / "together", level, ((lambda n=n: program(model, n)) for n in range(count)))
    for number, step in enumerate(found):
        expected = capture_into(folder / f"alone{number}", alone, lambda n=number: program(alone, n), level)
        assert step.data == expected.data
        assert step.construct == expected.construct
    return found


def input_of(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 6)), generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_other_values(level: str, tmp_path: Path) -> None:
    with torch.no_grad():
        found = check(tmp_path, level, lambda model, n: model(input_of(n)))
    norms = {next(step.tensors()).record["Norm"] for step in found}
    assert len(norms) == len(found)


AGAIN = input_of(0, 7, 6)
PROGRAMS: dict[str, Program] = {
    "other shapes": lambda model, n: model(input_of(n, 2 + n // 2, 6)),
    "other arguments": lambda model, n: model(input_of(n), scale=0.5 * (n // 2)),
    "more calls": lambda model, n: model(input_of(n), depth=1 + n % 2),
    "not contiguous": lambda model, n: model(input_of(n, 6, 3).t() if n % 2 else input_of(n)),
    "not finite": lambda model, n: model(torch.full((3, 6), (1.0, float("nan"), float("inf"), 2.0)[n % 4])),
    "a tensor again": lambda model, n: model(AGAIN),
    "float64": lambda model, n: model.to(torch.float32 if n % 2 else torch.float64)(
        input_of(n).to(torch.float32 if n % 2 else torch.float64)
    ),
    "half of it only": lambda model, n: model(input_of(n)) if n % 2 else model.first(input_of(n)),
    "empty": lambda model, n: model.first(torch.empty(0, 6)),
}


@pytest.mark.parametrize("level", ["L0", "mix"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_other_calls(name: str, level: str, tmp_path: Path) -> None:
    with torch.no_grad():
        check(tmp_path, level, PROGRAMS[name], count=5)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_inference_mode(level: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        check(tmp_path, level, lambda model, n: model(input_of(n)))


def test_weights_that_are_written_to(tmp_path: Path) -> None:
    def program(model: nn.Module, number: int) -> None:
        assert isinstance(model, Net)
        if number == 2:
            model.first.weight.mul_(2)
        if number == 3:
            model.twice.weight.data.fill_(0.25)  # which its version counter does not see
        if number == 5:
            model.first.bias = nn.Parameter(torch.ones(6))
        model(input_of(number))

    with torch.no_grad():
        check(tmp_path, "mix", program, count=7)


def test_gradients_now_and_then(tmp_path: Path) -> None:
    """Calls that autograd records are described anew; those without gradients in between are like earlier ones."""

    def program(model: nn.Module, number: int) -> None:
        with torch.set_grad_enabled(number % 3 == 2):
            outputs = model(input_of(number))
            if number % 3 == 2:
                outputs[0].sum().backward()

    found = check(tmp_path, "mix", program, count=6)
    assert any(name.endswith("backward.0") or ".backward" in name for name in found[2].data)
    assert not any(".backward" in name for name in found[3].data)


def test_a_call_that_raises(tmp_path: Path) -> None:
    """What it was given is there, and nothing of what its earlier call returned."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] > 1:
            raise ValueError("too large")
        return x + 1

    model = nn.Sequential(Apply(forward))

    def program(value: float) -> None:
        with torch.no_grad(), contextlib.suppress(ValueError):
            model(torch.full((2, 2), value))

    found = captured(model, tmp_path, "L0", ((lambda v=v: program(v)) for v in (0.0, 1.0, 2.0, 0.5)))
    name = "Module.0.Apply.forward.0"
    assert [step.data[name].get("output") is None for step in found] == [False, False, True, False]
    assert [step.data[name]["input_args"][0]["Max"] for step in found] == [0.0, 1.0, 2.0, 0.5]
    assert found[3].data[name]["output"][0]["Max"] == 1.5


def test_a_call_from_another_line_has_its_own_stack(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)

    def forward(x: torch.Tensor, way: bool) -> torch.Tensor:
        if way:
            return layer(x)
        return layer(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, way: bool) -> torch.Tensor:
            return forward(x, way)

    model = Model()
    with torch.no_grad():
        found = captured(
            model, tmp_path, "L0", ((lambda way=way: model(torch.ones(1, 4), way)) for way in (True, True, False, True))
        )
    stacks = [
        next(frames for names, frames in step.stack.values() if "Module.layer.Linear.forward.0" in names)
        for step in found
    ]
    assert stacks[0] == stacks[1] == stacks[3] != stacks[2]


def test_one_value_in_two_places_that_part(tmp_path: Path) -> None:
    """What was one tensor in the step before are two in this one: each record has its own."""
    big = 256
    model = Apply(lambda x, y: x + y)

    def program(same: bool) -> None:
        x = torch.ones(big, big)
        model(x, x if same else torch.full((big, big), 3.0))

    found = captured(model, tmp_path, "L0", ((lambda s=s: program(s)) for s in (True, True, False, True)))
    seen = [[arg["Max"] for arg in step.data["Module.Apply.forward.0"]["input_args"]] for step in found]
    assert seen == [[1.0, 1.0], [1.0, 1.0], [1.0, 3.0], [1.0, 1.0]]


def test_a_large_input_of_several_steps(tmp_path: Path) -> None:
    """One that comes back after a step with another keeps its own statistics."""
    model = nn.Sequential(nn.ReLU())
    inputs = [torch.full((256, 256), float(value)) for value in range(3)]
    order = [0, 0, 1, 0, 2, 1, 0]
    with torch.no_grad():
        found = captured(model, tmp_path, "mix", ((lambda n=n: model(inputs[n])) for n in order))
    assert [step.data["Module.Sequential.forward.0"]["input_args"][0]["Max"] for step in found] == order


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "pair", "named"]), st.integers(1, 3), st.sampled_from([None, 1, 2.5, "a"])),
        min_size=2,
        max_size=6,
    )
)
def test_any_order_of_calls(tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, int, Any]]) -> None:
    def program(model: nn.Module, number: int) -> None:
        kind, rows, extra = calls[number]
        x = input_of(number, rows, 6)
        assert isinstance(model, Net)
        if kind == "pair":
            model.first(x)
            model.last(model.first(x), extra=x)
        elif kind == "named":
            model.last(x, scale=2.0 if extra is None else 3.0)
        else:
            model(x)

    with torch.no_grad():
        check(tmp_path_factory.mktemp("calls"), "mix", program, count=len(calls))


def test_nothing_is_described_anew_where_nothing_changes(tmp_path: Path, described: list[int]) -> None:
    """That these tests test something: in the third step no value is described."""
    with torch.no_grad():
        model = Net().eval()
        captured(model, tmp_path, "mix", ((lambda n=n: model(input_of(n))) for n in range(4)))
    assert 0 in described
    assert not {2, 3} & set(described)


class OwnParameter(nn.Parameter):
    """As vLLM's parameters are: of a class of their own."""


def test_a_parameter_of_its_own_class(tmp_path: Path) -> None:
    def program(model: nn.Module, number: int) -> None:
        assert isinstance(model, Net)
        if type(model.first.weight) is nn.Parameter:
            model.first.weight = OwnParameter(model.first.weight.detach().clone())
        if number == 3:
            model.first.weight.add_(1)
        model(input_of(number))

    with torch.no_grad():
        check(tmp_path, "mix", program, count=5)


def test_a_lazy_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4))
    with torch.no_grad():
        found = captured(model, tmp_path, "mix", ((lambda n=n: model(input_of(n))) for n in range(3)))
    for number, step in enumerate(found):
        assert step.data["Functional.linear.0.forward"]["output"][0]["Norm"] == pytest.approx(
            model(input_of(number)).double().norm().item(), rel=1e-6
        )


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


@dataclasses.dataclass
class Fields:
    one: torch.Tensor
    other: list[torch.Tensor]


@pytest.mark.parametrize("make", [Pair, lambda x, y: Fields(x, [y]), lambda x, y: {"one": x, "other": (y, None)}])
def test_nests(make: Callable[..., Any], tmp_path: Path, described: list[int]) -> None:
    model = Apply(lambda nest: nest)
    with torch.no_grad():
        found = captured(
            model, tmp_path, "L0", ((lambda n=n: model(make(input_of(n), input_of(n + 9)))) for n in range(4))
        )
    assert not {2, 3} & set(described)
    for number, step in enumerate(found):
        norms = [tensor.record["Norm"] for tensor in step.tensors()]
        exact = [input_of(number + more).double().norm().item() for more in (0, 9)]
        assert norms == pytest.approx(exact * 2, rel=1e-6)


def test_written_to_by_what_says_nothing_of_it(tmp_path: Path) -> None:
    """Of a large tensor, in the middle of a step, as by some operators of vLLM's."""
    model = nn.Sequential(Apply(lambda x: x), Apply(lambda x: x))
    model[0].register_forward_hook(lambda module, args, output: args[0].data.mul_(2) is None or None)

    def program(number: int) -> None:
        model(torch.full((256, 256), number + 1.0))

    with torch.no_grad():
        found = captured(model, tmp_path, "L0", ((lambda n=n: program(n)) for n in range(4)))
    for number, step in enumerate(found):
        assert step.data["Module.0.Apply.forward.0"]["input_args"][0]["Max"] == number + 1
        assert step.data["Module.1.Apply.forward.0"]["input_args"][0]["Max"] == 2 * (number + 1)


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


def maxima(found: list[StepDump], entry: str, part: str = "output") -> list[float | None]:
    return [step.data[entry][part][0]["Max"] if step.data[entry].get(part) else None for step in found]


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
