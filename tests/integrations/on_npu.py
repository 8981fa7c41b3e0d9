"""vllm-ascend with graphs on a device called "npu"; see test_vllm_ascend_graphs, which runs this, and ascend_graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps

from ..capturing import holes
from ..released import Wheel
from .ascend_graphs import install, new_config, new_model, new_worker, step

BATCHES = [
    {"first": [3, 1, 4, 1, 5]},
    {"first": [9], "second": [2, 6]},
    {"second": [5, 3, 5, 8, 9, 7, 9, 3, 2, 3]},
    {"first": [1, 2, 3, 4]},
]
"""Padded to 8, padded to 4, too large for a graph, and a graph's size."""
MODES = [CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE]
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def wheel(wheel_folder: Path) -> Wheel:
    found = Wheel("vllm-ascend==0.23.0", "manylinux_2_34_aarch64", wheel_folder)
    install(found)
    return found


@pytest.fixture(autouse=True)
def _compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    yield
    torch._dynamo.reset()


def config(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    always = {"dump_path": str(folder / "dump"), "risk_level": "ALL", "extra_info": False, "level": "L0"}
    file.write_text(json.dumps({**always, **settings}))
    return file


def dumped(folder: Path) -> list[StepDump]:
    return [read(step) for step in steps(folder / "dump")]


def expected(folder: Path) -> tuple[list[StepDump], list[list[int]]]:
    """The same batches on the CPU, eagerly and without padding, and the tokens."""
    model, tokens = new_model(new_config(CUDAGraphMode.NONE, {}), "cpu"), []
    debugger = PrecisionDebugger(str(config(folder)))
    with torch.inference_mode():
        for batch in BATCHES:
            ids = torch.tensor([token for request in batch.values() for token in request])
            ends = torch.tensor([len(request) for request in batch.values()]).cumsum(0)
            with debugger.start(model):
                hidden = model(ids, torch.arange(len(ids)))
                tokens.append(model.compute_logits(hidden[ends - 1]).argmax(-1).tolist())
    return dumped(folder), tokens


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_replayed_steps_are_steps_without_graphs(wheel: Wheel, mode: CUDAGraphMode, tmp_path: Path) -> None:
    there, tokens = expected(tmp_path / "there")
    file = config(tmp_path / "here")
    additional: dict[str, Any] = {"dump_config_path": str(file)}
    worker = new_worker(wheel, new_config(mode, additional), file)
    assert not (tmp_path / "here" / "dump").exists(), "warm-up is no step"
    for number, batch in enumerate(BATCHES):
        assert step(worker, batch) == tokens[number]
        worker.model_runner._dummy_run(2)
        assert len(dumped(tmp_path / "here")) == number + 1, "a step is on disk when its tokens go out"
    for here, plain in zip(dumped(tmp_path / "here"), there, strict=True):
        print(here.folder, holes(here), list(here.data), list(plain.data))
        assert here.finished
