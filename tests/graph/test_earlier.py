"""Runs of a compiled graph that are like runs in earlier steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.graph.entries import Entries

from ..capturing import holes
from .conftest import EAGER, Net

Step = Callable[[int], object]
"""Runs what is captured as the step of that number."""


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step of each run of a graph that is described."""
    found: list[int] = []
    begin = Entries.__init__

    def noted(self: Entries, plan: Any, context: Any, *others: Any) -> None:
        found.append(context.step)
        begin(self, plan, context, *others)

    monkeypatch.setattr(Entries, "__init__", noted)
    return found


def captured(model: nn.Module, folder: Path, level: str, numbers: range, step: Step, before: Step) -> list[StepDump]:
    debugger = PrecisionDebugger({"dump_path": str(folder), "level": level, "risk_level": "ALL"})
    for number in numbers:
        with torch.no_grad():
            before(number)
            with debugger.start(model):
                step(number)
    debugger.flush()
    debugger.session.close()
    return [read(each) for each in steps(folder)]


def check(
    folder: Path, model: nn.Module, step: Step, level: str = "mix", count: int = 5, before: Step = lambda number: None
) -> list[StepDump]:
    """`count` steps in one capture hold what each holds in a capture of its own. `before` is called before each, and
    captured in none."""
    found = captured(model, folder / "together", level, range(count), step, before)
    assert len(found) == count
    for number, together in enumerate(found):
        (alone,) = captured(model, folder / f"alone{number}", level, range(number, number + 1), step, before)
        assert list(together.data) == list(alone.data)
        assert together.data == alone.data
        assert together.construct == alone.construct
        assert holes(together) == holes(alone)
        assert together.manifest is not None
        assert alone.manifest is not None
        assert together.manifest["sites"] == alone.manifest["sites"]
    return found


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    model.eval().requires_grad_(False).compile(backend=msprobe_backend, options={**EAGER, **options})
    return model


def batch(number: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_steps_differ_in_their_values(tmp_path: Path, described: list[int], inner: str, level: str) -> None:
    model = compiled(Net(), inner=inner)
    found = check(tmp_path, model, lambda number: model(batch(number)), level)
    assert described == [0] + 5 * [0]  # the first step, and those of captures of their own
    outputs = [next(reversed(step.data.values()))["output"][0]["Max"] for step in found]
    assert len(set(outputs)) == len(found)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["L0", "mix"])
def test_steps_on_a_gpu(tmp_path: Path, described: list[int], level: str) -> None:
    model = compiled(Net().cuda(), inner="inductor")
    check(tmp_path, model, lambda number: model(batch(number).cuda()), level)
    assert described == [0] + 5 * [0]


class Views(nn.Module):
    """With values that are views and parts of others, an output that is an input, and one that is returned twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = torch.relu(self.up(x)).split(8, dim=-1)
        heads = q.reshape(2, 2, 4).transpose(0, 1)
        mixed = torch.sigmoid(heads) + k.view(2, 2, 4).transpose(0, 1)
        y = torch.relu(mixed.transpose(0, 1).reshape(2, 8) + v + self.shift)
        return x, y, y.view(4, 4), [y]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_views_and_parts(tmp_path: Path, described: list[int], inner: str, device: str) -> None:
    model = compiled(Views().to(device), inner=inner)
    check(tmp_path, model, lambda number: model(batch(number).to(device)))
    assert described == [0] + 5 * [0]


def test_every_layer_that_shares_a_graph(tmp_path: Path, described: list[int]) -> None:
    model = Net(layers=3).eval().requires_grad_(False)
    for layer in model.layers:
        compiled(layer)
    check(tmp_path, model, lambda number: model(batch(number)))
    assert described == 3 * [0] + 15 * [0]


def test_a_graph_that_is_called_more_often_in_some_steps(tmp_path: Path, described: list[int]) -> None:
    model = compiled(Net())
    check(tmp_path, model, lambda number: [model(batch(number + at)) for at in range(1 + number % 3)])
    assert described[:3] == [0, 1, 2]


def test_sizes_that_change_and_come_back(tmp_path: Path, described: list[int]) -> None:
    model = compiled(Net())
    with torch.no_grad():
        for rows in (2, 3, 5):  # the second one is compiled for any size
            model(batch(0, rows))
    check(tmp_path, model, lambda number: model(batch(number, 3 + number % 2)), count=6)
    assert described[:2] == [0, 1]
    assert len(described) == 2 + 6


@pytest.mark.parametrize("write", ["in place", "data", "replaced"])
def test_weights_that_change(tmp_path: Path, write: str) -> None:
    model = compiled(Net())

    def change(number: int) -> None:
        value = torch.full((3, 8), 0.5 + number // 2)
        if write == "in place":
            model.head.weight.copy_(value)
        elif write == "data":
            model.head.weight.data = value
        else:
            model.head.weight = nn.Parameter(value, requires_grad=False)

    found = check(tmp_path, model, lambda number: model(batch(number)), before=change)
    weights = [step.data["Module.head.Linear.forward.0"]["parameters"]["weight"]["Max"] for step in found]
    assert weights == [0.5, 0.5, 1.5, 1.5, 2.5]


def test_a_module_that_runs_eagerly_before(tmp_path: Path) -> None:
    model = Net().eval().requires_grad_(False)
    compiled(model.layers[1])
    check(tmp_path, model, lambda number: [model.layers[1](batch(9), scale=2.0) if number % 2 else 0, model(batch(1))])


class Chosen(nn.Module):
    """How many values it goes on with depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(x))
        return torch.sigmoid(y[y > 0]).sum()


