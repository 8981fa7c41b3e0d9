"""Tensors saved inside graphs, on a device that captures and replays; see test_host_device, which runs this."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.graph import full
from msprobe_graph.taps.device import Accelerator, of
from msprobe_graph.taps.graph_copies import GraphCopies
from msprobe_graph.taps.plain_graph_rows import PlainGraphRows

from ..capturing import holes

NAME = os.environ["HOST_DEVICE"]
DEVICE: Any = torch.get_device_module(NAME)
ROWS = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Split(nn.Module):
    """Gives columns of what it gets, and these in another shape, as attention does; (rows, 24) in."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.merge, self.same = Heads(), nn.Linear(8, 8), nn.Identity()

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        q, k, v = wide.chunk(3, dim=1)
        mixed = self.heads(q, k.view(-1, 2, 4), v)
        merged: torch.Tensor = self.merge(self.same(mixed.view(-1, 2, 4)).flatten(1))
        return merged


class Heads(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q * k.flatten(1) + v


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.split, self.last = nn.Linear(8, 24), Split(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last: torch.Tensor = self.last(x + self.split(self.wide(x)))
        return last


def model(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Model()).to(device).eval()


def compiled_model(device: str) -> Any:
    return torch.compile(model(device), backend=msprobe_backend, options={"inner": "aot_eager"})


def batch(number: int, rows: int = ROWS) -> torch.Tensor:
    torch.manual_seed(number + 1)
    return torch.randn(rows, 8)


def dumped(folder: Path, program: Callable[[PrecisionDebugger], Any], **settings: Any) -> list[StepDump]:
    always = {"dump_path": str(folder), "risk_level": "ALL", "task": "tensor", "level": "mix"}
    debugger = PrecisionDebugger({**always, **settings})
    with torch.no_grad():
        program(debugger)
    debugger.flush()
    return [read(step) for step in steps(folder)]


def replayed(debugger: PrecisionDebugger) -> None:
    """The first step is without a graph, three are with one, and between them it is replayed in none."""
    compiled = compiled_model(NAME)
    x, graph = torch.zeros(ROWS, 8, device=NAME), DEVICE.Graph()
    with debugger.start(compiled):
        compiled(x)
    with DEVICE.graph(graph):
        compiled(x)
    for number in range(3):
        x.copy_(batch(number))
        with debugger.start():
            graph.replay()
            debugger.stop()
            x.fill_(7.0)
            graph.replay()


def plain(debugger: PrecisionDebugger) -> None:
    compiled = compiled_model(NAME)
    for x in [batch(number).to(NAME) for number in range(3)]:
        with debugger.start(compiled):
            compiled(x)


def eager(debugger: PrecisionDebugger) -> None:
    program = model("cpu")
    for x in [batch(number) for number in range(3)]:
        with debugger.start(program):
            program(x)


def files(step: StepDump) -> dict[str, bytes]:
    """The bytes of each tensor that the folder has, by the name of its file."""
    folder = step.folder / "dump_tensor_data"
    return {file.name: packed(torch.load(file, weights_only=True)) for file in sorted(folder.glob("*.pt"))}


def packed(tensor: torch.Tensor) -> bytes:
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    numbers = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + numbers


def named(step: StepDump) -> set[str]:
    return {each.record["data_name"] for each in step.tensors() if "data_name" in each.record}


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_the_files_of_a_replay_are_those_of_a_run_without_graphs(tmp_path: Path, level: str) -> None:
    _, *here = dumped(tmp_path / "graph", replayed, level=level)
    torch._dynamo.reset()
    there = dumped(tmp_path / "plain", plain, level=level)
    by_eager = dumped(tmp_path / "eager", eager, level=level)
    assert len(here) == len(there) == len(by_eager) == 3
    for found, expected, other in zip(here, there, by_eager, strict=True):
        assert list(found.data) == list(expected.data) == list(other.data)
        saved = files(found)
        assert saved == files(expected)
        assert saved == files(other)
        assert saved.keys() == named(found)
        assert not any("not saved" in reason for reason in holes(found).values())
        for tensor in found.tensors():
            if "data_name" in tensor.record:
                assert list(found.load(tensor).shape) == tensor.record["shape"]


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_a_view_that_is_tapped_itself_has_its_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """As where a program gets a view of what another one has computed."""
    monkeypatch.setattr(full, "spare", lambda wanted, found: [])
    _, *here = dumped(tmp_path / "graph", replayed, level=level)
    torch._dynamo.reset()
    by_eager = dumped(tmp_path / "eager", eager, level=level)
    assert len(here) == len(by_eager) == 3
    for found, other in zip(here, by_eager, strict=True):
        assert list(found.data) == list(other.data)
        assert files(found) == files(other)


def test_files_of_one_value_are_one_file(tmp_path: Path) -> None:
    _, step, *_ = dumped(tmp_path, replayed, level="L0")
    folder = step.folder / "dump_tensor_data"
    names = ["Module.0.wide.Linear.forward.0.output.0.pt", "Module.0.split.Split.forward.0.input.0.pt"]
    assert len({(folder / name).stat().st_ino for name in names}) == 1


def test_what_has_no_room_is_named(tmp_path: Path) -> None:
    _, *here = dumped(tmp_path / "graph", replayed, level="L0", graph_copy_bytes=8192)
    torch._dynamo.reset()
    there = dumped(tmp_path / "plain", plain, level="L0")
    for found, expected in zip(here, there, strict=True):
        saved, wanted = files(found), files(expected)
        lacking = {name: reason for name, reason in holes(found).items() if "graph_copy_bytes (8192)" in reason}
        assert saved.keys() | lacking.keys() == wanted.keys()
        assert saved.keys().isdisjoint(lacking)
        assert any(".input." in name for name in saved), "some have room"
        assert len(lacking) > 2
        assert saved == {name: wanted[name] for name in saved}
        assert named(found) == saved.keys()
        for one, other in zip(found.tensors(), expected.tensors(), strict=True):
            assert one.record["Norm"] == pytest.approx(other.record["Norm"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor": {"list": ["Module.0.last."]}},
        {"task": "statistics", "statistics": {"tensor_list": ["Module.0.last."]}},
    ],
    ids=["list", "tensor_list"],
)
def test_what_is_not_to_be_saved_takes_no_room(tmp_path: Path, settings: dict[str, Any]) -> None:
    room = 2 * ROWS * 8 * 4  # for an input and an output
    _, *here = dumped(tmp_path / "graph", replayed, level="L0", graph_copy_bytes=room, **settings)
    torch._dynamo.reset()
    there = dumped(tmp_path / "plain", plain, level="L0", **settings)
    for found, expected in zip(here, there, strict=True):
        assert files(found) == files(expected)
        assert {"Module.0.last.Linear.forward.0.output.0.pt"} <= files(found).keys()
        assert all(name.startswith("Module.0.last.") for name in files(found))


def test_where_names_are_not_known_yet_all_is_copied(tmp_path: Path) -> None:
    def captured_first(debugger: PrecisionDebugger) -> None:
        compiled = compiled_model(NAME)
        x, graph = torch.zeros(ROWS, 8, device=NAME), DEVICE.Graph()
        compiled(x)
        with DEVICE.graph(graph):
            compiled(x)
        x.copy_(batch(0))
        with debugger.start(compiled):
            graph.replay()

    settings: dict[str, Any] = {"level": "L0", "tensor": {"list": ["Module.0.last."]}}
    (here,) = dumped(tmp_path / "graph", captured_first, **settings)
    torch._dynamo.reset()
    there, *_ = dumped(tmp_path / "plain", plain, **settings)
    assert files(here) == files(there)
    assert files(here)


def test_max_bytes_is_heeded(tmp_path: Path) -> None:
    _, *here = dumped(tmp_path, replayed, level="L0", max_bytes=70_000)  # of which the first step takes 60,000
    for step in here:
        full = {name for name, reason in holes(step).items() if "reached max_bytes" in reason}
        assert full
        assert full.isdisjoint(files(step))
        assert named(step) == files(step).keys()
    assert any(".output." in name for name in files(here[0])), "some are saved before"


def test_a_ring_keeps_them(tmp_path: Path) -> None:
    def program(debugger: PrecisionDebugger) -> None:
        replayed(debugger)
        debugger.flush_kept()

    here = dumped(tmp_path / "ring", program, level="L0", keep_last=2, flush_on=["rpc"])
    torch._dynamo.reset()
    _, _, *there = dumped(tmp_path / "all", replayed, level="L0")
    assert len(here) == len(there) == 2
    for found, expected in zip(here, there, strict=True):
        assert files(found) == files(expected)
        assert named(found) == files(found).keys()


def test_a_ring_without_room_drops_its_oldest(tmp_path: Path) -> None:
    def program(debugger: PrecisionDebugger) -> None:
        replayed(debugger)
        debugger.flush_kept()

    here = dumped(tmp_path, program, level="L0", keep_last=3, flush_on=["rpc"], max_bytes=60000)
    assert 1 <= len(here) < 3
    assert all(named(step) == files(step).keys() for step in here)
    assert here[-1].folder.parent.name == "step3"


def test_a_step_without_a_replay_has_none(tmp_path: Path) -> None:
    def program(debugger: PrecisionDebugger) -> None:
        replayed(debugger)
        with debugger.start():
            pass

    *_, step = dumped(tmp_path, program, level="L0")
    assert step.data == {}
    assert not any("input" in name or "output" in name for name in files(step))


# ---- one device's rows and copies ---------------------------------------------------------------------


def rows_here(size: int = 1 << 20) -> PlainGraphRows:
    device = of(torch.device(NAME, 0))
    assert isinstance(device, Accelerator)
    return PlainGraphRows(device, GraphCopies(device, size))


def copied(rows: PlainGraphRows, slots: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    arrival = rows.arrive(slots)
    assert arrival is not None
    found = arrival.first(slots)
    assert found is not None
    return arrival.copy(found, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_batch_in_graphs_of_several_sizes(dtype: torch.dtype) -> None:
    rows, slots, graphs = rows_here(), [], {}
    place = torch.zeros(8, 5, dtype=torch.uint8).to(dtype).to(NAME)
    for size in (8, 4, 2):
        graph = graphs[size] = DEVICE.Graph()
        with DEVICE.graph(graph):
            (slot,) = rows.measure([(slots, place[:size, 1:4])], size, [0])
        slots = slots or [slot]
    for size, begin, end in ((8, 0, -1), (8, 0, 5), (4, 0, 3), (2, 1, 2), (4, 2, 9), (8, 0, 8), (2, 2, 4)):
        values = torch.randint(0, 2, (8, 5)).to(dtype)
        place.copy_(values)
        rows.switch(True, begin, end)
        graphs[size].replay()
        rows.switch(False)
        place.copy_(torch.zeros_like(values))
        graphs[8].replay()  # while nothing captures
        found = copied(rows, slots, dtype)
        assert found is not None
        expected = values[:size, 1:4][begin : end if end >= 0 else None]
        assert found.shape == expected.shape
        assert found.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


def test_a_graph_that_needs_more_room_has_it_beside_the_smaller_one() -> None:
    rows, slots, graphs = rows_here(), [], {}
    place = torch.arange(64.0).to(NAME)
    for size in (4, 64, 16):
        graph = graphs[size] = DEVICE.Graph()
        with DEVICE.graph(graph):
            (slot,) = rows.measure([(slots, place[:size])], None, [0])
        slots = slots or [slot]
    for size in (64, 4, 16):
        rows.switch(True)
        graphs[size].replay()
        found = copied(rows, slots, torch.float32)
        assert found is not None
        assert found.tolist() == list(range(size))


def test_a_copy_is_of_the_values_at_its_place_in_the_graph() -> None:
    rows, x, graph = rows_here(), torch.zeros(ROWS, 8, device=NAME), DEVICE.Graph()
    with DEVICE.graph(graph):
        y = x * 2
        (slot,) = rows.measure([((), y)], None, [0])
        y.add_(100)
        (other, none) = rows.measure([((), y), ((), x)], None, [0])
    for number in range(2):
        x.copy_(batch(number))
        rows.switch(True)
        graph.replay()
        arrival = rows.arrive([slot, other])
        assert arrival is not None
        for each, expected in ((slot, batch(number) * 2), (other, batch(number) * 2 + 100)):
            found = arrival.first([each])
            assert found is not None
            value = arrival.copy(found, torch.float32)
            assert value is not None
            assert torch.equal(value, expected)
        found = arrival.first([none])
        assert found is not None
        assert not found.captured.copied
        assert arrival.copy(found, torch.float32) is None


def test_what_is_not_asked_for_does_not_arrive() -> None:
    rows, x, graph = rows_here(), torch.ones(4, 8, device=NAME), DEVICE.Graph()
    with DEVICE.graph(graph):
        one, other = rows.measure([((), x), ((), x + 1)], None, [0, 1])
    rows.switch(True)
    graph.replay()
    arrival = rows.arrive([other])
    assert arrival is not None
    assert arrival.copies is not None
    assert arrival.copies.host.nbytes <= 256
    found = [arrival.first([each]) for each in (one, other)]
    assert [arrival.copy(each, torch.float32) is None for each in found if each is not None] == [True, False]
