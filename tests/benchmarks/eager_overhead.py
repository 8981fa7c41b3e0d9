"""What eager capture costs: `python tests/benchmarks/eager_overhead.py [--msprobe PYTHON]`.

12 pre-norm transformer layers, hidden 256, sequence 64, batch 1, inference on the CPU; task statistics, default
risk_level, writing included. Rounds of plain and captured forwards alternate; a captured forward is start, forward,
stop and step, and the last one of a round waits until all is on disk. Printed are medians over the rounds. With
--msprobe, the python of an environment that has mindstudio-probe runs msProbe's PrecisionDebugger the same way.

               plain    captured    ratio
    ours L0    24.1 ms   26.2 ms    1.09
    ...
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformer import Block

LAYERS, HIDDEN, HEADS, SEQUENCE = 12, 256, 4, 64
LEVELS = ("L0", "L1", "mix")


class Timing(NamedTuple):
    """Milliseconds a forward, medians over the rounds."""

    plain: float
    captured: float
    ratio: float
    """The median of the rounds' ratios."""


def milliseconds(call: Callable[[], object], times: int, end: Callable[[], object] = lambda: None) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    end()
    return (time.perf_counter() - begin) * 1e3 / times


def measure(debugger: Any, flush: Callable[[], object], rounds: int, forwards: int) -> Timing:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(HIDDEN, HEADS) for _ in range(LAYERS))).eval()
    untouched = copy.deepcopy(model)  # stop() leaves the hooks on the other
    x = torch.randn(1, SEQUENCE, HIDDEN)

    def captured() -> None:
        debugger.start(model)
        model(x)
        debugger.stop()
        debugger.step()

    with torch.no_grad():
        milliseconds(lambda: untouched(x), 5)
        milliseconds(captured, 2, flush)
        plain, watched = [], []
        for _ in range(rounds):
            plain.append(milliseconds(lambda: untouched(x), forwards))
            watched.append(milliseconds(captured, forwards, flush))
    ratios = [captured / plain for plain, captured in zip(plain, watched, strict=True)]
    return Timing(statistics.median(plain), statistics.median(watched), statistics.median(ratios))


def ours(level: str, folder: str) -> tuple[Any, Callable[[], object]]:
    from msprobe_graph import PrecisionDebugger

    debugger = PrecisionDebugger({"task": "statistics", "level": level, "dump_path": folder})
    return debugger, debugger.flush


def msprobes(level: str, folder: str) -> tuple[Any, Callable[[], object]]:
    from msprobe.pytorch import PrecisionDebugger  # type: ignore[import-not-found, unused-ignore]

    config = Path(folder) / "config.json"
    block = {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"}
    config.write_text(json.dumps({"task": "statistics", "level": level, "dump_path": folder, "statistics": block}))
    return PrecisionDebugger(config_path=str(config)), lambda: None  # step() writes


def in_subprocess(python: str, level: str, options: argparse.Namespace) -> Timing:
    """msProbe's timing; a process for each level, because msProbe has one debugger in each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, "--level", level, "--folder", folder, "--threads", str(options.threads)]
        command += ["--rounds", str(max(1, options.rounds // 3)), "--forwards", str(max(1, options.forwards // 3))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Timing(**json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--msprobe", metavar="PYTHON", help="python of an environment with mindstudio-probe")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--forwards", type=int, default=10, help="forwards a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--level", help=argparse.SUPPRESS)  # in_subprocess
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.folder:
        timing = measure(*msprobes(options.level, options.folder), options.rounds, options.forwards)
        print("\n" + json.dumps(timing._asdict()))
        return
    print(f"{'':14}{'plain':>9}{'captured':>12}{'ratio':>9}")
    for level in LEVELS:
        with tempfile.TemporaryDirectory() as folder:
            report("ours", level, measure(*ours(level, folder), options.rounds, options.forwards))
        if options.msprobe:
            report("msProbe", level, in_subprocess(options.msprobe, level, options))


def report(whose: str, level: str, timing: Timing) -> None:
    print(f"{whose:8}{level:6}{timing.plain:6.1f} ms{timing.captured:9.1f} ms{timing.ratio:9.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
