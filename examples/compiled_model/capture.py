"""Train a small compiled model for two steps, dump both, and look at the first.

    python capture.py [FOLDER]      (the dump goes to FOLDER/dump; default: output/ beside this file)

The model stays compiled: Inductor makes the same kernels as without a capture, and the names are those of an eager run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msprobe_graph import PrecisionDebugger, msprobe_backend, seed_all
from msprobe_graph.cli import main as msprobe_graph


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "output"
    dump = folder / "dump"

    seed_all(1234)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled: Any = torch.compile(model, backend=msprobe_backend)

    debugger = PrecisionDebugger({"task": "statistics", "level": "L0", "dump_path": str(dump)})
    for batch in torch.randn(2, 4, 8):
        with debugger.start(compiled):
            compiled(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return msprobe_graph(["show", str(dump)])


if __name__ == "__main__":
    sys.exit(main())
