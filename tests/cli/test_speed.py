"""A large dump is shown at once, and without torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from .conftest import forward, tensor, write_step


def test_ten_thousand_entries(tmp_path: Path) -> None:
    """About 1 s where a processor is free; the bound leaves room for a busy one."""
    write_step(
        tmp_path / "step0" / "rank0",
        {f"Functional.linear.{number}.forward": forward(tensor(8, 64), tensor(8, 64)) for number in range(10_000)},
    )
    command = [sys.executable, "-m", "msprobe_graph.cli", "show", tmp_path]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    assert done.stdout.count("Functional.linear.") == 20_000
    assert seconds < 6


def test_torch_is_not_imported() -> None:
    code = "import sys, msprobe_graph.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
