"""What a decode step and a prefill of vLLM cost on a GPU: untapped, asked to capture but switched off, capturing.

    python tests/benchmarks/gpu_vllm.py 0.5b [--requests 8 64] [--level L0 mix L0:tensor] [--rounds 5] [--no-prefill]
                                             [--vllm JSON]

vLLM runs as it starts by itself, with CUDA graphs and each engine in a process of its own, on a Qwen2 of the size 0.5b
or 7b with dummy weights in bfloat16; tiny is for trying this out, on a CPU, too. One engine is untapped; there is one
more for each level (with task statistics, if none follows a colon), in which capture is switched on and off in turn by
msprobe_start and msprobe_stop. They are started at once, live at once on the GPU and take turns within each round.

A decode step is the median, within 160 of all requests at once, of the time from one call of the worker's execute_model
to the next; its graph, of which there is none on a CPU, that of the replay on the GPU. A prefill is one request of 4096
tokens and one token for it, the median of some in a row; with task tensor it writes gigabytes. Medians of the rounds,
the ratio to untapped, and what a captured step takes on the disk, but for files that other steps have, too:

    7b                           untapped            off, L0             on, L0
    decode step, 8 requests      4.540 ms     4.598 ms  1.01     4.667 ms  1.03
    its graph, 8 requests        4.201 ms     4.261 ms  1.01     4.297 ms  1.02
    prefill of 4096            141.735 ms   141.737 ms  1.00   149.387 ms  1.05
    L0: 332 steps; decode, 8 requests: 0.44 MB, prefill: 0.46 MB
    tokens equal: yes

`--vllm` has further arguments for vllm.LLM, as JSON: '{"attention_config": {"backend": "TRITON_ATTN"}}'.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu_worker
from qwen2 import SHAPES, model_config

PROMPT, SHORT, LONG = 16, 8, 168
PREFILL = 4096
WARM, PREFILLS = 3, 3
VOCABULARY = 1000
"""The prompts' tokens are below this."""


def engine(options: argparse.Namespace, folder: Path, **given: Any) -> Any:
    from vllm import LLM

    (folder / "config.json").write_text(json.dumps(model_config(options.size)))
    least = {  # engines that start at once can't tell which memory is whose
        "kv_cache_memory_bytes": 3 << 30,
        "gpu_memory_utilization": 0.05,
        "max_num_seqs": max(options.requests),
        "compilation_config": {"cudagraph_capture_sizes": sorted(options.requests)},
    }
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2 * PREFILL,
        max_num_batched_tokens=2 * PREFILL,
        enable_prefix_caching=False,
        seed=0,
        **(least | json.loads(options.vllm) | given),
    )


class Engine:
    """An engine in a process of its own, which calls functions with it when it is told to."""

    def __init__(self, options: argparse.Namespace, folder: Path, **given: Any) -> None:
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        context.Process(target=_serve, args=(there, options, folder, given)).start()
        there.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(llm, *args)``; of a module, as it goes by its name. EOFError when the process is gone."""
        self._here.send((function, args))
        return self._here.recv()

    def stop(self) -> None:
        self._here.close()


def _serve(calls: Connection, options: argparse.Namespace, folder: Path, given: dict[str, Any]) -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for collective_rpc to take functions
    }
    llm = engine(options, folder, **given)
    llm.collective_rpc(gpu_worker.watch)
    with suppress(EOFError):
        while True:
            function, args = calls.recv()
            calls.send(function(llm, *args))


def generate(llm: Any, requests: int, length: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds, and what was generated."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    prompts = [
        {"prompt_token_ids": [(request * 37 + position * 11) % VOCABULARY for position in range(length)]}
        for request in range(requests)
    ]
    begin = time.perf_counter()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin, [list(answer.outputs[0].token_ids) for answer in answers]


def rpc(llm: Any, name: str) -> None:
    llm.collective_rpc(name)


def watched(llm: Any, requests: int, timing: bool) -> tuple[gpu_worker.Took, list[list[int]]]:
    """What decode steps took, and what was generated. timing: the graphs', too."""
    llm.collective_rpc(gpu_worker.begin, args=(timing,))
    _, tokens = generate(llm, requests, PROMPT, LONG)
    took, *_ = llm.collective_rpc(gpu_worker.end)
    return gpu_worker.Took(*took), tokens


