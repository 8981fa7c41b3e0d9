"""What the documents say about code, run: blocks marked ``python runnable``, the example, the commands of `show`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from msprobe_graph.cli import main

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "docs/eager.md", "docs/graph.md", "docs/dump-format.md"]

_RUNNABLE = re.compile(r"^```python runnable\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHOW = re.compile(r"\bmsprobe-graph (show dump[^`#\n]*)")
_LINK = re.compile(r"\]\((?!http)([^)#]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_runs_and_then_the_commands(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CHECKOUT / document).read_text()
    blocks = _RUNNABLE.findall(text)
    assert blocks
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    for command in _SHOW.findall(text):
        assert main(shlex.split(command)) == 0


def test_example_shows_the_table_of_the_readme(tmp_path: Path) -> None:
    command = [sys.executable, CHECKOUT / "examples" / "eager" / "capture.py", tmp_path]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = {" ".join(line.split()) for line in out.splitlines()}
    in_readme = re.findall(
        r"^(?: {4}|!!? +)(?:Tensor|Module|Functional)\..*", (CHECKOUT / "README.md").read_text(), re.M
    )
    assert len(in_readme) == 8
    first_columns = {line.partition(" float32 ")[0] for line in shown}  # random numbers may differ between versions
    assert {" ".join(row.split()).partition(" float32 ")[0] for row in in_readme} <= first_columns
    assert "17 of 38 tensors suspicious: Tensor.div.0.forward makes the first NaN" in shown


def test_tensor_records_of_the_format_are_what_is_written(tmp_path: Path) -> None:
    code = """
import torch
from msprobe_graph import PrecisionDebugger
nan, inf = float("nan"), float("inf")
with PrecisionDebugger({"dump_path": "dump", "level": "L1"}).start():
    torch.div(torch.tensor([3, 4, inf]), 1)
    torch.div(torch.tensor([3, nan, -inf]), 1)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    (dump,) = tmp_path.glob("dump/step0/*/dump.json")
    records = re.findall(
        r'^{"type":"torch.Tensor".*}$', (CHECKOUT / "docs" / "dump-format.md").read_text(), re.MULTILINE
    )
    assert len(records) == 2
    assert all(record in dump.read_text() for record in records)


def test_manifest_fields_of_the_format_are_what_is_written(tmp_path: Path) -> None:
    code = """
from msprobe_graph import PrecisionDebugger
with PrecisionDebugger({"dump_path": "dump", "level": "L1"}).start():
    pass
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    (manifest,) = tmp_path.glob("dump/step0/*/manifest.json")
    section = (CHECKOUT / "docs" / "dump-format.md").read_text().partition("## manifest.json")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z_, ]+) \|", section, re.MULTILINE)
    assert {name for row in rows[1:] for name in row.split(", ")} == set(json.loads(manifest.read_text()))


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/tutorial.md", "docs/configuration.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = CHECKOUT / document
    missing = {link for link in _LINK.findall(path.read_text()) if not (path.parent / link).exists()}
    assert missing <= {"docs/vllm.md", "vllm.md"}
