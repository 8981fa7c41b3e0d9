"""The writer: which files are on disk, in which order, and what is in them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph.config import load_settings
from msprobe_graph.dump import folder as folder_module
from msprobe_graph.dump import step_files
from msprobe_graph.dump.folder import write_folder, write_whole
from msprobe_graph.dump.lane import Lane, lanes
from msprobe_graph.dump.reader import DumpError, read, steps
from msprobe_graph.dump.records import Entry, Hole, Request, StackFrame, Step
from msprobe_graph.taps.recorder import Recorder

from .conftest import NewWriter, Strict


def test_files_of_a_step(new_writer: NewWriter, strict: Strict) -> None:
    writer = new_writer()
    stack = (StackFrame("<string>", 1, "main"),)
    entries = [
        Entry("Functional.linear.0.forward", {}, parent="Module.Model.forward.0", stack=stack),
        Entry("Module.Model.forward.0", {}, stack=stack),
        Entry("Module.Model.parameters_grad.0", {}, nested=False),
    ]
    writer.submit(
        Step(
            3,
            entries,
            holes=[Hole("Module.unused.Linear", "its forward did not run")],
            requests=[Request("r", 0, 2)],
            expected=2,
            captured=1,
            finished=True,
        )
    )
    writer.flush()
    folder = writer.files.dump_path / "step3" / "rank0"
    assert {file.name for file in folder.iterdir()} == {"dump.json", "stack.json", "construct.json", "manifest.json"}
    assert list(strict(folder / "dump.json")["data"]) == [entry.name for entry in entries]
    assert strict(folder / "construct.json") == {
        "Functional.linear.0.forward": "Module.Model.forward.0",
        "Module.Model.forward.0": None,
    }
    assert strict(folder / "stack.json") == {
        "0": [["Functional.linear.0.forward", "Module.Model.forward.0"], ["File <string>, line 1, in main, \n "]]
    }
    told = strict(folder / "manifest.json")
    assert (told["schema_version"], told["status"], told["step"], told["process"]) == (1, "finished", 3, "rank0")
    assert (told["mode"], told["device"], told["model"], told["entries"]) == ("eager", "cpu", "Model", 3)
    assert told["torch"] == torch.__version__
    assert told["sites"] == {"expected": 2, "captured": 1}
    assert told["holes"] == [{"site": "Module.unused.Linear", "reason": "its forward did not run"}]
    assert told["requests"] == [{"request": "r", "begin": 0, "end": 2}]


def test_construct_is_empty_at_L1(new_writer: NewWriter, strict: Strict) -> None:
    writer = new_writer(level="L1")
    writer.submit(Step(0, [Entry("Functional.linear.0.forward", {})], finished=True))
    writer.flush()
    assert strict(writer.files.folder(0) / "construct.json") == {}


def test_a_step_is_unfinished_until_its_last_file_is_written(
    new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after each number of files, a step reads as unfinished until the last."""
    finished = []
    for files in range(1, 5):
        left = files

        def cut(path: Path, content: bytes) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                write_whole(path, content)

        monkeypatch.setattr(step_files, "write_whole", write_whole)
        writer = new_writer()
        writer.submit(Step(0))
        writer.flush()
        monkeypatch.setattr(step_files, "write_whole", cut)
        writer.submit(Step(0, finished=True))
        writer.flush()
        finished.append(read(writer.files.folder(0)).finished)
    assert finished == [False, False, False, True]


def test_a_step_that_is_written_at_once_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Files(dict[str, bytes]):
        def items(self) -> Any:
            yield from [("dump.json", b"{}"), ("stack.json", b"{}")]
            raise Killed

    folder = tmp_path / "step0" / "rank0"
    with pytest.raises(Killed):
        write_folder(folder, Files(), {})
    assert not folder.exists()
    with pytest.raises(DumpError, match="holds no dump"):
        steps(tmp_path)
    write_folder(folder, {"dump.json": b'{"task": "statistics", "level": "L0", "data": {}}'}, {})
    assert steps(tmp_path) == [folder]


@pytest.mark.parametrize("compiled", [True, False])
def test_files_that_are_the_same_in_each_step_are_one(
    new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(folder_module, "_native", lambda: None)
    writer = new_writer()
    inodes: list[list[int]] = []
    for number, line in enumerate((1, 1, 1, 2)):
        if number == 2:
            shutil.rmtree(writer.files.folder(1))
        stack = (StackFrame(__file__, line, "forward"),)
        writer.submit(Step(number, [Entry("Module.a.A.forward.0", {}, stack=stack)], finished=True))
        writer.flush()
        folder = writer.files.folder(number)
        assert read(folder).stack["0"][1][0].split(", ")[1] == f"line {line}"
        inodes.append([(folder / name).stat().st_ino for name in ("stack.json", "construct.json", "dump.json")])

    def equal(one: int, other: int) -> list[bool]:
        return [a == b for a, b in zip(inodes[one], inodes[other], strict=True)]

    assert equal(0, 1) == [True, True, False]
    assert equal(0, 2) == [False, False, False], "the last step's are gone"
    assert equal(2, 3) == [False, True, False]


def test_what_is_left_of_a_step_is_no_way_into_the_files_of_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "step0" / "rank0", {"stack.json": b"one"}, {})
    left = tmp_path / "step1" / "rank0.part"
    left.mkdir(parents=True)
    (left / "stack.json").hardlink_to(tmp_path / "step0" / "rank0" / "stack.json")
    write_folder(tmp_path / "step1" / "rank0", {"stack.json": b"another"}, {})
    assert [(tmp_path / f"step{number}" / "rank0" / "stack.json").read_bytes() for number in (0, 1)] == [
        b"one",
        b"another",
    ]


