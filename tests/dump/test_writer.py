"""The writer: what is on disk, in which order, whatever happens to the process or the disk."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph.config import load_settings
from msprobe_graph.dump import writer as writer_module
from msprobe_graph.dump.folder import write_folder, write_whole
from msprobe_graph.dump.reader import DumpError, read, steps
from msprobe_graph.dump.records import Entry, Frame, Hole, Request, Step
from msprobe_graph.dump.writer import Writer
from msprobe_graph.taps.recorder import Recorder

from .conftest import NewWriter, Strict


def eventually(true: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def test_files_of_a_step(new_writer: NewWriter, strict: Strict) -> None:
    writer = new_writer()
    stack = (Frame("<string>", 1, "main"),)
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
    folder = writer.dump_path / "step3" / "rank0"
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
    assert strict(writer.folder(0) / "construct.json") == {}


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

        monkeypatch.setattr(writer_module, "write_whole", write_whole)
        writer = new_writer()
        writer.submit(Step(0))
        writer.flush()
        monkeypatch.setattr(writer_module, "write_whole", cut)
        writer.submit(Step(0, finished=True))
        writer.flush()
        finished.append(read(writer.folder(0)).finished)
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
        write_folder(folder, Files())
    assert not folder.exists()
    with pytest.raises(DumpError, match="holds no dump"):
        steps(tmp_path)
    write_folder(folder, {"dump.json": b'{"task": "statistics", "level": "L0", "data": {}}'})
    assert steps(tmp_path) == [folder]


def test_an_unfinished_step_says_so_and_may_grow(new_writer: NewWriter) -> None:
    writer = new_writer()
    writer.submit(Step(0, [Entry("Torch.a.0.forward", {})]))
    writer.flush()
    assert not read(writer.folder(0)).finished
    writer.submit(Step(0, [Entry("Torch.a.0.forward", {}), Entry("Torch.b.0.forward", {})], finished=True))
    writer.flush()
    assert read(writer.folder(0)).finished
    assert list(read(writer.folder(0)).data) == ["Torch.a.0.forward", "Torch.b.0.forward"]


def ten_thousand_entries(recorder: Recorder) -> None:
    """900 forwards of 12 entries, each with two tensors, a weight among them."""
    weights = [torch.randn(8, 8) for _ in range(12)]
    x = torch.randn(4, 8)
    stack = (Frame(__file__, 1, "forward"),)
    for forward in range(900):
        for layer, weight in enumerate(weights):
            name = f"Functional.linear.{12 * forward + layer}.forward"
            parts = {"input_args": [recorder.value(x, None), recorder.value(weight, None)], "input_kwargs": {}}
            parts["output"] = [recorder.value(x, None)]
            recorder.entries[name] = Entry(name, parts, f"layers.{layer}", forward, "Module.Model.forward.0", stack)


def test_writing_is_linear(new_writer: NewWriter) -> None:
    """10,800 entries at most 1 s (benchmarks/writing.py measures it); here with room for a busy machine."""
    writer = new_writer()
    recorder = Recorder(load_settings({"dump_path": str(writer.dump_path)}), writer)
    ten_thousand_entries(recorder)
    begin = time.perf_counter()
    writer.submit(recorder.as_step(True, 0, 0, [], []))
    writer.flush()
    assert time.perf_counter() - begin < 5
    assert len(read(writer.folder(0)).data) == 10_800


CAPTURE = """
import sys, torch
from torch import nn
from msprobe_graph import PrecisionDebugger
torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
debugger = PrecisionDebugger({"task": sys.argv[2], "dump_path": sys.argv[1], "level": "mix", "risk_level": "ALL"})
debugger.start(model, rank_id=0)
for step in range(10**6):
    model(torch.randn(8, 64))
    debugger.stop()
    debugger.step()
    debugger.start(model)
    print(step, flush=True)
