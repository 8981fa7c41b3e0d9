"""The ring: which steps are kept, what has them written, and what memory and disk see of it."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.manifest import Provenance
from msprobe_graph.dump.nonfinite import first_sightings, whose
from msprobe_graph.dump.reader import read, steps
from msprobe_graph.dump.records import Entry, Flushed, Request, Statistics, Step, TensorRecord
from msprobe_graph.dump.ring import Ring
from msprobe_graph.dump.saved import Saved
from msprobe_graph.dump.writer import Writer

CLEAN, NAN = Statistics(1.0, 1.0, 1.0, 1.0), Statistics(math.nan, math.nan, math.nan, math.nan, nan_count=1)
INF = Statistics(1.0, -math.inf, -math.inf, math.inf, neginf_count=1)


def ringed(tmp_path: Path, keep_last: int = 3, *flush_on: str, max_bytes: int | None = None, **sites: Any) -> Writer:
    provenance = Provenance("rank0", "cpu", "0", "Model", "statistics", "L1", {}, "test")
    ring = Ring(keep_last, flush_on or ("nan", "inf"), sites.get("chosen", lambda name: True))
    return Writer(tmp_path, provenance, Boundary(), max_bytes, ring)


class Fetched:
    """The rows of a step."""

    def __init__(self, *found: Statistics) -> None:
        self._found = found

    def fetch(self) -> list[Statistics]:
        return list(self._found)


def step(number: int, requests: tuple[str, ...] = (), finished: bool = True, **outputs: Statistics) -> Step:
    """A step with an entry for each of `outputs`: its input is clean, its output as given."""
    entries: list[Entry] = []
    records: dict[int, TensorRecord] = {}
    found: list[Statistics] = []
    for name, output in outputs.items():
        given, got = record(), record()
        entries.append(Entry(f"Torch.{name}.0.forward", {"input_args": [given], "input_kwargs": {}, "output": [got]}))
        for each, statistics in ((given, CLEAN), (got, output)):
            records[len(found)] = each
            found.append(statistics)
    named = [Request(name, at, at + 1) for at, name in enumerate(requests)]
    return Step(number, entries, rows=Fetched(*found), records=records, requests=named, finished=finished)


def written(tmp_path: Path) -> list[int]:
    return sorted(int(folder.name[4:]) for folder in tmp_path.glob("step*"))


def flushed(tmp_path: Path, number: int) -> dict[str, Any]:
    manifest = read(tmp_path / f"step{number}" / "rank0").manifest
    assert manifest is not None
    told: dict[str, Any] = manifest["flushed"]
    return told


def test_the_last_steps_up_to_the_first_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = ringed(tmp_path, 3)
    for number in range(10):
        bad = NAN if number >= 6 else CLEAN
        writer.submit(step(number, ("a", "b"), first=CLEAN, second=bad, third=bad))
        writer.flush()
        assert written(tmp_path) == ([] if number < 6 else [4, 5, 6])
    for number in (4, 5, 6):
        assert flushed(tmp_path, number) == {
            "on": "nan",
            "step": 6,
            "entry": "Torch.second.0.forward",
            "position": "output.0",
            "requests": ["a", "b"],
        }
    assert all(read(folder).finished for folder in steps(tmp_path))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "step 6 has a NaN, first in Torch.second.0.forward output.0 (requests: a, b); steps 4, 5, 6 are written to "
        f"{tmp_path}"
    ]
    writer.close()
    assert len(caplog.records) == 1


def test_it_fires_again_after_a_step_without(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 2)
    for number, value in enumerate([CLEAN, NAN, CLEAN, CLEAN, CLEAN, NAN, NAN, INF]):
        writer.submit(step(number, value=value))
    writer.flush()
    assert written(tmp_path) == [0, 1, 4, 5, 6, 7]
    assert flushed(tmp_path, 4)["step"] == 5
    assert flushed(tmp_path, 6) == flushed(tmp_path, 7)
    assert (flushed(tmp_path, 7)["on"], flushed(tmp_path, 7)["step"]) == ("inf", 7)


def test_one_kind_alone(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 2, "nan")
    for number, value in enumerate([INF, INF, NAN, CLEAN]):
        writer.submit(step(number, value=value))
    writer.flush()
    assert written(tmp_path) == [1, 2]


def test_of_both_kinds_the_earlier_entry_is_named(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 2)
    writer.submit(step(0, first=INF, second=NAN))
    writer.flush()
    assert (flushed(tmp_path, 0)["on"], flushed(tmp_path, 0)["entry"]) == ("inf", "Torch.first.0.forward")


def test_the_rows_are_those_of_the_output(tmp_path: Path) -> None:
    """And not of a weight that brought it, and happens to be as long as the batch."""
    writer = ringed(tmp_path, 1)
    last = step(0, ("a", "b"), linear=NAN)
    weight, output = last.entries[0].parts["input_args"][0], last.entries[0].parts["output"][0]
    last.rows, weight.data_name, output.data_name = Fetched(NAN, NAN), "weight.pt", "output.pt"
    writer.save(0, "weight.pt", torch.tensor([math.nan, 1.0]))
    writer.save(0, "output.pt", torch.tensor([[0.0], [math.nan]]))
    writer.submit(last)
    writer.flush()
    assert (flushed(tmp_path, 0)["position"], flushed(tmp_path, 0)["requests"]) == ("input_args.0", ["b"])


def test_only_chosen_entries_count(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 2, chosen=lambda name: "mask" not in name)
    writer.submit(step(0, mask=INF, linear=CLEAN))
    writer.submit(step(1, mask=INF, linear=INF))
    writer.flush()
    assert written(tmp_path) == [0, 1]
    assert (flushed(tmp_path, 0)["entry"], flushed(tmp_path, 0)["step"]) == ("Torch.linear.0.forward", 1)


def test_nothing_fired_is_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = ringed(tmp_path, 3)
    for number in range(5):
        writer.save(number, "x.pt", torch.ones(1))
        writer.submit(step(number, value=CLEAN))
    writer.close()
    assert list(tmp_path.iterdir()) == []
    (record,) = caplog.records
    assert record.getMessage() == f"3 steps were kept and none of nan, inf fired, so nothing was written to {tmp_path}"


@pytest.mark.parametrize("ended", [True, False])
def test_fired_from_outside(tmp_path: Path, ended: bool) -> None:
    """A step that runs when it fires is written at its end; nothing after it is."""
    writer = ringed(tmp_path, 2, "signal")
    for number in range(4):
        writer.submit(step(number, ("r",), value=NAN))
    writer.fire(Flushed("signal", 3 if ended else 4), running=not ended)
    for number in range(4, 7):
        writer.submit(step(number, ("q",), value=CLEAN))
    writer.flush()
    assert written(tmp_path) == ([2, 3] if ended else [2, 3, 4])
    assert flushed(tmp_path, 3) == {
        "on": "signal",
        "step": 3 if ended else 4,
        "entry": None,
        "position": None,
        "requests": ["r"],
    }


def test_an_unfinished_step_is_not_kept(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 2)
    writer.submit(step(0, finished=False, value=NAN))
    writer.draft(lambda: step(0, finished=False, value=NAN))
    writer.flush()
    assert written(tmp_path) == []
    writer.submit(step(0, value=NAN))
    writer.flush()
    assert written(tmp_path) == [0]


def test_dropped_steps_cost_no_file_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[object] = []
    writer = ringed(tmp_path, 2)
    for module, name in ((torch, "save"), (Path, "mkdir"), (Path, "exists"), (Path, "open"), (Path, "write_bytes")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: touched.append(args))
    for number in range(5):
        writer.save(number, "x.pt", torch.ones(1))
        writer.submit(step(number, value=CLEAN))
    writer.flush()
    assert touched == []


# Tensors


def values(tmp_path: Path, number: int, name: str) -> torch.Tensor:
    loaded: torch.Tensor = torch.load(tmp_path / f"step{number}" / "rank0" / "dump_tensor_data" / name)
    return loaded


def test_tensors_are_kept_with_their_steps(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 2)
    for number in range(4):
        writer.save(number, "x.pt", torch.full((3,), float(number)))
        writer.submit(step(number, value=NAN if number == 3 else CLEAN))
    writer.flush()
    assert [values(tmp_path, number, "x.pt")[0].item() for number in (2, 3)] == [2, 3]


def test_a_weight_outlives_the_step_that_saved_it_first(tmp_path: Path) -> None:
    """It is kept once, dropped when no kept step has it, and one file on disk."""
    writer = ringed(tmp_path, 2, "rpc")
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    writer.submit(step(0))
    for number in (1, 2, 3):
        assert writer.save_again(number, "weight.pt", saved)
        writer.submit(step(number))
    writer.flush()
    assert writer.budget.taken == saved.size
    writer.fire(Flushed("rpc", 3), running=False)
    writer.flush()
    assert torch.equal(values(tmp_path, 3, "weight.pt"), torch.arange(3))
    files = list(tmp_path.glob("step*/rank0/dump_tensor_data/weight.pt"))
    assert len(files) == 2
    assert len({file.stat().st_ino for file in files}) == 1
    assert writer.save_again(4, "weight.pt", saved)
    writer.submit(step(4))
    writer.fire(Flushed("rpc", 4), running=False)
    writer.flush()
    assert torch.equal(values(tmp_path, 4, "weight.pt"), torch.arange(3))


def test_values_that_left_the_ring_are_to_be_saved_anew(tmp_path: Path) -> None:
    writer = ringed(tmp_path, 1)
    saved = writer.save(0, "weight.pt", torch.arange(3))
    assert saved is not None
    for number in range(2):
        writer.submit(step(number))
    writer.flush()
    assert saved.value is None
    assert writer.budget.taken == 0
    assert not writer.save_again(2, "weight.pt", saved)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), st.integers(1, 4))
def test_kept_bytes_are_those_of_the_kept_steps(program: list[tuple[bool, bool]], keep_last: int) -> None:
    """Each step saves a tensor of its own, and perhaps the shared one; perhaps the ring is let go."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ringed(Path(folder), keep_last, "rpc")
        shared: Saved | None = None
        kept: list[bool] = []
        on_disk = 0
        for number, (again, fires) in enumerate(program):
            writer.save(number, "own.pt", torch.zeros(10))
            if again and not (shared is not None and writer.save_again(number, "shared.pt", shared)):
                shared = writer.save(number, "shared.pt", torch.zeros(1000))
            writer.submit(Step(number, finished=True))
            kept = [*kept, again][-keep_last:]
            writer.flush()
            on_shared = shared is not None and shared.path is not None
            assert writer.budget.taken - on_disk == 40 * len(kept) + 4000 * (any(kept) and not on_shared)
            if fires:
                writer.fire(Flushed("rpc", number), running=False)
                writer.flush()
                kept, on_disk = [], writer.budget.taken
                assert all(len(list(each.rglob("*.pt"))) >= 1 for each in Path(folder).glob("step*"))


