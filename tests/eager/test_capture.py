"""Eager capture: what is recorded of a program, and that the program computes what it computes without."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps

from .conftest import LEVELS, Capture


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Residual(nn.Module):
    """A block whose input is used twice, and whose layer is used three times."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(torch.tanh(self.fc(self.norm(x)))) * x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.dropout(x)
        x[:, 0] = 0.5
        return self.head(F.relu(x, inplace=True))


def modules(step: StepDump) -> list[str]:
    return [name for name in step.data if name.startswith("Module.")]


def norms(step: StepDump, part: str = "output") -> dict[str, float]:
    """The first tensor's norm, by entry."""
    found = {}
    for tensor in step.tensors():
        if tensor.position.startswith(part):
            found.setdefault(tensor.entry, tensor.record["Norm"])
    return found


@pytest.mark.parametrize("task", ["statistics", "tensor"])
@pytest.mark.parametrize("level", LEVELS)
def test_outputs_and_gradients_are_bit_identical(capture: Capture, level: str, task: str) -> None:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(4, 6, requires_grad=True)

    def step() -> list[Tensor]:
        torch.manual_seed(1)  # dropout
        model.zero_grad()
        x.grad = None
        out = model(x * 1)
        F.cross_entropy(out, torch.tensor([0, 1, 2, 0])).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        return [out.detach().clone(), *(grad.clone() for grad in [x.grad, *grads] if grad is not None)]

    plain, captured = step(), []
    capture(model, lambda: captured.extend(step()), level, task=task)
    assert len(plain) == len(captured) == 2 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, step(), strict=True))


def test_root_is_an_entry_and_a_module_used_twice_is_numbered(capture: Capture) -> None:
    model = Residual()
    x = torch.randn(2, 6)
    step = capture(model, lambda: model(x), "L0")
    assert list(step.data) == [
        "Module.norm.LayerNorm.forward.0",
        "Module.fc.Linear.forward.0",
        "Module.fc.Linear.forward.1",
        "Module.Residual.forward.0",
    ]
    assert step.construct == {
        **dict.fromkeys(step.data, "Module.Residual.forward.0"),
        "Module.Residual.forward.0": None,
    }
    assert step.data["Module.fc.Linear.forward.1"]["site"] == {"module": "fc", "number": 1}
    assert list(step.data["Module.fc.Linear.forward.0"]) == [
        "input_args",
        "input_kwargs",
        "output",
        "parameters",
        "site",
    ]
    assert list(step.data["Module.fc.Linear.forward.0"]["parameters"]) == ["weight", "bias"]
    with torch.no_grad():
        exact = model.norm(x).double()
    assert norms(step)["Module.norm.LayerNorm.forward.0"] == pytest.approx(exact.norm().item(), rel=1e-6)


def test_a_shared_module_bears_its_first_name(capture: Capture) -> None:
    model = nn.Sequential(nn.ReLU())
    model.append(model[0])
    step = capture(model, lambda: model(torch.ones(1)), "L0")
    assert modules(step) == ["Module.0.ReLU.forward.0", "Module.0.ReLU.forward.1", "Module.Sequential.forward.0"]


def test_calls_are_placed_in_their_modules(capture: Capture) -> None:
    model = Model().eval()
    step = capture(model, lambda: model(torch.randn(2, 6)), "mix")
    construct, parents = step.construct, {}
    for name in step.data:
        if name.startswith("Torch.tanh"):
            parents[name] = construct[name]
    assert parents == {
        "Torch.tanh.0.forward": "Module.blocks.0.Residual.forward.0",
        "Torch.tanh.1.forward": "Module.blocks.1.Residual.forward.0",
    }
    linear = step.data["Functional.linear.3.forward"]
    assert linear["site"] == {"module": "blocks.1.fc", "number": 1}
    assert construct["Functional.linear.3.forward"] == "Module.blocks.1.fc.Linear.forward.1"
    order = list(step.data)  # an entry is placed when its call ends: children precede parents
    assert all(order.index(name) < order.index(parent) for name, parent in construct.items() if parent)
    frames = {entry: frames for entries, frames in step.stack.values() for entry in entries}
    assert set(frames) >= {name for name in order if name.endswith("forward")}
    assert "in forward, \n return x + self.fc" in frames["Torch.tanh.0.forward"][0]
    assert not any("msprobe_graph" in line and "/tests/" not in line for line in frames["Torch.tanh.0.forward"])


