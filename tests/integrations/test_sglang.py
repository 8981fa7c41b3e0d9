"""SGLang's own calls of a debugger, out of its wheel, with ours.

Real: what makes the debugger (--msprobe-dump-config) and ModelRunner.forward. Stands in: the forward it calls, which
runs a small torch model, and whatever is switched off.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph.dump.reader import read, steps

from ..released import NOTHING, Given, Wheel

MAKER = "sglang/srt/model_executor/model_runner_components/misc_utils.py"
RUNNER = "sglang/srt/model_executor/model_runner.py"


@pytest.fixture(scope="module")
def wheel(wheel_folder: Path) -> Wheel:
    return Wheel("sglang==0.5.23", "manylinux_2_34_x86_64", wheel_folder)


def test_the_calls_of_sglang(wheel: Wheel, as_msprobe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)  # of the whole process
    for variable in ("CUBLAS_WORKSPACE_CONFIG", "HCCL_DETERMINISTIC", "LCCL_DETERMINISTIC", "PYTHONHASHSEED"):
        monkeypatch.setenv(variable, "")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"dump_path": str(tmp_path / "dump"), "level": "L0"}))
    asked = SimpleNamespace(msprobe_dump_config=str(config))
    make = wheel.module(MAKER, {"create_msprobe_debugger"}, get_observability=lambda: asked)["create_msprobe_debugger"]
    namespace = wheel.module(
        RUNNER,
        {"ModelRunner.forward"},
        **dict.fromkeys(("get_parallel", "get_schedule", "get_exec", "get_global_experts_capturer"), NOTHING),
        **dict.fromkeys(("get_global_expert_distribution_recorder", "should_advance_eplb_counter"), NOTHING),
        **dict.fromkeys(("get_global_indexer_capturer", "dumper", "profile_range", "build_step_span_name"), NOTHING),
    )
    for name in ("get_global_experts_capturer", "get_global_indexer_capturer"):
        namespace[name] = lambda: None

    class Runner(namespace["ModelRunner"]):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model = nn.Linear(4, 4)
            self.forward_pass_id = 0
            self.canary_manager = self.eplb_manager = None
            self.msprobe_debugger = make()

        def __getattr__(self, name: str) -> Any:
            return NOTHING

        def _forward_raw(self, batch: Any, *_: Any) -> Any:
            return Given(logits=self.model(batch.x))

    runner = Runner()
    for value in range(3):
        runner.forward(Given(x=torch.full((1, 4), float(value))))
    found = [read(folder) for folder in steps(tmp_path / "dump")]
    assert [step.folder.parent.name for step in found] == ["step0", "step1", "step2"]
    assert [next(step.tensors()).record["Max"] for step in found] == [0.0, 1.0, 2.0]


@pytest.mark.skipif(importlib.util.find_spec("msprobe") is not None, reason="msProbe is installed")
def test_sglang_finds_the_plugin() -> None:
    """It loads each entry point of this group in all of its processes and calls it without arguments."""
    code = """
from importlib.metadata import entry_points
for plugin in entry_points(group="sglang.srt.plugins"):
    if plugin.name == "msprobe_graph":
        plugin.load()()
import sys
print("torch" in sys.modules)
from msprobe.pytorch import PrecisionDebugger, seed_all
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "False\n"
