"""What goes wrong at a tap stays there; and a test for each thing that is wrong in msProbe's graph mode."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msprobe_graph import PrecisionDebugger, flush, msprobe_backend

from ..capturing import Apply, Capture, holes
from .conftest import Both, Dumped, Net, differences

EAGER = {"inner": "eager"}


def test_an_inner_graph_that_raises_leaves_nothing_behind(capture: Capture) -> None:
    """The exception is the program's; the next call is captured as ever."""

    def program(x: Tensor) -> Tensor:
        return torch.sin(x).index_select(0, at)

    at = torch.tensor([5])
    model = Apply(program)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)

    def run() -> None:
        with pytest.raises((IndexError, RuntimeError)):
            compiled(torch.ones(3))
        compiled(torch.ones(6))

    step = capture(compiled, run)
    (index,) = [name for name in step.data if "index_select" in name]
    assert step.data[index]["output"][0]["shape"] == [1]
    assert step.data["Module.Apply.forward.1"]["output"][0]["Max"] == pytest.approx(math.sin(1))


def test_a_value_that_cannot_be_measured_is_a_record_with_a_reason(both: Both) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    eager, compiled = both(Apply(lambda x, y: y * 2), lambda run: run(x.to_sparse(), x), level="L0")
    assert list(compiled.data) == list(eager.data)
    record = compiled.data["Module.Apply.forward.0"]["input_args"][0]
    assert (record["type"], record["Max"]) == ("torch.Tensor", None)
    assert record["reason"]
    assert compiled.data["Module.Apply.forward.0"]["output"] == eager.data["Module.Apply.forward.0"]["output"]


def test_a_folder_that_cannot_be_written_ends_the_capture_and_not_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    model, x = Net().eval(), torch.randn(2, 8)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix"})
    (tmp_path / "dump").write_text("in the way")
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    with caplog.at_level(logging.ERROR, logger="msprobe_graph"):
        debugger.start(compiled)
        assert torch.equal(compiled(x), model(x))
        debugger.stop()
    assert "can't be written" in caplog.text


class Unreadable(Tensor):
    """Raises when its data is asked for."""

    def data_ptr(self) -> int:
        raise RuntimeError("no data for you")

    @property
    def nbytes(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nor the size")


def test_a_tap_that_fails_is_a_hole_and_a_log(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    """The inner backend's program returns, once, what no tap can read."""
    readable = iter([False, True])

    def inner(module: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            outputs = module.forward(*args)
            return outputs if next(readable) else [output.as_subclass(Unreadable) for output in outputs]

        return run

    x = torch.ones(4)
    compiled = torch.compile(Apply(lambda x: torch.sin(x) * 2), backend=msprobe_backend, options={"inner": inner})
    found: list[Tensor] = []

    def program() -> None:
        found.append(compiled(x).as_subclass(Tensor))
        found.append(compiled(x))

    step = capture(compiled, program, level="L1")
    assert all(torch.equal(each, torch.sin(x) * 2) for each in found)
    assert "capture failed: RuntimeError: no" in holes(step)["a compiled graph"]
    assert "the model goes on" in caplog.text
    assert step.data["Torch.sin.1.forward"]["output"][0]["Max"] == pytest.approx(math.sin(1))
    assert "Tensor.mul.1.forward" in step.data


def test_nan_and_infinity_are_found_where_they_begin(both: Both) -> None:
    """There they are null in graph mode, so that the search for the first NaN finds nothing."""
    x = torch.tensor([[1.0, -1.0, 0.0, 2.0]])
    eager, compiled = both(Apply(lambda x: torch.sqrt(x) / x), lambda run: run(x))
    assert differences(eager, compiled) == []
    record = compiled.data["Torch.sqrt.0.forward"]["output"][0]
    assert math.isnan(record["Max"])
    assert (record["nan_count"], record["finite_Max"]) == (1, pytest.approx(2**0.5))
    first = next(tensor for tensor in compiled.tensors() if tensor.record["nan_count"])
    assert (first.entry, first.position) == ("Torch.sqrt.0.forward", "output.0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_statistics_are_not_computed_in_the_tensors_own_dtype(both: Both, dtype: torch.dtype) -> None:
    x = torch.full((4, 4), 60000.0).to(dtype)
    eager, compiled = both(Apply(lambda x: torch.clone(x)), lambda run: run(x))
    assert differences(eager, compiled) == []
    record = compiled.data["Torch.clone.0.forward"]["output"][0]
    assert record["Norm"] == pytest.approx(x.double().norm().item(), rel=1e-6)
    assert record["Mean"] == pytest.approx(x.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
@pytest.mark.parametrize("in_place", [False, True])
def test_start_takes_a_compiled_model_and_it_stays_compiled(capture: Capture, level: str, in_place: bool) -> None:
    """There start(torch.compile(m)) raises TypeError, m.compile() gives an empty dump, and at L1 and mix what is dumped
    is the uncompiled program."""
    ran: list[str] = []

    def inner(module: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append("compiled")
            return module.forward(*args)

        return run

    model, x = Net().eval(), torch.randn(2, 8)
    expected = model(x)
    run = model
    if in_place:
        model.compile(backend=msprobe_backend, options={"inner": inner})
    else:
        run = torch.compile(model, backend=msprobe_backend, options={"inner": inner})
    found: list[Tensor] = []
    step = capture(run, lambda: found.append(run(x)), level=level)
    torch.testing.assert_close(found[0], expected)
    assert ran == ["compiled"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(step.data) == {"L0": 10, "L1": 13, "mix": 23}[level]


def test_torch_and_the_modules_are_as_they_were(capture: Capture) -> None:
    """There functions are replaced, so that type checks break and those bound by import are missed."""
    bound = F.silu
    before = {name: getattr(F, name) for name in ("linear", "silu", "layer_norm")}
    model, x = nn.Sequential(nn.Linear(4, 4), Apply(lambda x: bound(x))), torch.randn(2, 4)
    kinds = [type(module) for module in model.modules()]
    forwards = [module.forward for module in model.modules()]
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    step = capture(compiled, lambda: compiled(x))
    assert "Functional.silu.0.forward" in step.data
    assert {name: getattr(F, name) for name in before} == before
    assert [type(module) for module in model.modules()] == kinds
    assert [module.forward for module in model.modules()] == forwards


def test_every_entry_of_a_captured_graph_survives_the_process(tmp_path: Path, dumped: Dumped) -> None:
    """flush() in the middle of a step brings all of it to disk, as a step that is not finished."""
    model, x = Net().eval(), torch.randn(2, 8)
    options = {**EAGER, "config_path": {"dump_path": str(tmp_path / "dump"), "level": "L1", "risk_level": "ALL"}}
    compiled = torch.compile(model, backend="msprobe", options=options)
    compiled(x)
    flush()
    step = dumped()[0]
    assert not step.finished
    assert len(step.data) == 13
