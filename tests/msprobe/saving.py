"""What save() is given at level debug: `python saving.py DIRECTORY` in msProbe's environment, a module in ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def config(directory: Path) -> str:
    """A config file in `directory`, for a dump there."""
    file = directory / "config.json"
    block = {"scope": [], "list": [], "data_mode": ["all"]}
    settings = {
        "task": "tensor",
        "dump_path": str(directory),
        "level": "debug",
        "rank": [],
        "step": [],
        "tensor": block,
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    return str(file)


def save(debugger: Any) -> None:
    """One step, in which tensors are saved alone and in nests, some with gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, requires_grad=True)
    y = torch.nn.Linear(4, 3)(x)
    debugger.save(y, "y")
    debugger.save([x, {"twice": y * 2, "scale": 3}], "nest")
    debugger.save(torch.ones(2), "constant")
    debugger.save(y, "without", False)
    debugger.save(y, "y")
    (y * torch.arange(6.0).view(2, 3)).sum().backward()
    debugger.step()


if __name__ == "__main__":
    from msprobe.pytorch import PrecisionDebugger

    save(PrecisionDebugger(config_path=config(Path(sys.argv[1]))))
