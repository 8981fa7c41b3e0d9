"""What is wrong in msProbe's dumps of eager runs and is right here: a test for each."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import relu  # bound by import, before anything captures

from msprobe_graph import PrecisionDebugger
from msprobe_graph.config import ConfigError
from msprobe_graph.dump.reader import StepDump, read, steps

from ..capturing import LEVELS, Apply, Capture, holes

STATISTICS = ("Max", "Min", "Mean", "Norm")


def first_output(step: StepDump, entry: str) -> dict[str, Any]:
    found: dict[str, Any] = step.data[entry]["output"][0]
    return found


def exact(tensor: Tensor) -> tuple[float, ...]:
    """Max, Min, Mean and Norm in float64."""
    values = tensor.double()
    return values.max().item(), values.min().item(), values.mean().item(), values.norm().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["high", "low"])
def test_norm_of_half_precision_does_not_overflow(capture: Capture, dtype: torch.dtype, precision: str) -> None:
    x = torch.full((4, 4), 60000.0, dtype=dtype)
    model = Apply(lambda x: x)
    record = first_output(capture(model, lambda: model(x), "L0", precision=precision), "Module.Apply.forward.0")
    assert tuple(record[name] for name in STATISTICS) == pytest.approx(exact(x), rel=1e-6)
    assert record["Norm"] == pytest.approx(60000 * 4, rel=2e-3)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["high", "low"])
def test_every_dtype_has_all_statistics(capture: Capture, dtype: torch.dtype, precision: str) -> None:
    x = torch.tensor([[1, 5], [2, 3]]).to(dtype)
    model = Apply(lambda x: x)
    record = first_output(capture(model, lambda: model(x), "L0", precision=precision), "Module.Apply.forward.0")
    assert record["dtype"] == str(dtype)
    assert tuple(record[name] for name in STATISTICS) == pytest.approx(exact(x), rel=1e-6)


def test_nan_and_infinity_are_valid_json_and_counted(capture: Capture) -> None:
    x = torch.tensor([math.nan, math.nan, math.inf, -math.inf, -math.inf, -math.inf, 2.0, -1.0])
    model = Apply(lambda x: x)
    step = capture(model, lambda: model(x), "L0")  # reads every file strictly
    record = first_output(step, "Module.Apply.forward.0")
    assert (record["nan_count"], record["posinf_count"], record["neginf_count"]) == (2, 1, 3)
    assert all(math.isnan(record[name]) for name in STATISTICS)
    assert (record["finite_Max"], record["finite_Min"], record["finite_Mean"]) == (2.0, -1.0, 0.5)
    assert record["finite_Norm"] == pytest.approx(math.sqrt(5))
    text = (step.folder / "dump.json").read_text()
    assert '"Max":"nan"' in text


class Second(nn.Module):
    """No nn.Sequential: of one that is compiled in place Dynamo leaves the forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class Layered(nn.Module):
    """Two layers, the second of which may be compiled, and eager operators around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second: Any = Second()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.sigmoid(self.first(x))))


def compilations() -> tuple[int, int]:
    """Graphs that Dynamo has made, and graph breaks."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("compiling", ["torch.compile(m)", "m.compile()"])
