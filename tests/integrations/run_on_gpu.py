"""One vLLM engine on a GPU, in a process of its own; prints what it generated and which CUDA graphs it used.

run_on_gpu.py '{"cudagraphs": "FULL_AND_PIECEWISE", "config": {...} or null, "cache": folder, "ranks": 1}'

`cudagraphs` is a mode of vLLM's, or null: eager. A tiny Qwen2 with dummy weights in bfloat16, four requests, of which
one is over early: the steps after it have a row of padding in a graph of four.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LENGTHS, TOKENS = [7, 16, 3, 5], [6, 3, 6, 6]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def options(asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"tensor_parallel_size": asked["ranks"]}
    if asked["config"] is not None:
        found["additional_config"] = {"dump_config": asked["config"]}
    if asked["cudagraphs"] is None:
        return {**found, "enforce_eager": True}
    compilation = {"cudagraph_mode": asked["cudagraphs"], "cudagraph_capture_sizes": [4, 32]}
    return {**found, "compilation_config": compilation}


def main(asked: dict[str, Any]) -> None:
    os.environ.update(ENVIRONMENT, VLLM_CACHE_ROOT=asked["cache"])
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from vllm import LLM, SamplingParams

    from tests.benchmarks.qwen2 import model_config

    folder = Path(asked["cache"], "model")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model_config("tiny")))
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 * 2**20,
        gpu_memory_utilization=0.02,
        enable_prefix_caching=False,
        attention_config={"backend": "TRITON_ATTN"},
        seed=0,
        **options(asked),
    )
    prompts = [
        {"prompt_token_ids": [(request * 37 + position * 11) % 1000 for position in range(length)]}
        for request, length in enumerate(LENGTHS)
    ]
    wanted = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in TOKENS]
    tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, wanted, use_tqdm=False)]
    used = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
    print("RESULT", json.dumps({"tokens": tokens, "cudagraphs": used}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