def test_a_run_that_begins_alike_and_goes_on_differently(tmp_path: Path, described: list[int]) -> None:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    try:
        model = compiled(Chosen())
        found = check(tmp_path, model, lambda number: model(batch(number)))
    finally:
        torch._dynamo.config.capture_dynamic_output_shape_ops = False
    sizes = {tuple(step.data["Torch.sigmoid.0.forward"]["output"][0]["shape"]) for step in found}
    assert len(sizes) > 1
    assert len(described) > 6


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model = compiled(Net(), inner="inductor")
    check(tmp_path, model, lambda number: model(batch(number) * [1.0, float("nan"), float("inf"), 0.0, -1.0][number]))


def test_gradients_now_and_then(tmp_path: Path) -> None:
    model = Net()
    model.compile(backend=msprobe_backend, options=EAGER)

    def step(number: int) -> None:
        with torch.set_grad_enabled(number % 2 == 1):
            loss = model(batch(number)).sum()
        if number % 2:
            loss.backward()

    check(tmp_path, model, step, before=lambda number: model.zero_grad())


def test_nothing_is_kept_alive(tmp_path: Path) -> None:
    model = compiled(Net())
    kept: list[weakref.ref[Any]] = []

    def step(number: int) -> None:
        x = batch(number)
        kept.extend(map(weakref.ref, (x, model(x))))

    captured(model, tmp_path / "dump", "mix", range(4), step, lambda number: None)
    gc.collect()
    assert [reference() for reference in kept] == len(kept) * [None]


def test_no_step_waits_for_another(tmp_path: Path) -> None:
    """Steps are written behind the model, from records that later steps fill in anew."""
    model = compiled(Net())
    found = check(tmp_path, model, lambda number: model(batch(number)), count=30)
    means = [step.data["Module.head.Linear.forward.0"]["output"][0]["Mean"] for step in found]
    expected = [model(batch(number)).double().mean().item() for number in range(30)]
    assert means == pytest.approx(expected, rel=1e-5)


class Reshaped(nn.Module):
    """Returns a view of a value that fusion swallows, of which other views are used."""

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.sigmoid(x).view(4, 4)
        return y, torch.relu(y.reshape(16)), torch.tanh(y.view(2, 8).view(2, 2, 4))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_views_of_what_is_only_returned(tmp_path: Path, described: list[int], inner: str) -> None:
    model = compiled(Reshaped(), inner=inner)
    check(tmp_path, model, lambda number: model(batch(number)))
    assert described == [0] + 5 * [0]


class Cached(nn.Module):
    """Writes to a weight of its own, one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = nn.Parameter(torch.zeros(64, 8), requires_grad=False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        total = torch.relu(self.cache).sum()
        self.cache.index_copy_(0, at, x)
        return total


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_weight_that_the_graph_writes_to(tmp_path: Path, inner: str) -> None:
    model = compiled(Cached(), inner=inner)
    steps_of = captured(
        model,
        tmp_path / "dump",
        "L1",
        range(6),
        lambda number: model(torch.full((1, 8), float(number + 1)), torch.tensor([number])),
        lambda number: None,
    )
    assert [step.data["Torch.relu.0.forward"]["input_args"][0]["Max"] for step in steps_of] == [0, 1, 2, 3, 4, 5]


class Chooser(nn.Module):
    """Its layers, which have buffers and no weights, are called by one compiled function, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(8, affine=False) for _ in range(3))
        self.call = torch.compile(lambda layer, x: layer(x), backend=msprobe_backend, options=EAGER)

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for at in order:
            x = self.call(self.layers[at], x) + at
        return x


def test_a_graph_that_serves_modules_in_another_order(tmp_path: Path) -> None:
    model = Chooser().eval()
    orders = [[0, 1, 2], [0, 1, 2], [1, 2], [2, 1, 0], [2, 1, 0]]
    for at, layer in enumerate(model.layers):
        layer.running_mean.fill_(at + 1.0)
    found = check(tmp_path, model, lambda number: model(batch(number), orders[number]), level="L0")
    for order, step in zip(orders, found, strict=True):
        layers = [name.split(".")[2] for name in step.data if name.startswith("Module.layers.")]
        assert layers == [str(at) for at in order]


def test_a_tap_that_fails_leaves_no_value_of_another_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msprobe_graph.graph.earlier import Stage

    model, reads = compiled(Net()), 0
    read_stage = Stage.read

    def failing(self: Stage, *args: Any) -> bool:
        nonlocal reads
        reads += 1
        if reads == 5:
            raise MemoryError("no room")
        return read_stage(self, *args)

    monkeypatch.setattr(Stage, "read", failing)
    found = captured(model, tmp_path / "dump", "mix", range(3), lambda n: model(batch(n)), lambda n: None)
    monkeypatch.setattr(Stage, "read", read_stage)
    alone = captured(model, tmp_path / "alone", "mix", range(1, 2), lambda n: model(batch(n)), lambda n: None)[0]
    assert any("MemoryError" in reason for reason in holes(found[1]).values())
    for name, entry in found[1].data.items():
        for mine, right in zip(entry.get("output", []), alone.data[name].get("output", []), strict=False):
            assert mine is None or mine["Max"] in (None, right["Max"])
