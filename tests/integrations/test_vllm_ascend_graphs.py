"""Runs the tests of vllm-ascend's graphs with a device of our own as "npu", in a process of their own: torch can't take
a device back, and vLLM no platform."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..device.host_device import build

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.vllm
def test_on_a_device_of_our_own(tmp_path: Path, wheel_folder: Path) -> None:
    if importlib.util.find_spec("msprobe") is not None:
        pytest.skip("msProbe is installed")
    library = build(tmp_path)
    if library is None:
        pytest.skip("no C++ compiler")
    environment = os.environ | {"HOST_DEVICE": "npu", "HOST_DEVICE_LIBRARY": str(library)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.device.host_device"]
    command += ["-o", f"cache_dir={wheel_folder.parents[1]}", str(HERE / "on_npu.py")]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
