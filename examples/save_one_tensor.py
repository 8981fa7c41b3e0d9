"""Save one tensor from inside a compiled model, and look at the files.

python save_one_tensor.py [FOLDER]      (the files go to FOLDER/dump; default: output/ beside this file)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from msprobe_graph import acl_save, flush


class Gate(nn.Module):
    """A gated layer that saves its gate, at each call into the next file: dump/gate_0.pt, dump/gate_1.pt, ..."""

    def __init__(self, size: int, dump: str) -> None:
        super().__init__()
        self.dump = dump
        self.gate = nn.Linear(size, size)
        self.up = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = acl_save(self.gate(x).sigmoid(), f"{self.dump}/gate.pt")
        return gate * self.up(x)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "output"
    dump = folder / "dump"

    torch.manual_seed(1234)
    model = torch.compile(Gate(8, str(dump)), fullgraph=True)
    with torch.inference_mode():
        for rows in (1, 2, 3):
            model(torch.randn(rows, 8))

    flush()  # the files are written in the background; at the exit they are there in any case
    for file in sorted(dump.glob("gate_*.pt")):
        gate = torch.load(file, weights_only=True)
        print(f"{file.name}  {tuple(gate.shape)}  mean {gate.mean():.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
