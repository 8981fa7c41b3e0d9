"""Runs the tests of a device with a device of our own, in processes of their own: torch can't take one back.

Once under a name that nobody knows, and once as "npu", for what is there for Ascend alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .host_device import build

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build(tmp_path_factory.mktemp("host_device"))
    if built is None:
        pytest.skip("no C++ compiler")
    return built


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hostdev", "npu"])
def test_on_a_device_of_our_own(library: Path, name: str) -> None:
    environment = os.environ | {"HOST_DEVICE": name, "HOST_DEVICE_LIBRARY": str(library)}
    files = [HERE / "on_device.py", HERE / "graph_copies.py", HERE.parent / "taps" / "test_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.device.host_device", "-o", "cache_dir=/dev/null"]
    done = subprocess.run(
        [*command, *map(str, files)], cwd=HERE.parent.parent, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