@pytest.mark.parametrize("before", [True, False], ids=["compiled before", "compiled under capture"])
def test_a_compiled_model_stays_compiled_and_is_named(
    capture: Capture, level: str, compiling: str, before: bool
) -> None:
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(2, 4)
    model: Any = Layered()
    plain = model(x)
    if compiling == "torch.compile(m)":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    if before:
        model(x)
    expected = (0, 0) if not before else (1, 0)
    assert compilations() == expected
    out = []
    step = capture(model, lambda: out.append(model(x)), level)
    assert torch.equal(out[0], plain)
    assert compilations() == (1, 0)
    model(x)
    assert compilations() == (1, 0)
    # What runs eagerly is captured, and what doesn't is named.
    assert list(step.data) == (["Module.Layered.forward.0"] if level in ("L0", "mix") else [])
    assert holes(step).keys() == {
        "Module.first.Linear",
        "Module.second.Second",
        "Module.second.fc.Linear",
        "Module.second.act.ReLU",
    }
    assert "compiled region" in holes(step)["Module.second.fc.Linear"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("compiling", ["torch.compile(m)", "m.compile()"])
def test_a_compiled_layer_is_a_border(capture: Capture, level: str, compiling: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(2, 4)
    model = Layered()
    plain = model(x)
    if compiling == "torch.compile(m)":
        model.second = torch.compile(model.second, backend="aot_eager")
    else:
        model.second.compile(backend="aot_eager")
    model(x)
    before = compilations()
    assert before[0] == 1
    out = []
    step = capture(model, lambda: out.append(model(x)), level)
    assert torch.allclose(out[0], plain)
    assert compilations() == before
    names = [name for name in step.data if name.startswith("Module")]
    if level in ("L0", "mix"):
        assert names == ["Module.first.Linear.forward.0", "Module.second.Second.forward.0", "Module.Layered.forward.0"]
        assert first_output(step, "Module.second.Second.forward.0")["Max"] == pytest.approx(
            model.second(torch.sigmoid(model.first(x))).max().item()
        )
    operators = {name.split(".")[1] for name in step.data if not name.startswith("Module")}
    if level in ("L1", "mix"):
        assert operators == {"linear", "sigmoid", "tanh"}
    if level == "L2":
        assert "relu" not in operators
        assert {"sigmoid", "tanh"} <= operators
    assert step.manifest is not None
    missing = [hole["site"] for hole in step.manifest["holes"]]
    assert missing == ["Module.second.fc.Linear", "Module.second.act.ReLU"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_compiled_function_keeps_its_results(capture: Capture, level: str) -> None:
    torch._dynamo.reset()
    counters.clear()

    def function(x: Tensor) -> Tensor:
        return torch.sin(x) * 2 + x

    compiled = torch.compile(function, backend="aot_eager")
    x = torch.randn(8)
    expected = compiled(x)
    model = Apply(lambda x: compiled(x).exp())
    for _ in range(2):
        out = []
        capture(model, lambda out=out: out.append(model(x)), level)
        assert torch.equal(out[0], expected.exp())
    graphs, breaks = compilations()
    assert graphs <= 2
    assert breaks == 0
    assert torch.equal(compiled(x), expected)
    assert compilations() == (graphs, 0)


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_the_operators_around_a_compiled_function_are_captured(capture: Capture, level: str) -> None:
    """Inductor's own code is no operator."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.sin() * 2)
    model = Apply(lambda x: compiled(x.exp()).tanh())
    x = torch.randn(3)
    expected = model(x)
    out = []
    step = capture(model, lambda: out.append(model(x)), level)
    assert torch.equal(out[0], expected)
    assert [name.split(".")[1] for name in step.data] == ["exp", "tanh"]


def test_a_weight_is_one_file_on_disk(capture: Capture) -> None:
    """Used by three calls, saved once: at 64 KiB it is worth remembering."""
    layer = nn.Linear(128, 128)
    step = capture(layer, lambda: layer(layer(layer(torch.randn(2, 128)))), "mix", task="tensor")
    weights = [tensor for tensor in step.tensors() if tensor.record["shape"] == [128, 128]]
    assert len(weights) == 6  # linear's argument and the module's parameter, three times
    files = {(step.folder / "dump_tensor_data" / tensor.record["data_name"]).stat().st_ino for tensor in weights}
    assert len(files) == 1
    assert all(torch.equal(step.load(tensor), layer.weight) for tensor in weights)


def test_a_weight_is_measured_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msprobe_graph.taps.rows import Rows

    measured = []
    add = Rows.add
    monkeypatch.setattr(Rows, "add", lambda rows, tensor: measured.append(tensor.shape) or add(rows, tensor))
    layer = nn.Linear(128, 128, bias=False)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "L0"})

    def forward(calls: int = 1) -> int:
        measured.clear()
        debugger.start(layer)
        for _ in range(calls):
            layer(torch.randn(2, 128))
        debugger.stop()
        debugger.step()
        return measured.count(layer.weight.shape)

    assert forward(calls=3) == 1
    assert forward() == 0  # nothing has changed it since
    with torch.no_grad():
        layer.weight.mul_(2)
    assert forward(calls=2) == 1
    layer.weight.data.fill_(3.0)  # no version counter sees this
    assert forward() == 1
    layer.weight.data = layer.weight.data.clone()  # the same values elsewhere
    assert forward(calls=2) == 0
    layer.weight.data = torch.full((128, 128), 4.0)
    assert forward(calls=2) == 1
    layer.weight.requires_grad_(False)  # which its record tells
    assert forward() == 1
    debugger.flush()
    norms = [first_output_of_weight(read(folder)) for folder in steps(tmp_path / "dump")]
    assert norms[0] == norms[1]
    assert norms[2] == pytest.approx(2 * norms[0])
    assert norms[3:] == pytest.approx([3.0 * 128, 3.0 * 128, 4.0 * 128, 4.0 * 128])


def first_output_of_weight(step: StepDump) -> float:
    norm: float = step.data["Module.Linear.forward.0"]["parameters"]["weight"]["Norm"]
    return norm


CRASH = """
import os, signal, sys, time, torch
from torch import nn
from msprobe_graph import PrecisionDebugger
model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
debugger = PrecisionDebugger({"dump_path": sys.argv[1], "level": "mix"})
for step in range(5):
    debugger.start(model, rank_id=0)
    model(torch.ones(1, 8))
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    debugger.stop()
    debugger.step()
    %s
"""


@pytest.mark.parametrize("wait", ["debugger.flush()", "time.sleep(0.1)"])
def test_a_crash_loses_at_most_the_running_step(tmp_path: Path, wait: str) -> None:
    crashed = subprocess.run([sys.executable, "-c", CRASH % wait, str(tmp_path / "dump")], timeout=60, check=False)
    assert crashed.returncode == -signal.SIGKILL
    found = [read(folder) for folder in steps(tmp_path / "dump")]
    assert [step.folder.parent.name for step in found] == ["step0", "step1", "step2", "step3"]
    assert all(step.finished and len(step.data) == 7 for step in found)


def test_unknown_keys_are_refused_with_a_reason() -> None:
    with pytest.raises(ConfigError, match='unknown key "dump_pth" in the top level, did you mean dump_path'):
        PrecisionDebugger({"dump_pth": "x"})
    with pytest.raises(ConfigError, match='unknown key "scop" in statistics, did you mean scope'):
        PrecisionDebugger({"dump_path": "x", "statistics": {"scop": []}})


def test_a_bad_value_is_refused_with_a_reason() -> None:
    with pytest.raises(ConfigError, match='level is "L7"; it must be one of "L0", "L1"'):
        PrecisionDebugger({"dump_path": "x", "level": "L7"})


def test_functions_bound_by_import_are_captured(capture: Capture) -> None:
    model = Apply(lambda x: relu(x))
    step = capture(model, lambda: model(torch.tensor([-1.0, 2.0])), "L1")
    assert list(step.data) == ["Functional.relu.0.forward"]
    assert first_output(step, "Functional.relu.0.forward")["Min"] == 0


@pytest.mark.parametrize("level", LEVELS)
def test_functions_and_forwards_are_not_replaced(capture: Capture, level: str) -> None:
    model = nn.Linear(2, 2)
    functions = {
        "F.relu": F.relu,
        "F.linear": F.linear,
        "torch.add": torch.add,
        "Tensor.add": Tensor.add,
        "Tensor.__mul__": Tensor.__mul__,
        "Module.__call__": nn.Module.__call__,
    }
    forward, kinds = type(model).forward, {name: type(function) for name, function in functions.items()}
    seen = []

    def program() -> None:
        model(torch.ones(1, 2))
        now = [F.relu, F.linear, torch.add, Tensor.add, Tensor.__mul__, nn.Module.__call__]
        seen.append(all(a is b for a, b in zip(now, functions.values(), strict=True)))
        seen.append(model.forward.__func__ is forward and "forward" not in model.__dict__)
        seen.append(isinstance(torch.add, type(torch.sub)) and type(F.relu) is kinds["F.relu"])

    capture(model, program, level)
    assert seen == [True, True, True]


def test_positions_count_arguments_that_are_no_tensors(capture: Capture) -> None:
    model = Apply(lambda x: torch.addmm(x, x, x, beta=2))
    step = capture(model, lambda: model(torch.eye(2)), "L1")
    entry = step.data["Torch.addmm.0.forward"]
    assert [argument["type"] for argument in entry["input_args"]] == ["torch.Tensor"] * 3
    assert entry["input_kwargs"]["beta"] == {"type": "int", "value": 2}
    model = Apply(lambda x: torch.full_like(x, 3) + torch.where(x > 0, 1, x))
    step = capture(model, lambda: model(torch.eye(2)), "L1")
    where = step.data["Torch.where.0.forward"]["input_args"]
    assert [argument["type"] for argument in where] == ["torch.Tensor", "int", "torch.Tensor"]


def test_nothing_is_written_for_an_argument_that_is_an_object(capture: Capture) -> None:
    class Secret:
        def __repr__(self) -> str:
            raise AssertionError("nobody asked")

    model = Apply(lambda x, secret: x)
    step = capture(model, lambda: model(torch.ones(1), Secret()), "L0")
    assert step.data["Module.Apply.forward.0"]["input_args"][1] == {"type": "Secret", "value": None}
    assert json.loads((step.folder / "manifest.json").read_text())["holes"] == []
