"""Capture one request to real vLLM on the CPU, and look at what was captured.

    make demo        (or, where vLLM for the CPU and msprobe-graph are installed: python demo.py)

It does what a user does: write a config.json, point `vllm serve` at it, send a request, look at the dump. Everything
it makes is in the folder output/ beside this file, afresh each time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from tiny_model import make_model

OUTPUT = Path(__file__).resolve().parent / "output"
PROMPT = "Explain gravity in one sentence."
SECONDS_TO_START = 300  # a slow machine's first start; usually it takes about 30
BIN = Path(sys.executable).parent  # `vllm` and `msprobe-graph` of this very environment
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy on the way to 127.0.0.1
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HOME": str(OUTPUT / "cache" / "huggingface"),
    "VLLM_CACHE_ROOT": str(OUTPUT / "cache" / "vllm"),
    "VLLM_CONFIG_ROOT": str(OUTPUT / "cache" / "vllm-config"),
}


def main() -> None:
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    model = make_model(OUTPUT / "model")

    dump = OUTPUT / "dump"
    config = OUTPUT / "config.json"
    config.write_text(json.dumps({"task": "statistics", "level": "L0", "dump_path": str(dump)}, indent=2) + "\n")

    print("Starting vllm serve (half a minute) ...", flush=True)
    with serve(model, config, log=OUTPUT / "server.log") as url:
        answer = complete(url, PROMPT, tokens=4)
    print(f"{PROMPT!r} -> {answer!r} (the weights are random)")

    steps = sorted(dump.glob("step*"), key=lambda step: int(step.name.removeprefix("step")))
    if not steps:
        sys.exit(f"No step was captured in {dump}; the server's log is {OUTPUT / 'server.log'}.")
    print(f"{len(steps)} steps were captured, one for each token. Here is {steps[0].name}, which read the prompt:\n")
    sys.stdout.flush()
    subprocess.run([BIN / "msprobe-graph", "show", steps[0]], check=True)
    print(f"\nThe dump is in {dump}")


@contextmanager
def serve(model: Path, config: Path, log: Path) -> Iterator[str]:
    """Run `vllm serve` with capture switched on, and give its address once it answers; its output goes to `log`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {
        "--additional-config": json.dumps({"dump_config_path": str(config)}),
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": str(port),
        # Small enough for any machine; giving the cache a size also skips a check against the machine's whole memory.
        "--dtype": "float32",
        "--max-model-len": "256",
        "--max-num-seqs": "8",
        "--kv-cache-memory-bytes": str(64 * 2**20),
    }
    command = [str(BIN / "vllm"), "serve", str(model), "--enforce-eager", *chain(*options.items())]
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(url, server)
        yield url
    except OSError as error:  # it ended, doesn't answer, or answers with an error
        sys.exit(f"{log.read_text(errors='replace')}\nvllm serve failed: {error} (its log, above, is {log})")
    finally:
        stop(server)


def wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConnectionError(f"it ended with exit code {server.returncode}")
        try:
            with OPENER.open(f"{url}/health", timeout=5):
                return
        except OSError:  # refused, or not answering yet
            time.sleep(0.5)
    raise TimeoutError(f"no answer within {SECONDS_TO_START} seconds")


def complete(url: str, prompt: str, tokens: int) -> str:
    """Ask for `tokens` more tokens after `prompt`, the likeliest each time."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with OPENER.open(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["text"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then end what is left of it and its workers."""
    server.terminate()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        print("The server did not end in 30 seconds: it is killed.", file=sys.stderr)
    with suppress(ProcessLookupError):  # nothing is left, as it should be
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    main()