def test_max_bytes_keeps_fewer_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = ringed(tmp_path, 5, "rpc", max_bytes=12_000)
    for number in range(8):
        assert not writer.budget.full
        assert writer.save(number, "x.pt", torch.full((1000,), float(number)))
        writer.submit(step(number))
    assert not writer.budget.full
    assert writer.save(8, "large.pt", torch.ones(4000)) is None
    writer.submit(step(8))
    writer.flush()
    (record,) = caplog.records
    assert record.getMessage() == "fewer than keep_last (5) steps are kept, because more would pass max_bytes (12000)"
    writer.save(9, "x.pt", torch.full((2000,), 9.0))
    writer.submit(step(9))
    writer.fire(Flushed("rpc", 9), running=False)
    writer.flush()
    assert written(tmp_path) == [7, 8, 9]
    assert values(tmp_path, 9, "x.pt")[0] == 9
    for number in range(10, 40):
        writer.submit(step(number))
        writer.fire(Flushed("rpc", number), running=False)
        writer.flush()
    assert writer.budget.full, "the dump has reached it"


def test_a_failing_disk_ends_it_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = ringed(tmp_path, 2, "rpc")
    for number in range(2):
        writer.submit(step(number))
    (tmp_path / "step1").write_text("in the way")
    writer.fire(Flushed("rpc", 1), running=False)
    writer.flush()
    assert writer.files.failed is not None
    assert "stopped writing" in caplog.text
    assert read(tmp_path / "step0" / "rank0").finished


