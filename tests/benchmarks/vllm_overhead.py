"""What a decode step of vLLM costs: untouched, asked to capture but switched off, and capturing. On the CPU.

    python tests/benchmarks/vllm_overhead.py MODEL [--mode 2] [--level L0] [--rounds 3]

MODEL is the folder of a model (examples/vllm_cpu/tiny_model.py makes a tiny one; the smaller, the more a tap counts).
Engines follow one another in one process, in turn; of each the median step of 8 requests counts, of each kind the best.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

KINDS = ("untouched", "off", "on")
WARM = 20
"""Steps that are not measured."""


def step_time(model: Path, kind: str, options: argparse.Namespace, folder: Path) -> float:
    """The median time of a decode step, in seconds."""
    from vllm import SamplingParams

    from tests.integrations.engines import engine

    given: dict[str, Any] = {"enforce_eager": options.mode == 0}
    if options.mode:
        given["compilation_config"] = {"mode": options.mode}
    if kind != "untouched":
        config = folder / "config.json"
        config.write_text(json.dumps({"level": options.level, "dump_path": str(folder / "dump")}))
        given["additional_config"] = {"dump_config_path": str(config)}
    with engine(model, **given) as llm:
        if kind == "off":
            llm.collective_rpc("msprobe_stop")
        sampling = SamplingParams(temperature=0, max_tokens=options.steps, ignore_eos=True)
        for request in range(8):
            llm.llm_engine.add_request(str(request), "hello", sampling)
        times = []
        while llm.llm_engine.has_unfinished_requests():
            begin = time.perf_counter()
            llm.llm_engine.step()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--mode", type=int, default=2, choices=(0, 2), help="vLLM's compilation mode; 0: eager")
    parser.add_argument("--level", default="L0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    best = dict.fromkeys(KINDS, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = folder
        for _ in range(options.rounds):
            for kind in KINDS:
                best[kind] = min(best[kind], step_time(options.model, kind, options, Path(folder)))
    for kind, seconds in best.items():
        print(f"{kind:10} {seconds * 1e3:7.3f} ms a step, {seconds / best['untouched']:.3f} of untouched")


if __name__ == "__main__":
    main()
