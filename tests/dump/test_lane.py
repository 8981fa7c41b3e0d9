"""Steps of known forms: what the lane writes is what the writer writes."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump import lane, writer
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.manifest import Provenance
from msprobe_graph.dump.records import Entry, Hole, Request, Step, TensorRecord
from msprobe_graph.dump.writer import Writer
from msprobe_graph.taps.arrival import Arrival, Shape, Slot
from msprobe_graph.taps.replayed import ReplayedCall, ReplayedValue, ReplayInStep

from ..taps.landed import Landed

pytestmark = pytest.mark.skipif(not lane.lanes(), reason="_writing is not compiled")

PROVENANCE = Provenance("rank0", "cuda", "0.1", "Model", "statistics", "L0", {}, "run/0")
FILES = ("dump.json", "stack.json", "construct.json", "manifest.json")


class Done:
    """An event that has happened."""

    native = 0, 0


class Late:
    """One that the driver says has not happened the first `asked` times."""

    def __init__(self, asked: int, code: int = 0) -> None:
        self._asked = asked
        self._query = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._ask)
        self.native = ctypes.cast(self._query, ctypes.c_void_p).value, 7
        self._code = code
        self.events: list[int] = []

    def _ask(self, event: int) -> int:
        self.events.append(event)
        return 600 if len(self.events) <= self._asked else self._code


class Unknown:
    """One of which only Python can tell."""

    native = None


def call(values: int) -> ReplayedCall:
    """The first slot tells of the call, the others are values."""
    made = ReplayedCall(None, [Slot(0, 0, 1)])  # type: ignore[arg-type]  # the GPU's side is not asked
    for number in range(values):
        record = TensorRecord("torch.Tensor", "torch.float32", None, None, None, None, None, False)
        made.values.append(ReplayedValue(record, [Slot(number + 1, 0, 1)], torch.float32))
        name = f"Module.m{number}.Linear.forward.0"
        made.entries[name] = Entry(name, {"output": [record]})
    return made


def arrival(numbers: Sequence[float], fired: Sequence[int], event: Done | Late | Unknown, end: int = -1) -> Arrival:
    rows = [(number, -number, number / 3, number * 2, 0, 0, 0, 12) for number in (0.0, *numbers)]
    return Arrival(Landed(rows, [1, *fired], event.native), [Shape((6, 2), True)], (0, end))


def step(number: int, replayed: ReplayedCall, arrived: Arrival, **given: Any) -> Step:
    requests = [Request("cmpl-1", 0, 1, "decode", (number, number + 1))]
    replays: list[Any] = [ReplayInStep(replayed, arrived)]
    return Step(number, replays=replays, requests=requests, expected=3, captured=2, finished=True, **given)


class Capture:
    """A writer, and what it has written."""

    def __init__(self, folder: Path, limit: int = 1 << 30) -> None:
        self.folder = folder
        self.writer = Writer(folder, PROVENANCE, Boundary(), limit)

    def write(self, *steps: Step) -> None:
        for each in steps:
            self.writer.submit(each)
            self.writer.flush()

    @property
    def by_lane(self) -> int:
        """How many steps went that way, and were settled by it or by the writer."""
        assert self.writer._lane is not None
        return self.writer._lane._taken

    def files(self, number: int) -> dict[str, bytes]:
        return {name: (self.folder / f"step{number}/rank0" / name).read_bytes() for name in FILES}

    def maximum(self, number: int) -> list[float]:
        data = json.loads(self.files(number)["dump.json"])["data"]
        return [entry["output"][0]["Max"] for entry in data.values()]


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    return Capture(tmp_path / "lane")


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Capture:
    """The same without a lane."""
    monkeypatch.setattr(writer, "lanes", lambda: False)
    made = Capture(tmp_path / "plain")
    monkeypatch.undo()
    return made


def test_files_are_those_that_the_writer_writes(capture: Capture, plain: Capture) -> None:
    for made in (capture, plain):
        replayed = call(3)
        hole = Hole("Module.m9", "its forward did not run in this step")
        for number in range(6):
            values = [number + 0.1, float("nan") if number == 4 else 1e-7, 3e20]
            made.write(step(number, replayed, arrival(values, [1, 1, 1], Done()), holes=[hole]))
    assert plain.writer._lane is None
    assert capture.by_lane == 4
    for number in range(6):
        assert capture.files(number) == plain.files(number)
    assert capture.maximum(5) == [5.1, 1e-7, 3e20]


def test_what_is_the_same_in_all_steps_is_one_file(capture: Capture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(5)))
    inodes = {(capture.folder / f"step{number}/rank0/stack.json").stat().st_ino for number in (2, 3, 4)}
    assert len(inodes) == 1


def test_a_step_waits_for_its_event(capture: Capture) -> None:
    replayed = call(1)
    late = Late(5)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(2)))
    capture.write(step(2, replayed, arrival([2.5], [1], late)))
    assert late.events == [7] * 6
    assert capture.by_lane == 1
    assert capture.maximum(2) == [2.5]


@pytest.mark.parametrize("event", [Unknown(), Late(0, code=1)], ids=["Python's", "one that has failed"])
def test_where_the_driver_can_not_tell_the_writer_does_it(capture: Capture, event: object) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(2)))
    capture.write(step(2, replayed, arrival([2.5], [1], event)))
    assert capture.maximum(2) == [2.5]


def test_what_the_device_tells_makes_another_form(capture: Capture, plain: Capture) -> None:
    fired = ([1, 1], [1, 1], [0, 1], [1, 1], [0, 1], [2, 1], [0, 1], [1, 1], [2, 1], [1, 0], [1, 0])
    for made in (capture, plain):
        replayed = call(2)
        for number, times in enumerate(fired):
            made.write(step(number, replayed, arrival([number + 0.5, 1.0], times, Done())))
    assert capture.by_lane == len(fired) - 2
    for number in range(len(fired)):
        for name in FILES:
            assert capture.files(number)[name].decode() == plain.files(number)[name].decode()


def test_steps_that_differ_beforehand_have_forms_of_their_own(capture: Capture, plain: Capture) -> None:
    holes = [], [Hole("Module.m9", "why")]
    graphs = {7: {"calls": 3}}, {7: {"calls": 3, "verdict": "exact"}}
    for made in (capture, plain):
        replayed, other = call(2), call(1)
        for number in range(18):
            arrived = arrival([number + 0.5, 1.0], [1, 1], Done(), end=(-1, 2, 4)[number % 3])
            which = other if number % 9 > 6 else replayed
            given = {"holes": list(holes[number % 2]), "graphs": dict(graphs[number > 12])}
            made.write(step(number, which, arrived, **given))
    for number in range(18):
        assert capture.files(number) == plain.files(number)


def test_what_belongs_to_one_step_goes_to_the_writer(capture: Capture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(3)))
    assert capture.by_lane == 1
    capture.write(step(3, replayed, arrival([1.0], [1], Done()), saved={"x.0.debug": None}))
    replayed.saved = True
    capture.write(step(4, replayed, arrival([1.0], [1], Done())))
    assert capture.by_lane == 1
    assert (capture.folder / "step3/rank0/debug.json").exists()


def test_a_folder_that_is_there_is_written_into(capture: Capture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(2)))
    capture.write(Step(2))
    capture.write(step(2, replayed, arrival([2.5], [1], Done())))
    assert capture.maximum(2) == [2.5]
    assert json.loads(capture.files(2)["manifest.json"])["status"] == "finished"


def test_a_step_that_was_dropped_comes_again(capture: Capture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(2)))
    capture.writer.drop(2)
    capture.write(step(2, replayed, arrival([2.5], [1], Done())))
    assert capture.maximum(2) == [2.5]


def test_a_step_does_not_overtake_its_draft(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(3)))
    write = capture.writer.files.write
    asked = threading.Event()

    def slowly(job: Any) -> None:
        asked.set()
        time.sleep(0.3)
        write(job)

    monkeypatch.setattr(writer, "DRAFT_SECONDS", 0.01)
    monkeypatch.setattr(capture.writer.files, "write", slowly)
    capture.writer.draft(lambda: Step(3, entries=[Entry("draft", {"output": []})]))
    assert asked.wait(10)
    capture.writer.undraft()
    capture.write(step(3, replayed, arrival([2.5], [1], Done())))
    assert json.loads(capture.files(3)["manifest.json"])["status"] == "finished"
    assert capture.maximum(3) == [2.5]


def test_a_replay_without_entries_leaves_no_gap(capture: Capture) -> None:
    empty, other = call(0), call(1)
    for number in range(4):
        arrived = arrival([2.5], [1], Done())
        replays: list[Any] = [ReplayInStep(empty, arrived), ReplayInStep(other, arrived)]
        capture.write(Step(number, replays=replays, finished=True))
        assert capture.maximum(number) == [2.5]
    assert capture.by_lane == 2


def test_a_name_that_is_no_text_stops_nothing(capture: Capture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(3)))
    bad = step(3, replayed, arrival([1.0], [1], Done()))
    bad.requests = [Request("\ud800", 0, 1)]
    capture.write(bad, step(4, replayed, arrival([2.5], [1], Done())))
    assert capture.writer._boundary.failures == 1
    assert capture.maximum(4) == [2.5]


def test_a_disk_that_is_gone_is_said_once(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(3)))
    for file in capture.folder.rglob("*"):
        if file.is_file():
            file.unlink()
    for folder in sorted(capture.folder.rglob("*"), reverse=True):
        folder.rmdir()
    capture.folder.rmdir()
    capture.folder.write_text("in the way")
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(3, 6)))
    assert [record.message for record in caplog.records if "stopped writing" in record.message] != []
    assert capture.by_lane == 2, "after the first failure nothing is taken"


def test_max_bytes_holds(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "lane", limit=20_000)
    replayed = call(4)
    for number in range(40):
        if capture.writer.budget.full:
            break
        capture.write(step(number, replayed, arrival([1.0] * 4, [1] * 4, Done())))
    assert capture.by_lane > 0
    assert capture.writer.budget.full
    written = sum(file.stat().st_size for file in capture.folder.rglob("manifest.json"))
    assert 5_000 < written < 40_000
    last = json.loads(capture.files(number - 1)["manifest.json"])
    assert last["holes"] == [{"site": "later steps", "reason": "max_bytes (20000) is reached"}]


def test_steps_that_are_behind_are_waited_for(capture: Capture) -> None:
    replayed = call(1)
    capture.write(*(step(number, replayed, arrival([1.0], [1], Done())) for number in range(2)))
    late = [Late(50) for _ in range(4)]
    for number, event in enumerate(late, 2):
        capture.writer.submit(step(number, replayed, arrival([2.5], [1], event)))
    capture.writer.wait(2)
    assert (capture.folder / "step3/rank0/manifest.json").exists()
    capture.writer.wait(0)
    assert (capture.folder / "step5/rank0/manifest.json").exists()


def test_captured_steps_are_what_they_are_without_a_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager model, whose forms of call change."""

    def run(folder: Path) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        debugger = PrecisionDebugger({"task": "statistics", "level": "mix", "dump_path": str(folder)})
        for number in range(24):
            x = torch.randn(2 + number % 3, 4)
            if number == 13:
                with torch.no_grad():
                    model[0].weight += 1
            debugger.start(model)
            with torch.no_grad():
                model(x)
            debugger.stop()
            debugger.step()
            debugger.flush()
        debugger.session.close()
        made = debugger.session._writer
        assert made is not None
        return 0 if made._lane is None else made._lane._taken

    taken = {}
    for folder in ("lane", "plain"):  # from the same line
        monkeypatch.setattr(writer, "lanes", lambda folder=folder: folder == "lane")
        taken[folder] = run(tmp_path / folder)
    assert taken["lane"] >= 3
    assert taken["plain"] == 0
    for number in range(24):
        for name in FILES:
            (one,) = (tmp_path / "lane" / f"step{number}").glob(f"*/{name}")
            (other,) = (tmp_path / "plain" / f"step{number}").glob(f"*/{name}")
            found, expected = (json.loads(file.read_text()) for file in (one, other))
            for manifest in (found, expected):
                manifest.pop("run", None), manifest.pop("config", None)
            assert found == expected, (number, name)
