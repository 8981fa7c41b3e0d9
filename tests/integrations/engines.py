"""Real vLLM engines on the CPU, for the tests in this folder."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # nothing of ours is imported here: a test looks at what a vLLM that isn't asked to capture imports
    from msprobe_graph.dump.reader import StepDump

PROMPTS = ["Explain gravity in one sentence.", "The quick", "Intermediate tensors are captured"]
TOKENS = [2, 5, 5]  # of which the first request ends early: the batch is then laid out in another order than scheduled
LONG = 200
"""Tokens that take a server that rests in its steps longer to make than it takes to tell it a few things meanwhile."""
OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 2**20}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An LLM with its worker in this process, eager unless asked otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(model), **(OPTIONS | {"enforce_eager": True} | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def worker(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


def generate(llm: Any, prompts: list[str] = PROMPTS, tokens: list[int] = TOKENS) -> list[list[int]]:
    """The likeliest tokens after each prompt, all prompts at once: as many steps as the largest number in `tokens`."""
    from vllm import SamplingParams

    wanted = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in tokens]
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, wanted, use_tqdm=False)]


def hooks(llm: Any) -> int:
    """All but the one on the root with which the plugin follows the steps."""
    model = worker(llm).get_model()
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()) - 1


def step_through(llm: Any, between: dict[int, Callable[[], object]], steps: int = 6) -> dict[int, bool]:
    """Serve one request, with acts before some of its steps. By step: whether hooks were in place after it."""
    from vllm import SamplingParams

    serving = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    serving.add_request(f"request{time.monotonic_ns()}", PROMPTS[0], params)
    hooked = {}
    for number in range(steps):
        between.get(number, lambda: None)()
        serving.step()
        hooked[number] = hooks(llm) > 0
    assert not serving.has_unfinished_requests()
    return hooked


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def dumped(dump: Path) -> list[StepDump]:
    from msprobe_graph.dump import reader

    return [reader.read(folder) for folder in reader.steps(dump)]


def rows(step: StepDump) -> dict[str, slice]:
    """The rows of each request, in the order of the manifest."""
    assert step.manifest is not None
    return {each["request"]: slice(each["begin"], each["end"]) for each in step.manifest["requests"]}


class Server:
    """``vllm serve`` with workers of its own, in a session that can be killed whole."""

    def __init__(self, model: Path, log: Path, *options: str, eager: bool = True, **variables: str) -> None:
        """`options` of the command line, and `variables` of its environment."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log = log
        given = {
            "--served-model-name": "tiny",
            "--host": "127.0.0.1",
            "--port": self.url.rpartition(":")[2],
            **{f"--{name.replace('_', '-')}": str(value) for name, value in OPTIONS.items()},
        }
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
        command += ["--enforce-eager"] if eager else []
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **variables}
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [*command, *(word for pair in given.items() for word in pair), *options],
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 180) -> bool:
        """Whether it came to serve, rather than to an end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), OPENER.open(f"{self.url}/health", timeout=5):
                return True
            time.sleep(0.3)
        return False

    def complete(self, prompt: str, tokens: int, request_id: str) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = self._post("v1/completions", {**body, "return_token_ids": True}, request_id)
        return list(answer["choices"][0]["token_ids"])

    def rpc(self, method: str) -> list[str]:
        """What each worker returns; needs VLLM_SERVER_DEV_MODE=1."""
        return list(self._post("collective_rpc", {"method": method})["results"])

    def _post(self, path: str, body: dict[str, Any], request_id: str = "none") -> Any:
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        with OPENER.open(request, timeout=120) as response:
            return json.load(response)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