def one_round(llm: Any, requests: list[int], prefill: bool) -> tuple[dict[str, float], list[list[list[int]]]]:
    """Milliseconds by what took them, and all that was generated. Everything is done before it is measured, a prefill
    three times: when capture is switched on, the first steps are described, and what a step has in common with those
    after it is worked out when it comes again, in another thread."""
    milliseconds: dict[str, float | None] = {}
    answers = []
    for number in requests:
        generate(llm, number, PROMPT, SHORT)
        generate(llm, number, PROMPT, SHORT)
        plain, _ = watched(llm, number, timing=False)
        timed, tokens = watched(llm, number, timing=True)
        milliseconds[f"decode step, {number} requests"] = plain.step
        milliseconds[f"its graph, {number} requests"] = timed.graph
        answers.append(tokens)
    if prefill:
        prefills = [generate(llm, 1, PREFILL, 1) for _ in range(WARM + PREFILLS)]
        seconds = statistics.median(seconds for seconds, _ in prefills[WARM:])
        milliseconds[f"prefill of {PREFILL}"] = seconds * 1e3
        answers += [tokens for _, tokens in prefills]
    return {what: took for what, took in milliseconds.items() if took is not None}, answers


class Measured:
    """What one kind of run took, in milliseconds, and what it generated."""

    def __init__(self, engine: Engine, switch: str | None = None) -> None:
        self.milliseconds: dict[str, list[float]] = defaultdict(list)
        self.tokens: list[list[list[int]]] = []
        self._engine = engine
        self._switch = switch

    def round(self, requests: list[int], prefill: bool) -> None:
        if self._switch is not None:
            self._engine.call(rpc, self._switch)
        took, self.tokens = self._engine.call(one_round, requests, prefill)
        for what, milliseconds in took.items():
            self.milliseconds[what].append(milliseconds)

    def median(self, what: str) -> float:
        """Over all rounds but the first, which warms up."""
        return statistics.median(self.milliseconds[what][1:])


def kinds(options: argparse.Namespace, folder: Path) -> tuple[list[Engine], dict[str, Measured]]:
    """The engines, and the kinds of run by name, untapped first."""
    plain = Engine(options, folder / "untapped")
    engines, found = [plain], {"untapped": Measured(plain)}
    for level in options.level:
        name, _, task = level.partition(":")
        config = {"task": task or "statistics", "level": name, "dump_path": str(folder / level / "dump")}
        tapped = Engine(options, folder / level, additional_config={"dump_config": config})
        engines.append(tapped)
        found[f"off, {level}"] = Measured(tapped, "msprobe_stop")
        found[f"on, {level}"] = Measured(tapped, "msprobe_start")
    return engines, found


def report(options: argparse.Namespace, folder: Path, measured: dict[str, Measured]) -> None:
    plain = measured["untapped"]
    print(f"{options.size:25}{'untapped':>12}" + "".join(f"{kind:>19}" for kind in measured if kind != "untapped"))
    for what in plain.milliseconds:
        base = plain.median(what)
        line = f"{what:25}{base:9.3f} ms"
        for kind, other in measured.items():
            if kind != "untapped":
                line += f"{other.median(what):10.3f} ms{other.median(what) / base:6.2f}"
        print(line)
    for level in options.level:
        steps = list((folder / level / "dump").glob("step*/*"))
        taken: dict[str, list[int]] = defaultdict(list)
        for step in steps:
            taken[kind_of(step)].append(size_of(step))
        asked = [*(f"decode, {requests} requests" for requests in options.requests), "prefill"]
        told = ", ".join(f"{kind}: {statistics.median(taken[kind]) / 1e6:.2f} MB" for kind in asked if taken[kind])
        print(f"{level}: {len(steps)} steps; {told}")
    equal = all(other.tokens == plain.tokens for other in measured.values())
    print(f"tokens equal: {'yes' if equal else 'no'}")


def size_of(step: Path) -> int:
    """Bytes of its files; those that several steps have are in none, and several names of one file count once."""
    found = [file.stat() for file in step.rglob("*")]
    names = Counter(each.st_ino for each in found)
    return sum({each.st_ino: each.st_size for each in found if each.st_nlink == names[each.st_ino]}.values())


def kind_of(step: Path) -> str:
    """What was computed in a step, by its folder."""
    requests = json.loads((step / "manifest.json").read_text())["requests"]
    if all(request["phase"] == "decode" for request in requests):
        return f"decode, {len(requests)} requests"
    return "prefill" if requests[0]["end"] == PREFILL else "others"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--requests", type=int, nargs="+", default=[8])
    parser.add_argument("--level", nargs="+", default=["L0"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--vllm", default="{}", help="further arguments for vllm.LLM, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        engines, measured = kinds(options, Path(name))
        try:
            for _ in range(1 + options.rounds):
                for kind in measured.values():
                    kind.round(options.requests, options.prefill)
        finally:
            for each in engines:
                each.stop()
        report(options, Path(name), measured)


if __name__ == "__main__":
    main()