def test_list_of_models(capture: Capture) -> None:
    models = [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]
    step = capture(models, lambda: models[1](models[0](torch.ones(1, 2))), "L0")
    assert modules(step) == [
        "Module.0.Linear.forward.0",
        "Module.1.0.Linear.forward.0",
        "Module.1.Sequential.forward.0",
    ]


def test_arguments_by_keyword_alone(capture: Capture) -> None:
    model = Apply(lambda *, x, scale: x * scale)
    step = capture(model, lambda: model(x=torch.ones(3), scale=2.0), "mix")
    entry = step.data["Module.Apply.forward.0"]
    assert entry["input_args"] == []
    assert entry["input_kwargs"]["x"]["Norm"] == pytest.approx(3**0.5)
    assert entry["input_kwargs"]["scale"] == {"type": "float", "value": 2.0}


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_an_exception_that_the_program_catches(tmp_path: Any, level: str) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise ValueError("too large")
            return x

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Fails())
            self.after = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except ValueError:
                return self.after(x)

    model = Catches()
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": level, "risk_level": "ALL"})
    for x in (torch.ones(2), -torch.ones(2), torch.ones(2)):
        with debugger.start(model):
            model(x)
    first, second, third = (read(folder) for folder in steps(tmp_path))
    assert modules(first) == modules(third)
    assert first.construct["Module.after.ReLU.forward.0"] == "Module.Catches.forward.0"
    assert first.construct["Module.Catches.forward.0"] is None
    assert first.data["Module.after.ReLU.forward.0"]["site"]["module"] == "after"
    assert "output" in first.data["Module.Catches.forward.0"]
    assert first.manifest is not None
    holes = {hole["site"]: hole["reason"] for hole in first.manifest["holes"]}
    assert "ValueError" in holes["Module.inner.0.Fails.forward.0.output"]
    assert modules(second) == [
        "Module.inner.0.Fails.forward.0",
        "Module.inner.Sequential.forward.0",
        "Module.Catches.forward.0",
    ]


@pytest.mark.parametrize("level", ["L1", "mix"])
def test_an_operator_that_raises(capture: Capture, level: str) -> None:
    def program(x: Tensor) -> Tensor:
        try:
            return x @ x
        except RuntimeError:
            return x.exp()

    model = Apply(program)
    step = capture(model, lambda: model(torch.ones(2, 3)), level)
    assert "Tensor.exp.0.forward" in step.data


def test_nested_outputs(capture: Capture) -> None:
    Pair = collections.namedtuple("Pair", "low high")

    @dataclasses.dataclass
    class Answer:
        logits: Tensor
        extra: Any

    model = Apply(lambda x: Answer(x + 1, {"pair": Pair(x + 2, [x + 3]), "none": None}))
    step = capture(model, lambda: model(torch.zeros(4)), "L0")
    seen = {t.position: t.record["Max"] for t in step.tensors() if t.position.startswith("output")}
    assert seen == {"output.0.logits": 1, "output.0.extra.pair.low": 2, "output.0.extra.pair.high.0": 3}
    assert step.data["Module.Apply.forward.0"]["output"][0]["extra"]["none"] is None


