"""Both tasks, and every way to select, give of a compiled run what they give of the eager one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.dump.reader import StepDump

from ..capturing import holes
from .conftest import Both, Dumped, Net, differences

EAGER = {"inner": "eager"}


def files(step: StepDump) -> set[str]:
    return {file.name for file in (step.folder / "dump_tensor_data").glob("*.pt")}


def assert_same_files(eager: StepDump, compiled: StepDump) -> None:
    assert files(compiled) == files(eager)
    for one, other in zip(eager.tensors(), compiled.tensors(), strict=True):
        assert one.record.get("data_name") == other.record.get("data_name")
        if "data_name" in one.record:
            left, right = eager.load(one), compiled.load(other)
            assert torch.equal(left, right)
            assert (left.dtype, left.shape) == (right.dtype, right.shape)


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_the_tensor_task_writes_the_files_of_eager(both: Both, level: str) -> None:
    """msProbe's graph mode writes no dump.json for it."""
    x = torch.randn(2, 8)
    with torch.no_grad():
        eager, compiled = both(Net().eval(), lambda run: run(x), task="tensor", level=level)
    assert differences(eager, compiled) == []
    assert_same_files(eager, compiled)
    assert len(files(compiled)) > 20
    assert json.loads((compiled.folder / "dump.json").read_text())["dump_data_dir"] is not None


def test_files_hold_what_inductors_program_computed(both: Both) -> None:
    x = torch.randn(2, 8)
    model = Net(layers=1).eval()
    with torch.no_grad():
        eager, compiled = both(model, lambda run: run(x), {"inner": "inductor"}, task="tensor")
    assert list(compiled.data) == [name for name in eager.data if name in compiled.data]
    assert set(eager.data) - set(compiled.data) <= set(holes(compiled))
    expected = {(tensor.entry, tensor.position): eager.load(tensor) for tensor in eager.tensors()}
    told = [tensor for tensor in compiled.tensors() if "data_name" in tensor.record]
    for tensor in told:
        torch.testing.assert_close(compiled.load(tensor), expected[tensor.entry, tensor.position])
    assert len(told) >= 0.6 * len(expected)
    assert {tensor.record["data_name"] for tensor in told} == files(compiled)


SELECTIONS: dict[str, dict[str, Any]] = {
    "list of modules": {"list": ["layers.1"]},
    "list of functions": {"list": ["linear", "mul"]},
    "list by expression": {"list": ["name-regex(.*layers\\.\\d\\.up.*)"]},
    "scope of modules": {"scope": ["Module.layers.0.up.Linear.forward.0", "Module.layers.1.norm.LayerNorm.forward.0"]},
    "scope of functions": {"scope": ["Functional.silu.0.forward", "Functional.linear.3.forward"]},
    "forward only": {"data_mode": ["forward"]},
    "inputs": {"data_mode": ["forward", "input"]},
    "outputs": {"data_mode": ["output"]},
    "checksums": {"summary_mode": "md5"},
    "exclusive or": {"summary_mode": "xor"},
    "some tensors": {"tensor_list": ["silu", "head"]},
}


@pytest.mark.parametrize("what", SELECTIONS)
def test_a_selection_is_that_of_eager(both: Both, what: str) -> None:
    x = torch.randn(2, 8)
    block = SELECTIONS[what]
    level = "L0" if "modules" in what and "scope" in block else "L1" if "scope" in block else "mix"
    with torch.no_grad():
        eager, compiled = both(Net().eval(), lambda run: run(x), level=level, statistics=block)
    assert differences(eager, compiled) == []
    assert eager.data
    assert_same_files(eager, compiled)


@pytest.mark.parametrize("risk", ["ALL", "FOCUS", "CORE"])
def test_a_risk_level_is_that_of_eager(both: Both, risk: str) -> None:
    x = torch.randn(2, 8)
    with torch.no_grad():
        eager, compiled = both(Net().eval(), lambda run: run(x.view(2, 8).clone()), risk_level=risk)
    assert differences(eager, compiled) == []


def test_a_slice_is_cut_from_every_value(both: Both) -> None:
    x = torch.randn(6, 8)
    block = {"slice": [{"dim": 0, "begin": 1, "end": 3}]}
    with torch.no_grad():
        eager, compiled = both(Net().eval(), lambda run: run(x), statistics=block)
        whole, _ = both(Net().eval(), lambda run: run(x))
    assert differences(eager, compiled) == []
    assert differences(whole, compiled) != []


def test_max_steps_and_chosen_steps_end_the_capture(tmp_path: Path, dumped: Dumped) -> None:
    x = torch.randn(2, 8)
    compiled = torch.compile(Net().eval(), backend=msprobe_backend, options=EAGER)
    for name, settings in (("some", {"step": [1, "3-4"]}), ("few", {"max_steps": 2})):
        debugger = PrecisionDebugger({"dump_path": str(tmp_path / name), "level": "mix", **settings})
        for _ in range(6):
            with debugger.start(compiled):
                compiled(x)
    assert list(dumped("some")) == [1, 3, 4]
    assert list(dumped("few")) == [0, 1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_operators_are_taken_out_and_added(both: Both) -> None:
    x = torch.randn(2, 8)
    with torch.no_grad():
        eager, compiled = both(
            Net().eval(), lambda run: run(x), level="L1", operators={"remove": ["Functional.linear"]}
        )
    assert differences(eager, compiled) == []
    assert not any("linear" in name for name in compiled.data)
    assert any("silu" in name for name in compiled.data)
