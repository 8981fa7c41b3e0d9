"""Calls on a GPU that are like those of the step before."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import math
from pathlib import Path

import torch

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import read, steps
from msprobe_graph.taps import row_memory
from msprobe_graph.taps.launches import launch_of
from msprobe_graph.taps.triton_rows import KINDS
from tests.capturing import Apply

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "every other": lambda x: x[:, ::2],
    "not aligned": lambda x: x.flatten()[1:],
    "expanded": lambda x: x[:1].expand(7, -1, -1),
    "one element": lambda x: x[:1, :1, :1],
    "large": lambda x: x.repeat(64, 5, 7),
}


def values(dtype: torch.dtype, number: int) -> torch.Tensor:
    """[6, 10, 16] on the GPU."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 10, 16, generator=generator) * 8
    if dtype is torch.bool:
        return (x > 0).cuda()
    if not dtype.is_floating_point:
        x = x.abs()
    return x.to(dtype).cuda() if dtype not in (torch.uint32, torch.uint64) else x.to(torch.int32).cuda().to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_they_are_measured_right(dtype: torch.dtype, layout: str, tmp_path: Path, described: list[int]) -> None:
    """Against float64 on the CPU; and in the last steps nothing is described."""
    model = Apply(lambda x, flag: x)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    inputs = [LAYOUTS[layout](values(dtype, number)) for number in range(4)]
    with torch.no_grad():
        for x in inputs:
            with debugger.start(model):
                model(x, flag=True)
    debugger.flush()
    assert 0 in described
    assert not {2, 3} & set(described)
    for folder, x in zip(steps(tmp_path), inputs, strict=True):
        entry = read(folder).data["Module.Apply.forward.0"]
        exact = x.cpu().to(torch.float64)
        for record in (entry["input_args"][0], entry["output"][0]):
            assert record["shape"] == list(x.shape)
            assert record["Max"] == exact.max()
            assert record["Min"] == exact.min()
            assert math.isclose(record["Mean"], exact.mean(), rel_tol=1e-6, abs_tol=1e-6)
            assert math.isclose(record["Norm"], exact.norm(), rel_tol=1e-6)


def test_what_is_not_finite_is_counted(tmp_path: Path) -> None:
    model = Apply(lambda x: x)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    for number in range(4):
        x = torch.ones(32, 32, device="cuda")
        if number == 2:
            x[0, 0], x[0, 1] = math.nan, math.inf
        with torch.no_grad(), debugger.start(model):
            model(x)
    debugger.flush()
    counts = [
        read(folder).data["Module.Apply.forward.0"]["output"][0].get("nan_count", 0) for folder in steps(tmp_path)
    ]
    assert counts == [0, 0, 1, 0]


def test_a_value_changed_in_place_is_measured_as_it_was(tmp_path: Path) -> None:
    """Without waiting for the GPU, whose work is far behind."""
    model = Apply(lambda x: x.add_(1))
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    heavy = torch.randn(4096, 4096, device="cuda")
    with torch.no_grad():
        for number in range(4):
            x = torch.full((64, 64), float(number), device="cuda")
            with debugger.start(model):
                for _ in range(20):
                    heavy @ heavy
                model(x)
                x.zero_()
    debugger.flush()
    for number, folder in enumerate(steps(tmp_path)):
        entry = read(folder).data["Module.Apply.forward.0"]
        assert (entry["input_args"][0]["Max"], entry["output"][0]["Max"]) == (number, number + 1)


def test_another_stream_and_a_capture_are_left_to_the_other_way(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8).cuda()
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "mix"})
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for number in range(4):
            x = torch.full((4, 8), float(number), device="cuda")
            torch.cuda.synchronize()
            with debugger.start(model):
                if number == 2:
                    with torch.cuda.stream(stream):
                        model(x)
                    stream.synchronize()
                else:
                    model(x)
    debugger.flush()
    maxima = [read(folder).data["Module.Linear.forward.0"]["input_args"][0]["Max"] for folder in steps(tmp_path)]
    assert maxima == [0, 1, 2, 3]


def test_a_tensor_of_five_dimensions_that_lie_apart_is_none_of_them() -> None:
    assert launch_of(torch.ones(4, 4, 4, 4, 4, device="cuda")[::2, ::2, ::2, ::2, ::2]) is None


def test_a_call_on_both_devices(tmp_path: Path, described: list[int]) -> None:
    """A copy to the GPU: what it is given is measured where it lies."""
    model = Apply(lambda x, of: x.to("cuda") + of)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    given = [(torch.full((3, 4), number + 1.0), torch.full((3, 4), number - 1.0)) for number in range(4)]
    with torch.no_grad():
        for x, of in given:
            with debugger.start(model):
                model(x, of=of.cuda())
    debugger.flush()
    assert not {2, 3} & set(described)
    for folder, (x, of) in zip(steps(tmp_path), given, strict=True):
        entry = read(folder).data["Module.Apply.forward.0"]
        measured = entry["input_args"][0], entry["input_kwargs"]["of"], entry["output"][0]
        assert [each["Max"] for each in measured] == [each.max().item() for each in (x, of, x + of)]


def test_a_step_with_more_values_than_there_is_room_for(
    tmp_path: Path, described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next has more room, until all calls are like earlier ones."""
    monkeypatch.setattr(row_memory, "CHUNK", 64)
    model = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(50)))
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    with torch.no_grad():
        for number in range(6):
            with debugger.start(model):
                model(torch.full((4, 4), float(number), device="cuda"))
    debugger.flush()
    assert 2 in described
    assert not {4, 5} & set(described)
    for number, folder in enumerate(steps(tmp_path)):
        step = read(folder)
        assert len(step.data) == 51
        assert {record["Max"] for entry in step.data.values() for record in entry["output"]} == {number}
