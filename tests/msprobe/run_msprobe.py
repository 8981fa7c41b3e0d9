"""Dumps all models with msProbe, each as a step of its own: python run_msprobe.py LEVEL DIRECTORY.

Runs in msProbe's environment. One process for all of them, because most of its time goes into importing msProbe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from models import CASES  # beside this file
from msprobe.pytorch import PrecisionDebugger


def main(level: str, directory: str) -> None:
    config = Path(directory) / "config.json"
    block = {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"}
    settings = {"task": "statistics", "dump_path": directory, "level": level, "risk_level": "ALL", "statistics": block}
    config.write_text(json.dumps(settings), encoding="utf-8")
    torch.set_num_threads(1)
    debugger = PrecisionDebugger(config_path=str(config))
    for case in CASES.values():
        torch.manual_seed(0)
        model, step = case()
        debugger.start(model)
        step()
        debugger.stop()
        debugger.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
