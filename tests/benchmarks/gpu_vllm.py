"""What a decode step and a prefill of vLLM cost on a GPU: untapped, asked to capture but switched off, capturing.

    python tests/benchmarks/gpu_vllm.py 0.5b [--requests 8] [--level L0] [--rounds 5] [--vllm JSON]

vLLM runs as it starts by itself, with CUDA graphs and its engine in a process of its own, on a Qwen2 of the size 0.5b
or 7b with dummy weights in bfloat16. One engine is untapped; in another capture is switched on and off in turn
(msprobe_start and msprobe_stop). A decode step is the time of 72 tokens less that of 8, over 64, for all requests at
once; a prefill is one request of 4096 tokens and one token for it. Medians of the rounds, and the ratio to untapped:

    7b, 8 requests, L0       untapped           switched off                     on
    decode step              4.686 ms        4.838 ms   1.03        5.546 ms   1.18
    prefill of 4096        136.292 ms      135.799 ms   1.00      153.179 ms   1.12
    tokens equal: yes; 332 steps captured

`--vllm` has further arguments for vllm.LLM, as JSON: '{"attention_config": {"backend": "TRITON_ATTN"}}'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"0.5b": (896, 4864, 24, 14, 2), "7b": (3584, 18944, 28, 28, 4)}
"""Hidden size, inner size, layers, heads, key-value heads."""
PROMPT, SHORT, LONG = 16, 8, 72
PREFILL = 4096
VOCABULARY = 1000
"""The prompts' tokens are below this."""


def model_config(size: str) -> dict[str, Any]:
    hidden, inner, layers, heads, groups = SHAPES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": size == "0.5b",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


def engine(options: argparse.Namespace, folder: Path, **given: Any) -> Any:
    from vllm import LLM

    (folder / "config.json").write_text(json.dumps(model_config(options.size)))
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2 * PREFILL,
        max_num_batched_tokens=2 * PREFILL,
        enable_prefix_caching=False,
        seed=0,
        **(json.loads(options.vllm) | given),
    )


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


class Measured:
    """What one kind of run took, in milliseconds, and what it generated."""

    def __init__(self) -> None:
        self.decode: list[float] = []
        self.prefill: list[float] = []
        self.tokens: list[list[int]] = []

    def round(self, llm: Any, requests: int) -> None:
        short, _ = generate(llm, requests, PROMPT, SHORT)
        long, self.tokens = generate(llm, requests, PROMPT, LONG)
        self.decode.append((long - short) / (LONG - SHORT) * 1e3)
        prefill, _ = generate(llm, 1, PREFILL, 1)
        self.prefill.append(prefill * 1e3)


def measure(llm: Any, options: argparse.Namespace, kinds: dict[str, Callable[[], object]]) -> dict[str, Measured]:
    """All kinds in turn, after a first round that warms up. Each has what is called before its rounds."""
    measured = {kind: Measured() for kind in kinds}
    for _ in range(1 + options.rounds):
        for kind, switch in kinds.items():
            switch()
            measured[kind].round(llm, options.requests)
    return measured


def untapped(options: argparse.Namespace, folder: Path) -> Measured:
    llm = engine(options, folder)
    return measure(llm, options, {"untapped": lambda: None})["untapped"]


def untapped_elsewhere(folder: Path) -> Measured:
    """The same in a process of its own, which gives the GPU's memory back."""
    found = folder / "untapped.json"
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--untapped", str(found)], check=True)
    measured = Measured()
    vars(measured).update(json.loads(found.read_text()))
    return measured


def tapped(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Measured], int]:
    """Switched off, and on; and how many steps were captured."""
    dump = folder / "dump"
    config = {"task": "statistics", "level": options.level, "dump_path": str(dump)}
    llm = engine(options, folder, additional_config={"dump_config": config})
    kinds = {"off": lambda: llm.collective_rpc("msprobe_stop"), "on": lambda: llm.collective_rpc("msprobe_start")}
    measured = measure(llm, options, kinds)
    return measured, len(list(dump.glob("step*")))


def line(name: str, plain: list[float], off: list[float], on: list[float]) -> str:
    base, *others = (statistics.median(times[1:]) for times in (plain, off, on))
    return f"{name:20}{base:10.3f} ms" + "".join(f"{time:13.3f} ms{time / base:7.2f}" for time in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--level", default="L0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", default="{}", help="further arguments for vllm.LLM, as JSON")
    parser.add_argument("--untapped", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["VLLM_CACHE_ROOT"] = name
        if options.untapped is not None:
            options.untapped.write_text(json.dumps(vars(untapped(options, folder))))
            return
        plain = untapped_elsewhere(folder)
        measured, steps = tapped(options, folder)
    off, on = measured["off"], measured["on"]
    title = f"{options.size}, {options.requests} requests, {options.level}"
    print(f"{title:22}{'untapped':>11}{'switched off':>23}{'on':>23}")
    print(line("decode step", plain.decode, off.decode, on.decode))
    print(line(f"prefill of {PREFILL}", plain.prefill, off.prefill, on.prefill))
    equal = plain.tokens == off.tokens == on.tokens
    print(f"tokens equal: {'yes' if equal else 'no'}; {steps} steps captured")


if __name__ == "__main__":
    main()
