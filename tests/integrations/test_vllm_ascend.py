"""vllm-ascend's own calls of a debugger, out of its wheels, with ours: they run to the end, and what is dumped is what
a plain run on the CPU dumps. See ascend_runner for what is real."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps

from ..released import Wheel

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm.config import CUDAGraphMode

from .ascend_runner import Model, new_runner

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("as_msprobe")]

PLATFORMS = {"0.18.0": "manylinux_2_24_aarch64", "0.23.0": "manylinux_2_34_aarch64"}
BATCHES = [[3, 1, 4, 1, 5], [9], [2, 6]]


@pytest.fixture(scope="module")
def wheels(wheel_folder: Path) -> Callable[[str], Wheel]:
    """The wheel of a version."""
    return lambda version: Wheel(f"vllm-ascend=={version}", PLATFORMS[version], wheel_folder)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def config(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    always = {"dump_path": str(folder / "dump"), "risk_level": "ALL", "extra_info": False}
    file.write_text(json.dumps({**always, **settings}))
    return file


def expected(model: Model, folder: Path, named: bool = True, **settings: Any) -> list[StepDump]:
    """The same batches by hand. `named`: start() is given the model."""
    debugger = PrecisionDebugger(str(config(folder, **settings)))
    with torch.inference_mode():
        for batch in BATCHES:
            ids, positions, last = torch.tensor(batch), torch.arange(len(batch)), torch.tensor([len(batch) - 1])
            with debugger.start(model if named else None):
                hidden = model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
                model.compute_logits(hidden[last]).argmax(-1).tolist()
    return dumped(folder)


def dumped(folder: Path) -> list[StepDump]:
    return [read(step) for step in steps(folder / "dump")]


def assert_same(found: list[StepDump], wanted: list[StepDump]) -> None:
    assert [step.folder.parent.name for step in found] == [step.folder.parent.name for step in wanted]
    for here, there in zip(found, wanted, strict=True):
        assert here.finished
        assert here.data == there.data
        for a, b in zip(here.tensors(), there.tensors(), strict=True):
            if "data_name" in b.record:
                assert torch.equal(here.load(a), there.load(b))


@pytest.mark.parametrize("settings", [{"level": "L0"}, {"level": "mix", "task": "tensor"}, {"level": "L1"}], ids=str)
@pytest.mark.parametrize("version", PLATFORMS)
def test_eager(wheels: Any, version: str, settings: dict[str, Any], model: Model, tmp_path: Path) -> None:
    """Dummy runs before and between the steps are none."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    named = version != "0.18.0" or settings["level"] != "L1"  # where 0.18 gives no model
    wanted = expected(model, there, named, **settings)
    runner = new_runner(wheels(version), config(here, **settings), CUDAGraphMode.NONE, model)
    plain = new_runner(wheels(version), None, CUDAGraphMode.NONE, model)
    runner._dummy_run(8)
    for number, batch in enumerate(BATCHES):
        assert runner.step(batch) == plain.step(batch)
        runner._dummy_run(2)
        assert len(dumped(here)) == number + 1, "a step is on disk when its tokens go out"
    assert_same(dumped(here), wanted)


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE])
@pytest.mark.parametrize("settings", [{"level": "L0"}, {"level": "mix", "task": "tensor"}], ids=str)
def test_graph_order(wheels: Any, mode: CUDAGraphMode, settings: dict[str, Any], model: Model, tmp_path: Path) -> None:
    """AclGraphDumper: one start when the model is loaded, one step after each run, dump=False after dummy runs.

    0.18 refuses to dump what is not eager.
    """
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    wanted = expected(model, there, **settings)
    runner = new_runner(wheels("0.23.0"), config(here, **settings), mode, model)
    assert not hasattr(runner.debugger, "stop")
    assert (runner.model is model) == (mode == CUDAGraphMode.PIECEWISE)
    for size in (8, 4, 2, 1):
        runner._dummy_run(size)
    for batch in BATCHES:
        runner.step(batch)
        runner._dummy_run(2)
    runner.debugger._debugger.stop()  # vLLM ends with its process
    found = dumped(here)
    if settings["level"] == "mix":  # the capture is on around the model, too: in dummy runs and on the way to a batch
        for step in found:
            for name in [name for name in step.data if name not in wanted[0].data]:
                del step.data[name]
    assert_same(found, wanted)


def test_a_step_with_nothing_in_it_before_a_dummy_run(wheels: Any, model: Model, tmp_path: Path) -> None:
    """0.23 starts the debugger, finds nothing to do and returns; then data parallelism asks for a dummy run, which
    ends with step(dump=False)."""
    there = tmp_path / "there"
    there.mkdir()
    wanted = expected(model, there, level="L0")
    runner = new_runner(wheels("0.23.0"), config(tmp_path, level="L0"), CUDAGraphMode.NONE, model)
    for batch in BATCHES:
        assert runner.step([]) == []
        runner._dummy_run(1)
        runner.step(batch)
    assert_same(dumped(tmp_path), wanted)
