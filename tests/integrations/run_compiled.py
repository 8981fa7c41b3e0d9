"""One vLLM engine in a process of its own, compiled or eager; prints what it generated.

run_compiled.py '{"model": ..., "mode": "2", "cache": ..., "config": {...} or null, "ranks": 1}'

Modes: "eager"; "2" and "3" with Inductor, "2-eager" and "3-eager" with vLLM's eager backend. vLLM takes mode 3 back on
a CPU, so that is undone here, and a pass is left out that needs operators of GPUs. More ranks than one, of tensor
parallelism, are workers of their own; what these generate is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PROMPTS = 8
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def restore_mode_3(backend: str) -> None:
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        check(cls, config)
        config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        config.compilation_config.backend = backend

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def options(mode: str, config: Any, config_file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config is not None:
        config_file.write_text(json.dumps(config))
        found["additional_config"] = {"dump_config_path": str(config_file)}
    if mode == "eager":
        return found
    number, _, backend = mode.partition("-")
    compilation: dict[str, Any] = {"mode": int(number), "backend": backend or "inductor"}
    if number == "3":
        restore_mode_3(backend or "inductor")
        off = dict.fromkeys(["fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant"], False)
        compilation |= {"compile_sizes": [], "pass_config": off}
    return {**found, "enforce_eager": False, "compilation_config": compilation}


def main(asked: dict[str, Any]) -> None:
    os.environ.update(ENVIRONMENT, VLLM_CACHE_ROOT=asked["cache"])
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from msprobe_graph.graph.generated import functions_of, generated_code
    from tests.integrations.engines import engine, generate, worker

    words = ["gravity", "the quick brown fox", "tensors", "a", "one two three four five six seven", "b c", "d", "e f g"]
    given = options(asked["mode"], asked["config"], Path(asked["cache"], "config.json"))
    given["tensor_parallel_size"] = asked["ranks"]
    with generated_code() as code, engine(Path(asked["model"]), **given) as llm:
        tokens = generate(llm, words[:PROMPTS], [2, 5, 3, 5, 4, 5, 2, 5])
        modules = worker(llm).get_model().modules() if asked["ranks"] == 1 else ()
        loaded = any(getattr(module, "was_aot_compile_fn_loaded_from_disk", False) for module in modules)
    functions = Counter(hashlib.sha256(function.source.encode()).hexdigest() for function in functions_of(code))
    print("RESULT", json.dumps({"tokens": tokens, "functions": functions, "loaded": loaded}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
elif __name__ == "__mp_main__":  # a worker of its own
    number, _, backend = json.loads(sys.argv[1])["mode"].partition("-")
    if number == "3":
        restore_mode_3(backend or "inductor")