"""


@pytest.mark.parametrize("task", ["statistics", "tensor"])
@pytest.mark.parametrize("after", [0.0, 0.013, 0.1])
def test_a_killed_process_leaves_finished_steps_whole(tmp_path: Path, strict: Strict, task: str, after: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CAPTURE, str(tmp_path / "dump"), task], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(8):
        assert process.stdout.readline()
    eventually(lambda: (tmp_path / "dump" / "step3" / "rank0" / "manifest.json").exists())
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    folders = sorted((tmp_path / "dump").glob("step*/rank0"), key=lambda folder: int(folder.parent.name[4:]))
    finished = [folder for folder in folders if (folder / "dump.json").exists() and read(folder).finished]
    assert len(finished) >= 3
    whole = set(read(finished[0]).data)
    assert len(whole) >= 41
    for folder in finished:
        step = read(folder)
        assert set(step.data) == whole
        assert strict(folder / "stack.json")
        assert set(strict(folder / "construct.json")) == whole
        if task == "tensor":
            for tensor in step.tensors():
                step.load(tensor)
    assert folders[: len(finished)] == finished
    (*_, last) = folders
    assert len(folders) - len(finished) <= 1
    if last not in finished and (last / "dump.json").exists():
        assert strict(last / "manifest.json")["status"] == "unfinished"


def test_a_full_disk_stops_the_writer_loudly_and_nothing_else(
    new_writer: NewWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the step's folder should be made: an OSError as good as a full disk."""
    writer = new_writer()
    (writer.dump_path / "step1").write_text("in the way")
    for step in range(4):
        writer.save(step, "x.pt", torch.ones(2))
        writer.submit(Step(step, finished=True))
    writer.flush()
    assert isinstance(writer.failed, OSError)
    assert read(writer.folder(0)).finished
    assert not writer.folder(2).exists()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1
    assert str(writer.dump_path) in said[0]
    assert "lost" in said[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left(new_writer: NewWriter, caplog: pytest.LogCaptureFixture) -> None:
    writer = new_writer()
    writer.folder(0).mkdir(parents=True)
    (writer.folder(0) / "dump.json.part").symlink_to("/dev/full")
    writer.submit(Step(0, finished=True))
    writer.flush()
    assert writer.failed is not None
    assert "No space left" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left_for_a_tensor(new_writer: NewWriter, caplog: pytest.LogCaptureFixture) -> None:
    """torch.save doesn't raise an OSError then."""
    writer = new_writer()
    file = writer.tensor_file(0, "x.pt")
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/full")
    writer.save(0, "x.pt", torch.ones(10_000))
    writer.submit(Step(0, finished=True))
    writer.save(1, "x.pt", torch.ones(1))
    writer.flush()
    assert isinstance(writer.failed, OSError)
    assert "stopped writing" in caplog.text
    assert not writer.folder(1).exists()


def test_a_slow_disk_holds_capture_back(new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most QUEUED_BYTES wait in memory; then save() waits."""
    size = 4 * 1000
    monkeypatch.setattr(writer_module, "QUEUED_BYTES", 3 * size)
    disk, most = threading.Semaphore(0), 0
    save = torch.save

    def slow(*args: Any, **kwargs: Any) -> None:
        disk.acquire()
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", slow)
    writer = new_writer()
    taken = 0

    def capture() -> None:
        nonlocal taken
        for number in range(10):
            writer.save(0, f"{number}.pt", torch.full((1000,), float(number)))
            taken += 1

    thread = threading.Thread(target=capture)
    thread.start()
    for written in range(10):
        eventually(lambda written=written: taken == min(10, written + 3))  # type: ignore[misc]
        time.sleep(0.01)
        most = max(most, taken - written)
        disk.release()
    thread.join(20)
    writer.flush()
    assert most == 3
    files = [writer.tensor_file(0, f"{number}.pt") for number in range(10)]
    assert [torch.load(file)[0].item() for file in files] == list(range(10))


def test_a_tensor_larger_than_the_bound_still_passes(new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "QUEUED_BYTES", 8)
    writer = new_writer()
    for number in range(3):
        assert writer.save(0, f"{number}.pt", torch.ones(100))
    writer.flush()
    assert len(list((writer.folder(0) / "dump_tensor_data").iterdir())) == 3


def test_steps_wait_for_the_disk_too(new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "QUEUED_STEPS", 2)
    gate = threading.Event()
    write = Writer._write_step

    def slow(self: Writer, step: Step) -> None:
        gate.wait()
        write(self, step)

    monkeypatch.setattr(Writer, "_write_step", slow)
    writer = new_writer()
    taken = []

    def capture() -> None:
        for number in range(5):
            writer.submit(Step(number, finished=True))
            taken.append(number)

    thread = threading.Thread(target=capture)
    thread.start()
    eventually(lambda: len(taken) == 2)
    time.sleep(0.05)
    assert len(taken) == 2
    gate.set()
    thread.join(20)
    writer.flush()
    assert len(steps(writer.dump_path)) == 5


def test_the_same_values_are_one_file_on_disk(new_writer: NewWriter) -> None:
    writer = new_writer()
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    assert writer.save_again(0, "again.pt", saved)
    writer.flush()
    assert writer.save_again(1, "weight.pt", saved)
    writer.flush()
    files = [writer.tensor_file(0, "weight.pt"), writer.tensor_file(0, "again.pt"), writer.tensor_file(1, "weight.pt")]
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
    assert writer.failed is None
    assert torch.equal(torch.load(writer.tensor_file(1, "weight.pt")), torch.arange(3))


def test_values_whose_file_was_deleted_are_to_be_saved_anew(new_writer: NewWriter) -> None:
    writer = new_writer()
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    writer.flush()
    assert saved.value is None, "what is on disk takes no memory"
    writer.tensor_file(0, "weight.pt").unlink()
    assert not writer.save_again(1, "weight.pt", saved)
    writer.flush()
    assert writer.failed is None


def test_max_bytes_refuses_tensors_and_is_full(new_writer: NewWriter) -> None:
    writer = new_writer(max_bytes=1000)
    assert writer.save(0, "small.pt", torch.ones(100))
    assert not writer.full
    assert not writer.save(0, "large.pt", torch.ones(1000))
    assert writer.full
    writer.submit(Step(0, finished=True))  # the running step is still written
    writer.flush()
    assert read(writer.folder(0)).finished
    assert {file.name for file in (writer.folder(0) / "dump_tensor_data").iterdir()} == {"small.pt"}


def test_json_counts_against_max_bytes(new_writer: NewWriter) -> None:
    writer = new_writer(max_bytes=3000)
    for number in range(20):
        if writer.full:
            break
        writer.submit(Step(number, [Entry(f"Torch.a.{n}.forward", {}) for n in range(10)], finished=True))
        writer.flush()
    on_disk = sum(file.stat().st_size for file in writer.dump_path.rglob("*.json"))
    assert 3000 <= on_disk < 2 * 3000


def test_by_default_a_fifth_of_the_free_disk_stays_free(new_writer: NewWriter) -> None:
    writer = new_writer()
    status = os.statvfs(writer.dump_path)
    free = status.f_bavail * status.f_frsize
    assert writer.max_bytes == pytest.approx(free * 0.8, rel=0.05)


def test_one_entry_that_cannot_be_written_costs_no_other_step(
    new_writer: NewWriter, caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer()
    writer.submit(Step(0, [Entry("Torch.a.0.forward", {"output": [object()]})], finished=True))
    writer.submit(Step(1, finished=True))
    writer.flush()
    assert read(writer.folder(1)).finished
    assert "object" in caplog.text
