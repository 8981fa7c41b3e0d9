"""Many graphs: breaks, regional compilation, recompiles, threads; and capture that is off leaves all as it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from msprobe_graph import PrecisionDebugger, flush, msprobe_backend
from msprobe_graph.dump.reader import StepDump
from msprobe_graph.eager.capture import BEGUN
from msprobe_graph.eager.stretches import NO_GRAPH, OWN_MODE

from ..capturing import Capture, holes, modules
from .conftest import Both, Dumped, Mlp, Net, differences

EAGER = {"inner": "eager"}


def graphs() -> int:
    """How many graphs dynamo has compiled."""
    number: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return number


class Broken(nn.Module):
    """A graph break in the middle and a number that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.before = Mlp()
        self.between = nn.Linear(8, 8)
        self.after = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x, scale=1.0)[0]
        torch._dynamo.graph_break()
        y = self.between(x) * float(x.sum().item())
        return self.after(y, scale=2.0)[0]


class InALoop(nn.Module):
    """Modules with a break in each, called in a loop: of forward itself, dynamo compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Break() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.sin(part(x + 1)) * 2
        return x


class Break(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x) - x


class Skipped(nn.Module):
    """A module that dynamo doesn't compile at all, in one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.eager = Eager()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.eager(torch.tanh(self.fc(x)))) + 1


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sin(x))


class Mixed(nn.Module):
    """Forward runs eagerly and calls modules and functions that dynamo compiles, with breaks and without, and some that
    it doesn't; a function that it can't have in a graph; and an error."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Break() for _ in range(2))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = compiled_alone(part(x) * 2) + 1
            x = torch.relu(broken_alone(x) / 2) * size(x)
            x = disabled(x) - torch.unique(x).sum()
            try:
                raises(x)
            except ValueError:
                x = torch.abs(x)
        return x.exp()


def compiled_alone(x: Tensor) -> Tensor:
    return torch.cos(x) + torch.sin(x)


def broken_alone(x: Tensor) -> Tensor:
    x = torch.cos(x)
    torch._dynamo.graph_break()
    return torch.sin(x) * 3


def size(x: Tensor) -> int:
    return x.shape[0]


@torch.compiler.disable
def disabled(x: Tensor) -> Tensor:
    return compiled_alone(torch.tanh(x))


def raises(x: Tensor) -> None:
    torch.neg(x)
    torch._dynamo.graph_break()
    raise ValueError


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
@pytest.mark.parametrize("model", [Broken, InALoop, Skipped, Mixed])
def test_graph_breaks_change_nothing_in_a_dump(both: Both, model: type[nn.Module], level: str) -> None:
    x = torch.randn(2, 8)
    eager, compiled = both(model().eval(), lambda run: run(x), level=level)
    assert differences(eager, compiled) == []
    assert NO_GRAPH not in holes(compiled).values()
    assert graphs() > 1
    assert eager.data


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("model", [Broken, InALoop, Skipped, Mixed])
def test_what_ran_before_capture_is_not_compiled_anew_for_it(
    tmp_path: Path, capture: Capture, model: type[nn.Module], in_place: bool
) -> None:
    """Nor what is first compiled under capture, when capture is over."""
    program, x = model().eval(), torch.randn(2, 8)
    eager = capture(program, lambda: program(x))
    PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"})
    if in_place:
        program.compile(backend=msprobe_backend, options=EAGER)
    compiled = program if in_place else torch.compile(program, backend=msprobe_backend, options=EAGER)
    expected = compiled(x)
    before = graphs()
    assert before > 1
    step = capture(compiled, lambda: compiled(x))
    assert differences(eager, step) == []
    assert torch.equal(compiled(x), expected)
    assert graphs() == before
    assert torch._C._len_torch_function_stack() == 0


def test_functions_around_graphs_of_which_nothing_is_wanted(both: Both) -> None:
    """The graphs have none of the functions that the list names."""
    x = torch.randn(2, 8)
    eager, compiled = both(Mixed().eval(), lambda run: run(x), level="L1", statistics={"list": ["relu", "exp", "abs"]})
    assert differences(eager, compiled) == []
    assert [name.split(".")[1] for name in eager.data] == ["relu", "abs", "relu", "abs", "exp"]


class Numbered(nn.Module):
    """Compiled anew for each number, until dynamo has enough of it; the functions around it are compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Number()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            x = self.part(x) + 1
        return torch.relu(x)


class Number(nn.Module):
    number = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        torch._dynamo.graph_break()
        return x * self.number


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = torch.tan(breaks_at_once(x))
        return x