def test_an_unfinished_step_says_so_and_may_grow(new_writer: NewWriter) -> None:
    writer = new_writer()
    writer.submit(Step(0, [Entry("Torch.a.0.forward", {})]))
    writer.flush()
    assert not read(writer.files.folder(0)).finished
    writer.submit(Step(0, [Entry("Torch.a.0.forward", {}), Entry("Torch.b.0.forward", {})], finished=True))
    writer.flush()
    assert read(writer.files.folder(0)).finished
    assert list(read(writer.files.folder(0)).data) == ["Torch.a.0.forward", "Torch.b.0.forward"]


def ten_thousand_entries(recorder: Recorder) -> None:
    """900 forwards of 12 entries, each with two tensors, a weight among them."""
    weights = [torch.randn(8, 8) for _ in range(12)]
    x = torch.randn(4, 8)
    stack = (StackFrame(__file__, 1, "forward"),)
    for forward in range(900):
        for layer, weight in enumerate(weights):
            name = f"Functional.linear.{12 * forward + layer}.forward"
            parts = {"input_args": [recorder.value(x, None), recorder.value(weight, None)], "input_kwargs": {}}
            parts["output"] = [recorder.value(x, None)]
            recorder.entries[name] = Entry(name, parts, f"layers.{layer}", forward, "Module.Model.forward.0", stack)


def test_writing_is_linear(new_writer: NewWriter) -> None:
    """10,800 entries at most 1 s (benchmarks/writing.py measures it); here with room for a busy machine."""
    writer = new_writer()
    recorder = Recorder(load_settings({"dump_path": str(writer.files.dump_path)}), writer)
    ten_thousand_entries(recorder)
    begin = time.perf_counter()
    writer.submit(recorder.as_step(True, 0, 0, [], []))
    writer.flush()
    assert time.perf_counter() - begin < 5
    assert len(read(writer.files.folder(0)).data) == 10_800


def test_the_same_values_are_one_file_on_disk(new_writer: NewWriter) -> None:
    writer = new_writer()
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    assert writer.save_again(0, "again.pt", saved)
    writer.flush()
    assert writer.save_again(1, "weight.pt", saved)
    writer.flush()
    files = [
        writer.files.tensor_file(0, "weight.pt"),
        writer.files.tensor_file(0, "again.pt"),
        writer.files.tensor_file(1, "weight.pt"),
    ]
    assert len({file.stat().st_ino for file in files}) == 1
    assert torch.equal(torch.load(files[2]), torch.arange(3))


def test_the_same_values_without_hard_links(new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    writer = new_writer()
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    assert writer.save_again(1, "weight.pt", saved)
    writer.flush()
    assert writer.files.failed is None
    assert torch.equal(torch.load(writer.files.tensor_file(1, "weight.pt")), torch.arange(3))


def test_values_whose_file_was_deleted_are_to_be_saved_anew(new_writer: NewWriter) -> None:
    writer = new_writer()
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    writer.flush()
    assert saved.value is None, "what is on disk takes no memory"
    writer.files.tensor_file(0, "weight.pt").unlink()
    assert not writer.save_again(1, "weight.pt", saved)
    writer.flush()
    assert writer.files.failed is None


@pytest.mark.parametrize("saves", [False, True])
def test_a_step_whose_folder_is_there_already_is_written_into_it(
    new_writer: NewWriter, tmp_path: Path, saves: bool
) -> None:
    """As by a process that was started anew within the same run."""
    first = new_writer(tmp_path / "dump")
    first.save(0, "x.pt", torch.ones(3))
    first.flush()
    writer = new_writer(tmp_path / "dump")
    if saves:
        writer.save(0, "y.pt", torch.ones(3))
    writer.submit(Step(0, [Entry("Module.a.A.forward.0", {})], finished=True))
    writer.flush()
    folder = writer.files.folder(0)
    step = read(folder)
    assert step.finished
    assert list(step.data) == ["Module.a.A.forward.0"]
    tensors = folder / "dump_tensor_data"
    assert {path.name for path in tensors.iterdir()} == ({"x.pt", "y.pt"} if saves else {"x.pt"})
    told = json.loads((folder / "dump.json").read_bytes())["dump_data_dir"]
    assert told == (str(tensors) if saves else None)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.skipif(not lanes(), reason="_writing is not compiled")
def test_a_step_that_is_written_while_it_is_asked_for_is_not_waited_for(
    new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_writer()
    waiting = itertools.chain([1, 1], itertools.repeat(0))
    monkeypatch.setattr(Lane, "waiting", property(lambda lane: next(waiting)))
    waits = threading.Thread(target=writer.wait, args=(0,), daemon=True)
    waits.start()
    waits.join(10)
    assert not waits.is_alive()
