"""What the tests of vLLM share."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph import install_as_msprobe


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is fastest with one thread; and vLLM would bind those of this process to cores, for good."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        set_num_threads(1)
        yield
    torch.set_num_threads = set_num_threads  # vLLM has put something else there
    set_num_threads(threads)


@pytest.fixture
def as_msprobe() -> Iterator[None]:
    """``msprobe.pytorch`` is ours, for one test."""
    if importlib.util.find_spec("msprobe") is not None:
        pytest.skip("msProbe is installed")
    assert install_as_msprobe()
    yield
    for name in ("msprobe.pytorch", "msprobe"):
        sys.modules.pop(name)


@pytest.fixture(scope="package")
def untouched(tiny_model: Path) -> dict[str, Any]:
    """What vLLM does, in a process of its own, when nobody asks to capture."""
    code = f"""
        import json, sys
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from pathlib import Path
        from integrations.engines import engine, generate, worker
        with engine(Path({str(tiny_model)!r})) as llm:
            tokens = generate(llm)
            own = [name for name in vars(worker(llm)) if "execute" in name or "msprobe" in name]
            wrapped = [name for name in own if callable(vars(worker(llm))[name])]
        loaded = sorted(name for name in sys.modules if name.startswith("msprobe_graph"))
        print("RESULT", json.dumps({{"tokens": tokens, "wrapped": wrapped, "loaded": loaded}}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=180).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result