# Where it came up


def record(bad: str = "") -> TensorRecord:
    made = TensorRecord("torch.Tensor", "torch.float32", (2,), None, None, None, None, False)
    made.nan_count, made.posinf_count, made.neginf_count = (int(kind in bad) for kind in ("nan", "+", "-"))
    return made


def sighted(*entries: tuple[str, dict[str, Any]], kinds: tuple[str, ...] = ("nan", "inf")) -> dict[str, Any]:
    made = [Entry(name, parts) for name, parts in entries]
    measured = [record("nan"), record("+")]  # some tensor has them
    found = first_sightings(Step(0, made, measured=measured), kinds, lambda name: True)
    return {kind: (each.entry, each.position) for kind, each in found.items()}


@pytest.mark.parametrize(
    ("parts", "position"),
    [
        ({"input_args": [record()], "output": [record("nan")]}, "output.0"),
        ({"input_args": [record(), [record("nan")]], "output": [record("nan")]}, "input_args.1.0"),
        ({"input_args": [record("nan")], "output": [record()]}, None),
        ({"input_args": [], "output": [record()], "parameters": {"weight": record("nan")}}, None),
        ({"input_args": [record("nan")]}, "input_args.0"),
        ({"input_args": [], "input_kwargs": {"out": record("nan")}, "output": [None]}, "input_kwargs.out"),
        ({"input": [record("nan")], "output": [None]}, "input.0"),
        ({"weight": [record()], "bias": [record("nan")]}, "bias.0"),
        ({"output": [{"hidden": [{"type": "int", "value": 3}, record("nan")]}]}, "output.0.hidden.1"),
        ({"output": [{"type": "float", "value": "nan"}]}, None),
    ],
)
def test_what_decides_in_an_entry(parts: dict[str, Any], position: str | None) -> None:
    assert sighted(("x", parts)) == ({} if position is None else {"nan": ("x", position)})


