"""Capture a small model that makes a NaN, and let `msprobe-graph show` find the call that made it.

    python capture.py [FOLDER]      (the dump goes to FOLDER/dump; default: output/ beside this file)

The model divides each row by its root mean square and forgets the epsilon, so a row of zeros becomes 0/0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from msprobe_graph import PrecisionDebugger, seed_all
from msprobe_graph.cli import main as msprobe_graph


class RMSNorm(nn.Module):
    """Each row divided by its root mean square."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / x.square().mean(-1, keepdim=True).sqrt())


class Block(nn.Module):
    """A normalised two-layer network beside a residual connection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + change


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "output"
    dump = folder / "dump"

    seed_all(1234)
    model = Block(16).eval()
    batch = torch.randn(4, 16)
    batch[2] = 0  # a padded row

    debugger = PrecisionDebugger({"task": "statistics", "level": "mix", "dump_path": str(dump)})
    with torch.no_grad(), debugger.start(model):
        model(batch)

    return msprobe_graph(["show", str(dump)])


if __name__ == "__main__":
    sys.exit(main())