def breaks_at_once(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    torch._dynamo.graph_break()
    return x


def test_functions_behind_compiled_code_without_a_graph_are_a_hole(capture: Capture) -> None:
    """Such code leaves no trace when it runs."""
    model, x = Silent().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    for _ in range(2):
        step = capture(compiled, lambda: compiled(x), level="L1")
        assert [site.rpartition(" ")[2] for site, reason in holes(step).items() if reason == NO_GRAPH] == ["forward"]


def test_functions_of_what_was_compiled_too_often_are_a_hole(capture: Capture) -> None:
    model, x = Numbered().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)

    def program() -> None:
        for number in range(4):
            model.part.number = number
            compiled(x)

    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            step = capture(compiled, program)
            assert NO_GRAPH in holes(step).values()
    assert "Torch.sin.3.forward" in step.data
    assert "Torch.relu.3.forward" in step.data
    assert "Tensor.mul.3.forward" not in step.data


class Passing(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class UnderAMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Break()

    def forward(self, x: Tensor) -> Tensor:
        with Passing():
            x = torch.sin(x)
            torch._dynamo.graph_break()
            x = disabled(self.part(x))
        return torch.tan(x)


def test_a_mode_of_the_programs_own_keeps_its_place(capture: Capture) -> None:
    model, x = UnderAMode().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    with torch.no_grad(), Passing() as mode:
        step = capture(compiled, lambda: compiled(x))
        before = graphs()
        torch.testing.assert_close(compiled(x), model(x))
        assert torch.overrides._get_current_function_mode_stack() == [mode]
    assert graphs() == before
    assert OWN_MODE in holes(step).values()
    assert {"Torch.sin.0.forward", "Torch.tan.0.forward"} <= set(step.data)


def test_layers_compiled_one_by_one_share_a_graph_and_keep_their_names(capture: Capture) -> None:
    model, x = Net(layers=4).eval().requires_grad_(False), torch.randn(2, 8)
    eager = capture(model, lambda: model(x))
    for layer in model.layers:
        layer.compile(backend=msprobe_backend, options=EAGER)
    compiled = capture(model, lambda: model(x))
    assert differences(eager, compiled) == []
    assert graphs() == 1
    again = capture(model, lambda: model(x))
    assert differences(eager, again) == []
    assert graphs() == 1


def test_regional_compilation_compiles_what_it_compiles_without_us(capture: Capture) -> None:
    def compiled_graphs(**backend: Any) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net(layers=3).eval().requires_grad_(False)
        for layer in model.layers:
            layer.compile(**backend)
        x = torch.randn(2, 8)
        if backend["backend"] is msprobe_backend:
            capture(model, lambda: model(x))
        model(x)
        model(x)
        return graphs()

    assert compiled_graphs(backend=msprobe_backend, options=EAGER) == compiled_graphs(backend="eager") == 1


def test_a_compiled_part_of_an_eager_model(capture: Capture) -> None:
    model, x = Net(layers=3).eval(), torch.randn(2, 8)
    eager = capture(model, lambda: model(x))
    model.layers[1] = torch.compile(model.layers[1], backend=msprobe_backend, options=EAGER)
    assert differences(eager, capture(model, lambda: model(x))) == []


def test_two_models_in_a_process(capture: Capture) -> None:
    first, second, x = Net(layers=1).eval(), Net(layers=1).eval(), torch.randn(2, 8)
    eager = capture([first, second], lambda: second(first.layers[0](x, scale=1.0)[0]))
    one = torch.compile(first.layers[0], backend=msprobe_backend, options=EAGER)
    other = torch.compile(second, backend=msprobe_backend, options=EAGER)
    compiled = capture([first, second], lambda: other(one(x, scale=1.0)[0]))
    assert differences(eager, compiled) == []
    assert "Module.1.layers.0.up.Linear.forward.0" in compiled.data


def test_recompiles_and_dynamic_shapes(both: Both) -> None:
    inputs = [torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(4, 4, 8)]

    def program(run: Any) -> None:
        for x in inputs:
            run(x)

    eager, compiled = both(Net().eval(), program)
    assert differences(eager, compiled) == []
    assert 2 <= graphs() <= 3
    assert [compiled.data[f"Module.head.Linear.forward.{n}"]["output"][0]["shape"] for n in range(5)] == [
        [2, 3],
        [3, 3],
        [5, 3],
        [2, 3],
        [4, 4, 3],
    ]


def test_threads_do_not_see_each_others_values(capture: Capture) -> None:
    model, x = Net(layers=1).eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    numbers = range(1, 5)
    inputs = {number: torch.full((2, 8), float(number)) for number in numbers}
    inputs = {number: value * torch.arange(8.0) ** number for number, value in inputs.items()}
    expected = {number: model(value) for number, value in inputs.items()}
    errors: list[BaseException] = []

    def program() -> None:
        compiled(x)
        together = threading.Barrier(len(numbers))

        def work(number: int) -> None:
            try:
                together.wait()
                assert torch.equal(compiled(inputs[number]), expected[number])
            except BaseException as error:  # noqa: BLE001 - told by the test itself
                errors.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in numbers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    with torch.no_grad():
        step = capture(compiled, program)
    assert errors == []
    assert not any("failed" in reason for reason in holes(step).values())
    heads = [f"Module.head.Linear.forward.{number}" for number in range(5)]
    assert set(heads) <= set(step.data)
    for name in heads:
        entry = step.data[name]
        norms = {round(expected[n].norm().item(), 3): n for n in numbers}
        assert len(norms) == 4
        assert name == heads[0] or round(entry["output"][0]["Norm"], 3) in norms
    assert len({step.data[name]["output"][0]["Norm"] for name in heads}) == 5


def test_without_capture_nothing_is_compiled_anew_or_recorded(tmp_path: Path, dumped: Dumped) -> None:
    """Between start and stop, before and after: the same compiled graph."""
    counter = CompileCounter()
    model, x = Net().eval(), torch.randn(2, 8)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"})
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": counter})
    for _ in range(2):
        compiled(x)
    before = torch._dynamo.utils.counters["stats"].copy()
    for _ in range(2):
        debugger.start(compiled)
        compiled(x)
        debugger.stop()
        compiled(x)
        debugger.step()
    compiled(x)
    debugger.flush()
    assert counter.frame_count == 1
    assert torch._dynamo.utils.counters["stats"] == before
    found = dumped()
    assert [list(step.data) for step in found.values()] == [list(found[0].data)] * 2
    assert modules(found[0]) == [name for name in modules(found[0]) if name.endswith(".forward.0")]
    assert len(modules(found[0])) == 10


def test_the_counters_are_those_of_an_untapped_backend(capture: Capture) -> None:
    def stats(backend: Any) -> dict[str, Any]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, x = InALoop().eval(), torch.randn(2, 8)
        compiled = torch.compile(model, backend=backend, options=EAGER if backend is msprobe_backend else None)
        if backend is msprobe_backend:
            capture(compiled, lambda: compiled(x))
        compiled(x)
        counters = torch._dynamo.utils.counters
        return {"graphs": graphs(), "breaks": set(counters["graph_break"])}

    assert stats(msprobe_backend) == stats("eager")


def test_one_debugger_after_another(tmp_path: Path, dumped: Dumped) -> None:
    """The compiled graph stays; who captures is asked when it runs."""
    model, x = Net().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    for name in ("first", "second"):
        debugger = PrecisionDebugger({"dump_path": str(tmp_path / name), "level": "mix", "risk_level": "ALL"})
        with debugger.start(compiled):
            compiled(x)
    assert graphs() == 1
    assert differences(dumped("first")[0], dumped("second")[0]) == []


def test_a_debugger_that_was_not_started_captures_nothing(tmp_path: Path) -> None:
    PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix"})
    model, x = Net().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    assert torch.equal(compiled(x), model(x))
    flush()
    assert not (tmp_path / "dump").exists()


def test_without_a_debugger_all_is_step0(tmp_path: Path, capture: Capture, dumped: Dumped) -> None:
    settings = {"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"}
    model, x = Net().eval(), torch.randn(2, 8)
    inputs = [x, x + 1, x + 2]
    eager = capture(model, lambda: [model(each) for each in inputs])
    compiled = torch.compile(model, backend="msprobe", options={**EAGER, "config_path": settings})
    for each in inputs:
        compiled(each)
    flush()
    found = dumped()
    assert list(found) == [0]
    assert inside(found[0]) == inside(eager)
    assert "Module.head.Linear.forward.2" in found[0].data
    # The outermost call runs when capture begins, in the middle of it: it counts, and it is not seen.
    assert "Module.Net.forward.0" not in found[0].data
    assert holes(found[0])["Module.Net.forward.0"] == BEGUN
    assert found[0].data["Module.Net.forward.1"]["output"] == eager.data["Module.Net.forward.1"]["output"]


def test_several_models_share_a_config_and_step0(tmp_path: Path, dumped: Dumped) -> None:
    settings = {"dump_path": str(tmp_path / "dump"), "level": "L1", "risk_level": "ALL"}
    x = torch.randn(2, 8)
    options = {**EAGER, "config_path": settings}
    one = torch.compile(lambda x: torch.sin(x), backend="msprobe", options=options)
    other = torch.compile(lambda x: torch.sin(x) * 2, backend="msprobe", options=options)
    one(x)
    other(x)
    one(x)
    flush()
    names = ["Torch.sin.0.forward", "Torch.sin.1.forward", "Tensor.mul.0.forward", "Torch.sin.2.forward"]
    assert list(dumped()[0].data) == names


def inside(step: StepDump) -> dict[str, Any]:
    """All entries but the root's own, with their values."""
    return {
        name: {key: part for key, part in entry.items() if key != "site"}
        for name, entry in step.data.items()
        if not name.startswith("Module.Net.")
    }
