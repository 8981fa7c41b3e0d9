"""What graph mode costs: `python tests/benchmarks/graph_overhead.py [--dtype …] [--fidelity …]`.

12 pre-norm transformer layers, hidden 512, sequence 128, batch 4, inference on the CPU with one thread; task
statistics, level mix. The untapped compile and ours run in rounds of 3 forwards that alternate; a captured forward is
start, forward, stop and step, and the last one of a round waits until all is on disk. Printed are the medians of 15
rounds, the median of the rounds' ratios, and the compile times, each from cold caches.

    float32  exact   plain 398.0 ms   captured 409.7 ms   ratio 1.03   compile 13.4 s -> 14.7 s (1.10)   outputs equal
    ...
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import nn
from torch._inductor.utils import fresh_cache
from transformer import Block

from msprobe_graph import PrecisionDebugger, msprobe_backend

HIDDEN, HEADS, SEQUENCE, BATCH = 512, 8, 128, 4
FORWARDS = 3
"""In a round."""


def seconds(call: Callable[[], object], times: int = 1, end: Callable[[], object] = lambda: None) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    end()
    return (time.perf_counter() - begin) / times


def measure(dtype: torch.dtype, fidelity: str, layers: int, rounds: int) -> str:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(*(Block(HIDDEN, HEADS) for _ in range(layers))).eval().to(dtype)
    x = torch.randn(BATCH, SEQUENCE, HIDDEN).to(dtype)
    kept: dict[str, Any] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        plain = torch.compile(model)
        with fresh_cache():
            compile_plain = seconds(lambda: kept.update(plain=plain(x)))
        debugger = PrecisionDebugger({"task": "statistics", "level": "mix", "dump_path": folder})
        tapped = torch.compile(model, backend=msprobe_backend, options={"fidelity": fidelity})

        def captured() -> None:
            debugger.start(tapped)
            kept["tapped"] = tapped(x)
            debugger.stop()
            debugger.step()

        with fresh_cache():  # or it would find the functions that the plain one has compiled
            compile_tapped = seconds(captured)
        captured()
        pairs = [
            (seconds(lambda: plain(x), FORWARDS), seconds(captured, FORWARDS, debugger.flush)) for _ in range(rounds)
        ]
    usual, watched = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    equal = "equal" if torch.equal(kept["plain"], kept["tapped"]) else "differ"
    return (
        f"{str(dtype).removeprefix('torch.'):8}  {fidelity:5}  plain {usual:6.1f} ms  captured {watched:6.1f} ms  "
        f"ratio {ratio:.2f}  compile {compile_plain:.1f} s -> {compile_tapped:.1f} s "
        f"({compile_tapped / compile_plain:.2f})  outputs {equal}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--fidelity", nargs="+", default=["exact", "full"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    torch.compile(nn.Linear(1, 1))(torch.ones(1))  # the first compilation of a process loads the compiler, too
    for dtype, fidelity in itertools.product(options.dtype, options.fidelity):
        print(measure(getattr(torch, dtype), fidelity, options.layers, options.rounds), flush=True)


if __name__ == "__main__":
    main()
