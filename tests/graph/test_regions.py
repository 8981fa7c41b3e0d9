"""Many graphs: regional compilation, several models, recompiles, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from msprobe_graph import msprobe_backend
from msprobe_graph.dump.reader import StepDump

from ..capturing import Capture, holes
from .conftest import EAGER, Both, Net, differences


def graphs() -> int:
    """How many graphs dynamo has compiled."""
    number: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return number


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


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_the_programs_compiles_something(capture: Capture, when: str) -> None:
    """Ours are out of dynamo's way meanwhile, but torch goes on to call those that it has found."""
    model, x = Net().eval().requires_grad_(False), torch.randn(2, 8)
    watched = model.layers[0]  # called with keywords

    def captured(function: Any) -> StepDump:
        def hook(*_: Any) -> None:
            function(x)

        register = watched.register_forward_pre_hook if when == "before" else register_module_forward_hook
        handle = register(hook)
        try:
            return capture(model, lambda: model(x), level="L0")
        finally:
            handle.remove()

    expected = captured(len)
    assert differences(expected, captured(torch.compile(lambda x: len(x * 2), backend="eager"))) == []


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
