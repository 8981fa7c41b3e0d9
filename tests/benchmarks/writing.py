"""What writing 10,800 entries takes: `python tests/benchmarks/writing.py [--msprobe PYTHON]`.

One step of 900 forwards of 12 linears, level L1: the seconds from the step's end until it is on disk, and those of the
whole step, less those of the same forwards without capture. With --msprobe, the python of an environment that has
mindstudio-probe runs msProbe's PrecisionDebugger the same way; it writes while it captures.

    10800 entries   at the end 0.6 s   in all 1.3 s
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORWARDS, LAYERS = 900, 12


def run(debugger: Any, flush: Any, folder: str) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))
    x = torch.randn(4, 8)
    with torch.no_grad():
        begin = time.perf_counter()
        for _ in range(FORWARDS):
            model(x)
        plain = time.perf_counter() - begin
        begin = time.perf_counter()
        debugger.start(model)
        for _ in range(FORWARDS):
            model(x)
        debugger.stop()
        ended = time.perf_counter()
        debugger.step()
        flush()
        written = time.perf_counter()
    (dump,) = Path(folder).glob("step0/*/dump.json")
    entries = len(json.loads(dump.read_text())["data"])
    print(f"{entries} entries   at the end {written - ended:.2f} s   in all {written - begin - plain:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--msprobe", metavar="PYTHON", help="python of an environment with mindstudio-probe")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder:
        from msprobe.pytorch import PrecisionDebugger  # type: ignore[import-not-found, unused-ignore]

        config = Path(options.folder) / "config.json"
        block = {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"}
        settings = {"task": "statistics", "level": "L1", "dump_path": options.folder, "statistics": block}
        config.write_text(json.dumps(settings))
        run(PrecisionDebugger(config_path=str(config)), lambda: None, options.folder)
        return
    from msprobe_graph import PrecisionDebugger as Debugger

    with tempfile.TemporaryDirectory() as folder:
        debugger = Debugger({"task": "statistics", "level": "L1", "dump_path": folder})
        run(debugger, debugger.flush, folder)
    if options.msprobe:
        with tempfile.TemporaryDirectory() as folder:
            command = [options.msprobe, __file__, "--folder", folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print("msProbe:", output.splitlines()[-1])


if __name__ == "__main__":
    main()