def test_the_first_entry_of_each_kind_in_order() -> None:
    entries = [
        ("clean", {"output": [record()]}),
        ("infinite", {"output": [record("-")]}),
        ("both", {"output": [record("nan+")]}),
        ("nan", {"output": [record("nan")]}),
    ]
    assert list(sighted(*entries).items()) == [("inf", ("infinite", "output.0")), ("nan", ("both", "output.0"))]
    assert sighted(*entries, kinds=("nan",)) == {"nan": ("both", "output.0")}


REQUESTS = [Request("a", 0, 2), Request("b", 2, 3), Request("c", 3, 6)]


@pytest.mark.parametrize(
    ("shape", "at", "names"),
    [
        ((6, 4), (2, 3), ("b",)),
        ((6,), (5,), ("c",)),
        ((3, 8), (0, 0), ("a",)),  # logits: one row for each request
        ((4, 6), (1, 1), ("a", "b", "c")),  # rows of something else
        ((), (), ("a", "b", "c")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_whose_rows(shape: tuple[int, ...], at: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype) -> None:
    value = torch.zeros(shape)
    value[at] = math.nan
    assert whose(REQUESTS, value.to(dtype), "nan") == names


def test_whose_rows_when_the_values_are_unknown() -> None:
    assert whose(REQUESTS, None, "inf") == ("a", "b", "c")
    assert whose([], torch.tensor([math.inf]), "inf") == ()
    value = torch.zeros(6, 2)
    value[0, 0], value[4, 0] = math.inf, -math.inf
    assert whose(REQUESTS, value, "inf") == ("a", "c")
