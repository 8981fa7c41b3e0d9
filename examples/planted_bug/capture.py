"""Dump a model that runs eagerly, and compiled by a compiler that was given a wrong tanh.

    python capture.py eager                          (to output/eager beside this file)
    python capture.py compiled                       (to output/compiled)
    python capture.py compiled blocks.0.activation   (to output/opened: every operator of that module is captured)

Then `msprobe-graph compare output/eager output/compiled` says where they part: see docs/tutorial.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.decomposition import decompositions

from msprobe_graph import PrecisionDebugger, msprobe_backend, seed_all


class GELU(nn.Module):
    """The activation of GPT-2: many small operators, which a compiler makes one kernel of."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


class Block(nn.Module):
    """A normalised two-layer network beside a residual connection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 4 * size)
        self.activation = GELU()
        self.down = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.down(self.activation(self.up(self.norm(x))))
        return x + change


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(16), Block(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def fast_tanh(x: Tensor) -> Tensor:
    """The planted bug: exact at zero, up to 2.6 % off near |x| = 1.5."""
    return x * (27 + x * x) / (27 + 9 * x * x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", choices=["eager", "compiled"])
    parser.add_argument("full_modules", nargs="*", metavar="MODULE", help="modules whose operators are all captured")
    arguments = parser.parse_args()

    seed_all(1234)
    model = Model().eval()
    batch = torch.randn(4, 16)

    name = arguments.run
    program: Any = model
    if arguments.run == "compiled":
        decompositions[torch.ops.aten.tanh.default] = fast_tanh
        name = "opened" if arguments.full_modules else "compiled"
        program = torch.compile(model, backend=msprobe_backend, options={"full_modules": arguments.full_modules})

    dump = Path(__file__).resolve().parent / "output" / name
    debugger = PrecisionDebugger({"task": "statistics", "level": "mix", "dump_path": str(dump)})
    with torch.no_grad(), debugger.start(program):
        program(batch)


if __name__ == "__main__":
    main()
