"""verify: the verdict about taps, with programs that they leave alone and one that they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import msprobe_graph
from msprobe_graph.cli import main
from msprobe_graph.graph.generated import functions_of

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x)))) * 0.3

def build():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(torch.bfloat16).train()
    return model, (torch.randn(4, 32).to(torch.bfloat16),)

def nothing():
    return 1
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


@pytest.mark.slow
def test_exact_taps_change_nothing(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{script}:build", "--output", str(tmp_path / "verdict.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verified: tapped and untapped program are the same"
    (verdict,) = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["functions"]["untapped"] == verdict["functions"]["tapped"] > 1
    assert verdict["results"] == {"tensors": 13, "bit_equal": 13, "largest_difference": 0.0}  # output, gradients


@pytest.mark.slow
def test_full_taps_change_a_program_and_verify_says_what(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{script}:build", "--fidelity", "full"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "not the same: the taps change the compiled program"
    assert any(line.startswith("  changed: cpp_fused") for line in lines)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("missing.py:build", "a file that exists"),
        ("{script}", "FILE.py:FUNCTION"),
        ("{script}:absent", "no function 'absent'"),
        ("{script}:nothing", "is to return (model, args)"),
    ],
)
def test_what_cannot_be_verified_is_one_sentence(
    script: Path, target: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", target.format(script=script)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_the_verdict_of_a_running_program_is_in_the_manifest(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model: Any = torch.compile(
        nn.Linear(4, 4), backend=msprobe_graph.msprobe_backend, options={"inner": "aot_eager", "verify": True}
    )
    debugger = msprobe_graph.PrecisionDebugger({"task": "statistics", "level": "L1", "dump_path": str(tmp_path)})
    x = torch.randn(2, 4)
    for _ in range(2):
        with debugger.start(model):
            model(x)
    for step in ("step0", "step1"):
        (folder,) = (tmp_path / step).iterdir()
        (graph,) = json.loads((folder / "manifest.json").read_text())["graphs"]
        assert graph["verdict"]["same"]
        assert graph["verdict"]["results"]["tensors"] == 3  # the output and two gradients


def test_functions_are_found_in_generated_code() -> None:
    program = (
        "import torch\n"
        "cpp_fused_relu_0 = async_compile.cpp_pybinding(['const float*', 'float*'], r'''\n"
        'extern "C"  void  kernel() { one(); }\n'
        "''')\n\n\n"
        "triton_poi_1 = async_compile.triton('triton_poi_1', '''\nimport triton\ntwo()\n''', device_str='cuda')\n"
        "def call(args): pass\n"
    )
    one, two = functions_of([program])
    assert (one.name, two.name) == ("cpp_fused_relu_0", "triton_poi_1")
    assert "one();" in one.source
    assert "two()" in two.source
    assert "two()" not in one.source
