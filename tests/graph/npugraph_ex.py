"""A program that captures with inner="npugraph_ex": the real one of a torch_npu wheel, on the CPU.

    python npugraph_ex.py SOURCES FOLDER

Real: all of npugraph_ex, its CompilerConfig, passes and code generation. Stands in: torch_npu and torch.npu, which are
asked for a memory pool and no more, because "force_eager" runs the graph's operators in place of capturing them.
Prints a JSON object.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import nn

import msprobe_graph
from msprobe_graph import PrecisionDebugger, msprobe_backend


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main(sources: str, folder: Path) -> dict[str, object]:
    sys.path.insert(0, sources)
    # Written by hand, and so not on a CPU: patterns of operators that torch_npu registers.
    sys.modules["torch_npu"] = MagicMock(__spec__=ModuleSpec("torch_npu", None))
    torch.npu = MagicMock()
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(3, 8)
    called: list[str] = []

    def theirs(module: torch.fx.GraphModule, inputs: object, config: object) -> None:
        called.append(type(config).__name__)

    options = {"force_eager": True, "pattern_fusion_pass": False, "post_grad_custom_post_pass": theirs}
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": "npugraph_ex", **options})
    plain = model(x)
    same = []
    for name, program in (("eager", model), ("graph", compiled)):
        model.zero_grad()
        debugger = PrecisionDebugger(
            {"dump_path": str(folder / name), "level": "mix", "risk_level": "ALL", "task": "tensor"}
        )
        with debugger.start(program):
            out = program(x)
            out.sum().backward()
        same.append(torch.equal(out, plain))
    msprobe_graph.flush()
    return {"same": same, "called": called, "late": "npugraph_ex" in sys.modules}


if __name__ == "__main__":
    print("RESULT", json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
