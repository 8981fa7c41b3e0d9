"""Capture on a device that is neither the CPU nor CUDA; see test_host_device, which runs this."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger, acl_save, flush, msprobe_backend
from msprobe_graph.cli import main
from msprobe_graph.dump.reader import StepDump, TensorAt, read, steps
from msprobe_graph.graph.plan import Plan
from msprobe_graph.graph.replay import Frame
from msprobe_graph.taps.device import Accelerator, Npu, of
from msprobe_graph.taps.plain_graph_rows import PlainGraphRows

from ..capturing import holes
from ..models import Block

NAME = os.environ["HOST_DEVICE"]
DEVICE: Any = torch.get_device_module(NAME)
LEVELS = ("L0", "L1", "mix")
# With "npu" moments are computed in float32, as on one.
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def model(device: str = NAME) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(8), Block(8)).to(device).eval()


def compiled_model(device: str = NAME) -> Any:
    return torch.compile(model(device), backend=msprobe_backend, options={"inner": "aot_eager"})


def batch(number: int, rows: int = 4) -> torch.Tensor:
    torch.manual_seed(number + 1)
    return torch.randn(rows, 8)


def dumped(folder: Path, program: Callable[[PrecisionDebugger], Any], **settings: Any) -> list[StepDump]:
    debugger = PrecisionDebugger({"dump_path": str(folder), "risk_level": "ALL", **settings})
    program(debugger)
    debugger.flush()
    return [read(step) for step in steps(folder)]


def assert_alike(here: StepDump, there: StepDump) -> None:
    """The same entries, and the same values where `here` has any."""
    assert list(here.data) == list(there.data)
    pairs = list(zip(here.tensors(), there.tensors(), strict=True))
    assert sum("reason" in a.record for a, _ in pairs) < len(pairs) / 3
    for a, b in pairs:
        if "reason" in a.record or "reason" in b.record:
            continue
        for field in ("Max", "Min", "Mean", "Norm"):
            assert a.record[field] == pytest.approx(b.record[field], **TOLERANCE), (a.entry, a.position, field)
        assert a.record["shape"] == b.record["shape"]
        if "data_name" in a.record:
            torch.testing.assert_close(here.load(a), there.load(b))


def run(program: Any, x: torch.Tensor) -> Callable[[PrecisionDebugger], None]:
    def step(debugger: PrecisionDebugger) -> None:
        with debugger.start(program):
            program(x).sum().backward()

    return step


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_eager(tmp_path: Path, level: str, task: str) -> None:
    (there,) = dumped(tmp_path / "cpu", run(model("cpu"), batch(0)), level=level, task=task)
    (here,) = dumped(tmp_path / "here", run(model(), batch(0).to(NAME)), level=level, task=task)
    assert here.manifest is not None
    assert here.manifest["device"] == NAME
    assert_alike(here, there)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_compiled(tmp_path: Path, level: str, task: str) -> None:
    (there,) = dumped(tmp_path / "cpu", run(compiled_model("cpu"), batch(0)), level=level, task=task)
    (here,) = dumped(tmp_path / "here", run(compiled_model(), batch(0).to(NAME)), level=level, task=task)
    assert_alike(here, there)


# ---- graphs that are captured and replayed ------------------------------------------------------------


def rows_here() -> PlainGraphRows:
    device = of(torch.device(NAME, 0))
    assert isinstance(device, Accelerator)
    assert isinstance(device, Npu) == (NAME == "npu")
    return PlainGraphRows(device)


def test_rows_are_of_the_last_replay_and_count() -> None:
    rows, x = rows_here(), torch.zeros(4, 8, device=NAME)
    graph = DEVICE.Graph()
    with DEVICE.graph(graph):
        y = x * 2
        (slot,) = rows.measure([((), y)], None)
        del y  # its memory is used again, by what comes behind
        z = x + 100
        (other,) = rows.measure([((), z)], None)
    for replays in (1, 3, 0, 2):
        rows.switch(True)
        for number in range(replays):
            x.copy_(batch(number))
            graph.replay()
        rows.switch(False)
        x.fill_(float("nan"))
        graph.replay()  # while nothing captures
        arrival = rows.arrive()
        assert arrival is not None
        for each, offset, factor in ((slot, 0, 2), (other, 100, 1)):
            found = arrival.first([each])
            assert (0 if found is None else found.fired) == replays
            if found is not None:
                values = batch(replays - 1).double() * factor + offset
                high, low, mean, norm, *counts = torch.frombuffer(bytearray(found.row), dtype=torch.float64).tolist()
                expected = (values.max().item(), values.min().item(), values.mean().item(), values.norm().item())
                assert (high, low, mean, norm) == pytest.approx(expected, **TOLERANCE)
                assert torch.frombuffer(bytearray(found.row), dtype=torch.int64)[4:].tolist() == [0, 0, 0, 32]
                assert found.shape == (4, 8)
                assert len(counts) == 4


def test_rows_of_a_program_in_inference_mode_are_read_outside_of_it() -> None:
    with torch.inference_mode():
        rows, x, graph = rows_here(), torch.zeros(4, 8, device=NAME), DEVICE.Graph()
        with DEVICE.graph(graph):
            (slot,) = rows.measure([((), x * 2)], None)
    for number in range(2):
        rows.switch(True)
        with torch.inference_mode():
            x.copy_(batch(number))
            graph.replay()
            arrival = rows.arrive() if number else None
        arrival = arrival or rows.arrive()
        assert arrival is not None
        found = arrival.first([slot])
        assert found is not None
        assert torch.frombuffer(bytearray(found.row), dtype=torch.float64)[0] == (batch(number) * 2).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_padded_rows_do_not_count(dtype: torch.dtype) -> None:
    rows, x = rows_here(), torch.zeros(6, 3, device=NAME, dtype=dtype)
    graph = DEVICE.Graph()
    with DEVICE.graph(graph):
        (slot,) = rows.measure([((), x.clone())], 6)
    values = (torch.arange(18).reshape(6, 3) - 7).to(dtype)
    x.copy_(values)
    for begin, end in ((0, 4), (2, 3), (0, -1)):
        rows.switch(True, begin, end)
        graph.replay()
        arrival = rows.arrive()
        assert arrival is not None
        found = arrival.first([slot])
        assert found is not None
        counted = values[begin : end if end >= 0 else None]
        assert found.shape == tuple(counted.shape)
        fields = torch.frombuffer(bytearray(found.row), dtype=torch.float64).tolist()
        exact = counted.double()
        expected = [exact.max().item(), exact.min().item(), exact.mean().item(), exact.norm().item()]
        assert fields[:4] == pytest.approx(expected, **TOLERANCE)
        whole = torch.frombuffer(bytearray(found.row), dtype=torch.int64)
        assert whole[7] == counted.numel()
        if dtype is not torch.float32:
            assert whole[4:6].tolist() == [int(counted.max()), int(counted.min())]


def captured(debugger: PrecisionDebugger) -> tuple[Any, Any, torch.Tensor]:
    """The compiled model, a graph of it, and its input. The debugger has had one step."""
    compiled = compiled_model()
    x = torch.zeros(4, 8, device=NAME)
    with debugger.start(compiled):
        compiled(x)
    graph = DEVICE.Graph()
    with DEVICE.graph(graph):
        compiled(x)
    return compiled, graph, x


@pytest.mark.parametrize("level", LEVELS)
def test_a_replayed_step_is_a_step_without_graphs(tmp_path: Path, level: str) -> None:
    def replayed(debugger: PrecisionDebugger) -> None:
        _, graph, x = captured(debugger)
        for number in range(3):
            x.copy_(batch(number))
            with debugger.start():
                graph.replay()
            x.fill_(7.0)
            graph.replay()  # in no step

    def plain(debugger: PrecisionDebugger) -> None:
        compiled = compiled_model()
        for x in [batch(number).to(NAME) for number in range(3)]:
            with debugger.start(compiled):
                compiled(x)

    with torch.no_grad():
        _, *found = dumped(tmp_path / "graph", replayed, level=level)
        torch._dynamo.reset()
        expected = dumped(tmp_path / "plain", plain, level=level)
    assert len(found) == len(expected) == 3
    for here, there in zip(found, expected, strict=True):
        assert_alike(here, there)


def test_steps_follow_one_another_at_once_and_rest_keeps_out_what_is_replayed_between(tmp_path: Path) -> None:
    def replayed(debugger: PrecisionDebugger) -> None:
        compiled, graph, x = captured(debugger)
        session = debugger.session
        for number in range(4):
            if number == 2:
                session.rest()
                x.fill_(99.0)
                graph.replay()
            x.copy_(batch(number))
            session.resume({"": compiled})
            graph.replay()
            session.next_step(at_once=True)

    with torch.no_grad():
        _, *found = dumped(tmp_path, replayed, level="L0")
    assert len(found) == 4
    for number, step in enumerate(found):
        root: TensorAt = next(tensor for tensor in step.tensors() if tensor.position == "input_args.0")
        assert root.record["Max"] == pytest.approx(batch(number).max().item(), rel=1e-6)
        assert not any("more than once" in reason for reason in holes(step).values())


def test_two_replays_in_a_step_are_said(tmp_path: Path) -> None:
    def replayed(debugger: PrecisionDebugger) -> None:
        _, graph, _ = captured(debugger)
        with debugger.start():
            graph.replay()
            graph.replay()

    with torch.no_grad():
        _, step = dumped(tmp_path, replayed, level="L0")
    assert any("more than once" in reason for reason in holes(step).values())


def test_replays_of_a_dummy_run_are_none(tmp_path: Path) -> None:
    def replayed(debugger: PrecisionDebugger) -> None:
        _, graph, x = captured(debugger)
        for number in range(2):
            debugger.start()
            x.fill_(99.0)
            graph.replay()
            debugger.stop()
            debugger.step(dump=False)
            x.copy_(batch(number))
            with debugger.start():
                graph.replay()

    with torch.no_grad():
        _, *found = dumped(tmp_path, replayed, level="L0")
    assert len(found) == 2
    for number, step in enumerate(found):
        root: TensorAt = next(tensor for tensor in step.tensors() if tensor.position == "input_args.0")
        assert root.record["Max"] == pytest.approx(batch(number).max().item(), rel=1e-6)
        assert not any("more than once" in reason for reason in holes(step).values())


def test_a_dummy_run_that_is_called_does_not_stand_for_one_that_is_replayed(tmp_path: Path) -> None:
    def replayed(debugger: PrecisionDebugger) -> None:
        compiled, graph, x = captured(debugger)
        for _ in range(2):
            debugger.start()
            compiled(x)
            debugger.stop()
            debugger.step(dump=False)
        x.copy_(batch(0))
        with debugger.start():
            graph.replay()

    with torch.no_grad():
        _, step = dumped(tmp_path, replayed, level="L0")
    assert {"Module.Sequential.forward.0", "Module.1.up.Linear.forward.0"} <= step.data.keys()


def test_acl_save_in_a_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, graph = torch.zeros(2, 8, device=NAME), DEVICE.Graph()
    with torch.no_grad(), DEVICE.graph(graph):
        acl_save(x * 2, tmp_path / "x.pt")
        acl_save(x + 1, tmp_path / "y.pt")
    for number in range(3):
        x.copy_(batch(number, rows=2))
        graph.replay()
    flush()
    if NAME == "npu":
        for number in range(3):
            saved = [torch.load(tmp_path / f"{name}_{number}.pt", weights_only=True) for name in "xy"]
            torch.testing.assert_close(saved, [batch(number, rows=2) * 2, batch(number, rows=2) + 1])
    else:  # torch calls no functions of the host there
        assert list(tmp_path.iterdir()) == []
        assert "acl_save saves nothing from inside a graph" in caplog.text


@pytest.mark.skipif(NAME != "npu", reason="doctor --npu looks for torch.npu")
def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--npu"])
    found = {line[:31].strip(): line[31:].split() for line in capsys.readouterr().out.splitlines() if "  " in line}
    for way in (
        "eager, statistics",
        "eager, tensors",
        "compiled with aot_eager",
        "acl_save",
        "statistics in a replayed graph",
        "acl_save in a replayed graph",
    ):
        assert "works" in found[way][:2], (way, found[way])
    assert "FAILS" in found["compiled with inductor"][:2], "which knows nothing of this device"
    assert code == 1


@pytest.mark.parametrize("padded", [None, 4], ids=["no batch", "a batch"])
def test_a_view_is_measured_itself_where_other_rows_of_it_count(padded: int | None) -> None:
    plan = Plan(calls=[], values={}, inputs={}, outputs={}, anchors={}, reshaped={0: [2, 4]})
    base = torch.ones(1, 4, 8, device=NAME)
    frame = Frame(PlainGraphRows(Accelerator(base.device)))
    with DEVICE.graph(DEVICE.Graph()):
        frame.measure(plan, {2: base.view(4, 8)}, padded, ())  # as in a graph of a part of the call
        frame.begin()
        frame.measure(plan, {0: base}, padded, ())
        frame.measure(plan, {2: base.view(4, 8), 4: base.view(1, 32)}, padded, ())
    assert frame.is_had_from_another(plan, 4)
    assert frame.is_had_from_another(plan, 2) == (padded is None)
    assert frame.sign(plan) is frame.slots[0 if padded is None else 2]
    assert frame.slots.keys() == {0, 2}


def test_weights_that_are_written_to_unseen_are_measured_anew_when_it_is_told(tmp_path: Path) -> None:
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    program = model()
    compiled = torch.compile(program, backend=msprobe_backend, options={"inner": "aot_eager"})
    weight = next(program.parameters())
    x, graph = batch(0).to(NAME), DEVICE.Graph()
    with torch.no_grad():
        with debugger.start(compiled):
            compiled(x)
        with DEVICE.graph(graph):
            compiled(x)
        for number in range(6):
            if number == 3:
                weight.data.fill_(100.0)  # no version counts it
                debugger.session.forget_weights()
            with debugger.start():
                graph.replay()
    debugger.flush()
    _, *replayed = [read(step) for step in steps(tmp_path)]
    maxima = [
        max(record["Max"] for entry in step.data.values() for record in entry.get("parameters", {}).values())
        for step in replayed
    ]
    assert maxima[:3] == [maxima[0]] * 3
    assert maxima[0] < 100
    assert maxima[3:] == [100.0] * 3
