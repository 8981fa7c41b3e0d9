"""Reading dumps, ours and msProbe's, and what is said of folders that hold none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph.config import load_settings
from msprobe_graph.dump.reader import DumpError, read, steps
from msprobe_graph.dump.records import Entry, Step
from msprobe_graph.taps.recorder import Recorder

from .conftest import NewWriter

MSPROBES = """{
 "task": "statistics", "level": "mix", "framework": "pytorch", "dump_data_dir": null,
 "data": {
  "Functional.linear.0.forward": {
   "input_args": [
    {"type": "torch.Tensor", "dtype": "torch.float32", "shape": [1, 2], "Max": NaN, "Min": -Infinity, "Mean": NaN,
     "Norm": NaN, "requires_grad": false},
    {"type": "str", "value": "nan"}],
   "input_kwargs": {},
   "output": [[null, {"type": "torch.Tensor", "dtype": "torch.float32", "shape": [], "Max": 1.0, "Min": 1.0,
                      "Mean": 1.0, "Norm": 1.0, "requires_grad": false}]]}}}
"""


def place(folder: Path, text: str = MSPROBES, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dump.json").write_text(text)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


def test_ours_come_back(new_writer: NewWriter) -> None:
    writer = new_writer(task="tensor", level="L1")
    recorder = Recorder(load_settings({"dump_path": str(writer.files.dump_path), "task": "tensor"}), writer)
    x, y = torch.tensor([math.nan, math.inf]), torch.randn(3)
    parts: dict[str, Any] = {
        "input_args": [recorder.value(x, "Torch.f.0.forward.input.0")],
        "input_kwargs": {"other": [recorder.value({"deep": y}, "Torch.f.0.forward.kwargs.other.0")]},
        "output": [recorder.value("nan", None)],
    }
    recorder.entries["Torch.f.0.forward"] = Entry("Torch.f.0.forward", parts)
    writer.submit(recorder.as_step(True, 0, 0, [], []))
    writer.flush()

    (folder,) = steps(writer.files.dump_path)
    step = read(folder)
    assert (step.task, step.level, step.finished) == ("tensor", "L1", True)
    assert step.manifest is not None
    first, second = step.tensors()
    assert (first.entry, first.position) == ("Torch.f.0.forward", "input_args.0")
    assert second.position == "input_kwargs.other.0.deep"
    assert math.isnan(first.record["Max"])
    assert step.data["Torch.f.0.forward"]["output"][0]["value"] == "nan"  # a string stays one
    assert torch.equal(step.load(second), y)
    assert torch.equal(step.load(first), x) is False  # NaN
    assert torch.equal(step.load(first).isnan(), x.isnan())


def test_msprobes_are_read(tmp_path: Path) -> None:
    step = read(place(tmp_path / "step0" / "rank0"))
    assert step.manifest is None
    assert step.finished
    assert (step.construct, step.stack) == ({}, {})
    first, second = step.tensors()
    assert math.isnan(first.record["Max"])
    assert first.record["Min"] == -math.inf
    assert second.position == "output.0.1"


def test_steps_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (10, 2, 0):
        for process in ("rank10", "rank9", "rank0"):
            place(tmp_path / f"step{step}" / process)
    order = [(folder.parent.name, folder.name) for folder in steps(tmp_path)]
    assert order == [(f"step{step}", f"rank{rank}") for step in (0, 2, 10) for rank in (0, 9, 10)]
    assert steps(tmp_path / "step2") == [tmp_path / "step2" / f"rank{rank}" for rank in (0, 9, 10)]
    assert steps(tmp_path / "step2" / "rank0") == [tmp_path / "step2" / "rank0"]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: path / "nowhere", "is no folder"),
        (lambda path: path, "holds no dump.json: expected a dump_path"),
    ],
)
def test_no_dump_is_one_sentence(tmp_path: Path, prepare: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(DumpError, match=said) as raised:
        steps(prepare(tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "files", "said"),
    [
        ("{", {}, "dump.json can't be read as JSON"),
        ("[]", {}, "dump.json holds a JSON list: expected an object"),
        ('{"data": []}', {}, "dump.json holds no entries"),
        ("{}", {}, "dump.json holds no entries"),
        (MSPROBES, {"stack": "x"}, "stack.json can't be read as JSON"),
        (MSPROBES, {"manifest": '{"schema_version": 99}'}, "schema version 99; this version .* reads up to 1"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, files: dict[str, str], said: str) -> None:
    with pytest.raises(DumpError, match=said) as raised:
        read(place(tmp_path / "rank0", text, **files))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_reading_no_dump(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match=r"can't be read as JSON: .*No such file"):
        read(tmp_path)


def test_values_that_are_not_there(tmp_path: Path, new_writer: NewWriter) -> None:
    step = read(place(tmp_path / "rank0"))
    with pytest.raises(DumpError, match=r"linear.0.forward input_args.0 in .* has statistics but no saved values"):
        step.load(next(step.tensors()))
    named = json.loads(MSPROBES.replace("NaN", "0").replace("-Infinity", "0"))
    named["data"]["Functional.linear.0.forward"]["input_args"][0]["data_name"] = "lost.pt"
    step = read(place(tmp_path / "rank0", json.dumps(named)))
    with pytest.raises(DumpError, match=r"lost.pt"):
        step.load(next(step.tensors()))


def test_an_unfinished_step_reads(new_writer: NewWriter) -> None:
    writer = new_writer()
    writer.submit(Step(0, [Entry("Torch.f.0.forward", {})]))
    writer.flush()
    assert not read(writer.files.folder(0)).finished
