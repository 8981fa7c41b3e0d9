"""The writer where something gives out: the process is killed, the disk is full or slow, max_bytes is reached."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph.dump import writer as writer_module
from msprobe_graph.dump.reader import read, steps
from msprobe_graph.dump.records import FULL, Entry, Hole, Step
from msprobe_graph.dump.saved import Sink
from msprobe_graph.dump.step_files import StepFiles

from .conftest import NewWriter, Strict


def eventually(true: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


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
    (writer.files.dump_path / "step1").write_text("in the way")
    for step in range(4):
        writer.save(step, "x.pt", torch.ones(2))
        writer.submit(Step(step, finished=True))
    writer.flush()
    assert isinstance(writer.files.failed, OSError)
    assert read(writer.files.folder(0)).finished
    assert not writer.files.folder(2).exists()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1
    assert str(writer.files.dump_path) in said[0]
    assert "lost" in said[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left(new_writer: NewWriter, caplog: pytest.LogCaptureFixture) -> None:
    writer = new_writer()
    writer.files.folder(0).mkdir(parents=True)
    (writer.files.folder(0) / "dump.json.part").symlink_to("/dev/full")
    writer.submit(Step(0, finished=True))
    writer.flush()
    assert writer.files.failed is not None
    assert "No space left" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left_for_a_tensor(new_writer: NewWriter, caplog: pytest.LogCaptureFixture) -> None:
    """torch.save doesn't raise an OSError then."""
    writer = new_writer()
    file = writer.files.tensor_file(0, "x.pt")
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/full")
    writer.save(0, "x.pt", torch.ones(10_000))
    writer.submit(Step(0, finished=True))
    writer.save(1, "x.pt", torch.ones(1))
    writer.flush()
    assert isinstance(writer.files.failed, OSError)
    assert "stopped writing" in caplog.text
    assert not writer.files.folder(1).exists()


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
    files = [writer.files.tensor_file(0, f"{number}.pt") for number in range(10)]
    assert [torch.load(file)[0].item() for file in files] == list(range(10))


def test_a_tensor_larger_than_the_bound_still_passes(new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "QUEUED_BYTES", 8)
    writer = new_writer()
    for number in range(3):
        assert writer.save(0, f"{number}.pt", torch.ones(100))
    writer.flush()
    assert len(list((writer.files.folder(0) / "dump_tensor_data").iterdir())) == 3


@pytest.mark.parametrize(("limit", "arriving"), [("QUEUED_STEPS", 0), ("QUEUED_BYTES", 1)], ids=["steps", "bytes"])
def test_steps_wait_for_the_disk_too(
    new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch, limit: str, arriving: int
) -> None:
    """At most 2 wait, or so many as have 2 bytes on their way to the host."""
    monkeypatch.setattr(writer_module, limit, 2)
    gate = threading.Event()
    write = StepFiles.take_step

    def slow(self: StepFiles, step: Step) -> None:
        gate.wait()
        write(self, step)

    monkeypatch.setattr(StepFiles, "take_step", slow)
    writer = new_writer()
    taken = []

    def capture() -> None:
        for number in range(5):
            writer.submit(Step(number, finished=True, arriving=arriving))
            taken.append(number)

    thread = threading.Thread(target=capture)
    thread.start()
    eventually(lambda: len(taken) == 2)
    time.sleep(0.05)
    assert len(taken) == 2
    gate.set()
    thread.join(20)
    writer.flush()
    assert len(steps(writer.files.dump_path)) == 5


class OnesCopied:
    """A step's copies of one value for two files."""

    def save(self, sink: Sink) -> list[Hole]:
        return [] if sink.keep(0, ["one.pt", "other.pt"], torch.ones(100)) else [Hole("one.pt", FULL)]


@pytest.mark.parametrize("max_bytes", [600, 300])
def test_copies_count_once_and_are_let_go(new_writer: NewWriter, max_bytes: int) -> None:
    writer, copies = new_writer(max_bytes=max_bytes), OnesCopied()
    alive = weakref.ref(copies)
    writer.submit(Step(0, copies=[copies], arriving=400, finished=True))
    writer.submit(Step(1, finished=True))
    del copies
    writer.flush()
    assert alive() is None
    step = read(writer.files.folder(0))
    assert step.manifest is not None
    reasons = [hole["reason"] for hole in step.manifest["holes"] if hole["site"] == "one.pt"]
    folder = writer.files.folder(0) / "dump_tensor_data"
    if max_bytes == 600:
        assert reasons == []
        assert (folder / "one.pt").stat().st_ino == (folder / "other.pt").stat().st_ino
        assert torch.equal(torch.load(folder / "other.pt"), torch.ones(100))
    else:
        assert reasons == [FULL]
        assert not folder.exists()


def test_max_bytes_refuses_tensors_and_is_full(new_writer: NewWriter) -> None:
    writer = new_writer(max_bytes=1000)
    assert writer.save(0, "small.pt", torch.ones(100))
    assert not writer.budget.full
    assert not writer.save(0, "large.pt", torch.ones(1000))
    assert writer.budget.full
    writer.submit(Step(0, finished=True))  # the running step is still written
    writer.flush()
    assert read(writer.files.folder(0)).finished
    assert {file.name for file in (writer.files.folder(0) / "dump_tensor_data").iterdir()} == {"small.pt"}


def test_json_counts_against_max_bytes(new_writer: NewWriter) -> None:
    writer = new_writer(max_bytes=3000)
    for number in range(20):
        if writer.budget.full:
            break
        writer.submit(Step(number, [Entry(f"Torch.a.{n}.forward", {}) for n in range(10)], finished=True))
        writer.flush()
    on_disk = sum(file.stat().st_size for file in writer.files.dump_path.rglob("*.json"))
    assert 3000 <= on_disk < 2 * 3000


def test_by_default_a_fifth_of_the_free_disk_stays_free(new_writer: NewWriter) -> None:
    writer = new_writer()
    status = os.statvfs(writer.files.dump_path)
    free = status.f_bavail * status.f_frsize
    assert writer.budget.limit == pytest.approx(free * 0.8, rel=0.05)


def test_one_entry_that_cannot_be_written_costs_no_other_step(
    new_writer: NewWriter, caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer()
    writer.submit(Step(0, [Entry("Torch.a.0.forward", {"output": [object()]})], finished=True))
    writer.submit(Step(1, finished=True))
    writer.flush()
    assert read(writer.files.folder(1)).finished
    assert "object" in caplog.text