@pytest.mark.parametrize("task", ["statistics", "tensor"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_later_change_in_place_alters_nothing(capture: Capture, level: str, task: str) -> None:
    x = torch.ones(3)

    def program(x: Tensor) -> Tensor:
        y = x.exp()
        y.mul_(0)
        x.fill_(7)
        return y

    model = Apply(program)
    step = capture(model, lambda: model(x), level, task=task)
    entry = next((name for name in step.data if ".exp." in name), "Module.Apply.forward.0")
    first = next(tensor for tensor in step.tensors() if tensor.entry == entry)
    assert first.record["Max"] == 1
    if ".exp." in entry:
        assert step.data[entry]["output"][0]["Max"] == pytest.approx(2.718281828, rel=1e-6)
    if task == "tensor":
        assert torch.equal(step.load(first), torch.ones(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("level", LEVELS)
def test_grad_modes(capture: Capture, level: str, mode: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def program() -> None:
        with mode():
            model(torch.ones(2, 3))

    step = capture(model, program, level)
    names = list(step.data)
    if level in ("L0", "mix"):
        assert modules(step) == ["Module.0.Linear.forward.0", "Module.1.ReLU.forward.0", "Module.Sequential.forward.0"]
    if level in ("L1", "mix"):
        assert {"Functional.linear.0.forward", "Functional.relu.0.forward"} <= set(names)
        assert step.data["Functional.relu.0.forward"]["output"][0]["requires_grad"] is (mode is torch.enable_grad)
    if level == "L2":
        assert {name.split(".")[1] for name in names} >= {"relu"}
        assert {"linear", "addmm"} & {name.split(".")[1] for name in names}


def test_autocast(capture: Capture) -> None:
    model = nn.Linear(3, 3)

    def program() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(2, 3))

    step = capture(model, program, "mix")
    entry = step.data["Functional.linear.0.forward"]
    assert entry["input_args"][0]["dtype"] == "torch.float32"
    assert entry["output"][0]["dtype"] == "torch.bfloat16"
    assert step.data["Module.Linear.forward.0"]["parameters"]["weight"]["dtype"] == "torch.float32"


@torch.library.custom_op("msprobe_graph_capture::scale_into", mutates_args={"out", "count"})
def scale_into(out: Tensor, x: Tensor, factor: float, count: Tensor) -> None:
    out.copy_(x * factor)
    count.add_(1)


@torch.library.custom_op("msprobe_graph_capture::twice", mutates_args={"seen"})
def twice(x: Tensor, seen: Tensor) -> Tensor:
    seen.fill_(5)
    return x * 2


@pytest.mark.parametrize("level", ["L1", "mix", "L2"])
@pytest.mark.parametrize("spelling", ["custom_op", "packet", "overload"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_custom_operator_writes_is_its_output(capture: Capture, level: str, spelling: str, mode: Any) -> None:
    ops = torch.ops.msprobe_graph_capture
    void = {"custom_op": scale_into, "packet": ops.scale_into, "overload": ops.scale_into.default}[spelling]
    both = {"custom_op": twice, "packet": ops.twice, "overload": ops.twice.default}[spelling]

    def program(x: Tensor) -> Tensor:
        out, count = torch.zeros(3), torch.zeros(1)
        void(out, x, factor=3.0, count=count)
        return both(out, count)

    model = Apply(program)
    result = []

    def run() -> None:
        with mode():
            result.append(model(torch.ones(3)))

    step = capture(model, run, level)
    assert torch.equal(result[0], torch.full((3,), 6.0))
    entry = step.data["msprobe_graph_capture.scale_into.0.forward"]
    assert [value["Max"] for value in entry["output"]] == [3.0, 1.0]
    before = [*entry["input_args"], *entry["input_kwargs"].values()]
    assert [value["Max"] for value in before if value["type"] == "torch.Tensor"] == [0.0, 1.0, 0.0]
    entry = step.data["msprobe_graph_capture.twice.0.forward"]
    assert [value["Max"] for value in entry["output"]] == [6.0, 5.0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_activation_checkpointing(capture: Capture, level: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
    x = torch.randn(3, 4, requires_grad=True)

    def step() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        y: Tensor = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant)  # type: ignore[assignment]
        y.square().sum().backward()
        grads = [x.grad, *(parameter.grad for parameter in model.parameters())]
        return [grad.clone() for grad in grads if grad is not None]

    plain, captured = step(), []
    dump = capture(model, lambda: captured.extend(step()), level)
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    if level in ("L0", "mix"):  # computed, and computed again in the backward
        assert {"Module.0.0.Linear.forward.0", "Module.0.0.Linear.forward.1"} <= set(dump.data)
        first, again = (dump.data[f"Module.0.0.Linear.forward.{call}"]["output"][0]["Norm"] for call in (0, 1))
        assert first == again
        assert "Module.0.0.Linear.parameters_grad.0" in dump.data


def test_aten_names_at_L2(capture: Capture) -> None:
    model = nn.Linear(3, 3)

    def program() -> None:
        y = model(torch.ones(2, 3))
        y.mul_(2).sum().backward()

    step = capture(model, program, "L2")
    names = list(step.data)
    assert all(name.startswith("Aten.") and name.endswith(".forward") for name in names)
    assert {"Aten.addmm.0.forward", "Aten.mul.0.forward", "Aten.sum.0.forward", "Aten.mm.0.forward"} <= set(names)
    assert step.construct == {}
    assert step.data["Aten.addmm.0.forward"]["site"] == {"module": "", "number": 0}


@pytest.mark.parametrize("level", LEVELS)
def test_another_thread_runs_undisturbed(capture: Capture, level: str) -> None:
    """Its operators are not seen; its modules are, where they are hooked. Nothing of it breaks our own entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    other = Apply(lambda x: x.cos())
    x = torch.randn(1024, 64)  # large enough for taps of several threads to overlap
    expected, results = model(x), []

    def elsewhere() -> None:
        for _ in range(20):
            results.append(model(x))
            other(x)

    def program() -> None:
        threads = [threading.Thread(target=elsewhere) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            results.append(model(x))
        for thread in threads:
            thread.join()

    step = capture(model, program, level)
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)
    assert not any(".cos." in name for name in step.data)
    if level in ("L1", "mix"):
        assert sum(name.startswith("Functional.linear") and name.endswith("forward") for name in step.data) == 20
    assert step.manifest is not None
    assert step.manifest["holes"] == []
    calls = collections.Counter(name.rsplit(".", 1)[0] for name in modules(step))
    if level in ("L0", "mix"):
        assert calls["Module.0.Linear.forward"] == calls["Module.Sequential.forward"] == 80
    with SeesFunctions() as mode:
        x.cos()
    assert mode.seen == 1  # functions of this thread still ask modes


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def no_mode_is_left() -> bool:
    from torch.overrides import _get_current_function_mode
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_function_mode() is None and _get_current_dispatch_mode() is None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [SeesFunctions, SeesOperators])
def test_modes_of_the_program(tmp_path: Any, level: str, kind: Any) -> None:
    """The program's own mode, pushed above ours: stop() inside it, and its end after that."""
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": level, "risk_level": "ALL"})
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.ones(1, 2)
    for _ in range(2):
        debugger.start(model)
        with kind() as mode:
            model(x)
            inside = mode.seen
            assert inside > 0
            debugger.stop()
            model(x)
            assert mode.seen == 2 * inside
        model(x)
        debugger.step()
    debugger.start(model)
    debugger.stop()
    assert no_mode_is_left()
    debugger.step()
    debugger.flush()
    first, second = (read(folder) for folder in steps(tmp_path)[:2])
    assert list(first.data) == list(second.data)
    assert len(first.data) >= 2
    names = collections.Counter(name.split(".")[1] for name in first.data if not name.startswith("Module"))
    assert max(names.values(), default=1) == 1


def test_gradients_are_those_of_autograd(capture: Capture) -> None:
    """Against autograd in float64: of outputs, of inputs (also where the input is used outside too), of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual())
    x = torch.randn(5, 6, requires_grad=True)
    step = capture(model, lambda: model(x).square().sum().backward(), "mix")

    twin = nn.Sequential(Residual(), Residual()).double()
    twin.load_state_dict(model.state_dict())
    wide = x.detach().double().requires_grad_()
    kept: dict[str, Tensor] = {}

    def block(index: int, x: Tensor) -> Tensor:
        """A Residual with every intermediate kept. Where a value is used twice, each use is a tensor of its own, so
        that its gradient is the share of that use alone."""
        layer: Any = twin[index]

        def use(name: str, value: Tensor) -> Tensor:
            kept[f"{index}.{name}"] = alias = value * 1
            alias.retain_grad()
            return alias

        for_norm, outer, factor = use("norm_in", x), use("outer", x), use("factor", x)
        normed = use("norm_out", layer.norm(for_norm))
        first = use("fc_out", layer.fc(normed))
        tanh = use("tanh_out", torch.tanh(first))
        second = use("fc_out_again", layer.fc(tanh))
        return use("out", outer + second * factor)

    block(1, block(0, wide)).square().sum().backward()

    def grad(name: str) -> float:
        found = kept[name].grad
        assert found is not None
        return found.norm().item()

    def total(index: int) -> float:
        parts = [kept[f"{index}.{name}"].grad for name in ("norm_in", "outer", "factor")]
        return sum(part for part in parts if part is not None).norm().item()  # type: ignore[union-attr]

    given, gives = norms(step, "input."), norms(step, "output.")
    expected = {}
    for index in (0, 1):
        expected |= {
            f"Module.{index}.Residual.backward.0": (grad(f"{index}.out"), total(index)),
            f"Module.{index}.norm.LayerNorm.backward.0": (grad(f"{index}.norm_out"), grad(f"{index}.norm_in")),
            f"Module.{index}.fc.Linear.backward.0": (grad(f"{index}.fc_out"), grad(f"{index}.norm_out")),
            f"Module.{index}.fc.Linear.backward.1": (grad(f"{index}.fc_out_again"), grad(f"{index}.tanh_out")),
            f"Torch.tanh.{index}.backward": (grad(f"{index}.tanh_out"), grad(f"{index}.fc_out")),
        }
    assert wide.grad is not None
    expected["Module.Sequential.backward.0"] = (grad("1.out"), wide.grad.norm().item())
    for entry, (out, into) in expected.items():
        assert (given[entry], gives[entry]) == pytest.approx((out, into), rel=1e-5), entry

    parameters = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for index, (layer, cls) in itertools.product((0, 1), [("norm", "LayerNorm"), ("fc", "Linear")]):
        entry = step.data[f"Module.{index}.{layer}.{cls}.parameters_grad.0"]
        for name in ("weight", "bias"):
            exact = parameters[f"{index}.{layer}.{name}"]
            assert exact is not None
            assert entry[name][0]["Norm"] == pytest.approx(exact.norm().item(), rel=1e-5)
    assert step.construct["Torch.tanh.0.backward"] == "Module.0.Residual.backward.0"
    assert list(step.data["Module.0.Residual.backward.0"]) == ["input", "output", "site"]


class Unreadable(Tensor):
    """Computes like a Tensor, and raises when its data is asked for."""

    @staticmethod
    def wrap(data: Tensor) -> Unreadable:
        return data.as_subclass(Unreadable)

    def data_ptr(self) -> int:
        raise RuntimeError("no data for you")

    @property
    def shape(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no shape either")

    @property
    def is_sparse(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nor this")

    @property
    def nbytes(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nor the size")


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_a_tap_that_fails_costs_an_entry_and_nothing_else(
    capture: Capture, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(Apply(lambda x: torch.exp(x).as_subclass(Tensor)), nn.ReLU())
    x = torch.arange(3.0)
    result = []
    step = capture(model, lambda: result.append(model(Unreadable.wrap(x.clone()))), level)
    assert torch.equal(result[0], torch.relu(torch.exp(x)))
    assert step.manifest is not None
    holes = {hole["site"]: hole["reason"] for hole in step.manifest["holes"]}
    assert any("RuntimeError: no" in reason for reason in holes.values()), holes
    assert any(
        record.levelno == logging.ERROR and "the model goes on" in record.getMessage() for record in caplog.records
    )
    if level in ("L0", "mix"):  # what comes after stands where it belongs
        assert step.construct["Module.1.ReLU.forward.0"] == "Module.Sequential.forward.0"
        assert step.data["Module.1.ReLU.forward.0"]["site"]["module"] == "1"
    if level == "mix":
        assert step.construct["Functional.relu.0.forward"] == "Module.1.ReLU.forward.0"


def test_sparse_tensors_are_refused_with_a_reason(capture: Capture) -> None:
    model = Apply(lambda x: torch.sparse.mm(x, torch.eye(2)))
    step = capture(model, lambda: model(torch.eye(2).to_sparse()), "L0")
    record = step.data["Module.Apply.forward.0"]["input_args"][0]
    assert (record["type"], record["Max"]) == ("torch.Tensor", None)
    assert "sparse" in record["reason"]
    assert step.data["Module.Apply.forward.0"]["output"][0]["Max"] == 1


def test_modules_that_did_not_run_are_holes(capture: Capture) -> None:
    model = Residual()
    model.unused = nn.Linear(1, 1)
    step = capture(model, lambda: model(torch.ones(1, 6)), "L0")
    assert step.manifest is not None
    assert step.manifest["sites"] == {"expected": 4, "captured": 3}
    assert step.manifest["holes"] == [
        {"site": "Module.unused.Linear", "reason": "its forward did not run in this step"}
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_the_model_is_left_as_it_was_found(tmp_path: Any, level: str) -> None:
    model = Model()
    before = [dict(module.__dict__) for module in model.modules()]
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": level, "step": [0]})
    debugger.start(model)
    model(torch.randn(2, 6)).sum().backward()
    debugger.stop()
    debugger.step()
    debugger.start(model)  # step 1 is not wanted: every hook goes
    assert no_mode_is_left()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__ == attributes
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())  # type: ignore[attr-defined]
    debugger.flush()
