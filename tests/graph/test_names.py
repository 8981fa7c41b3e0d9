"""The entries of a compiled run are those of the eager run: names, order, arguments, statistics."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msprobe_graph.dump.reader import StepDump
from msprobe_graph.graph.beside import NOT_TAKEN
from msprobe_graph.graph.naming import UNUSED as UNUSED_OUTPUT
from msprobe_graph.graph.naming import WRITTEN

from ..capturing import Apply, Capture, holes, modules
from .conftest import Both, Net, differences

Pair = collections.namedtuple("Pair", "left right")


def ones(*shape: int) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)


def in_place(x: Tensor) -> Tensor:
    x = x * 2
    x.add_(1)
    x += 3
    x.mul_(x)
    return F.relu(x, inplace=True)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "operators": lambda x: (x + x) * 2 - x / 3,
    "reflected operators": lambda x: 1 - x + 2 * x / (1 + x) ** 2,
    "power of a number": lambda x: 2**x,
    "matmul and T": lambda x: x @ x.T,
    "negation and abs": lambda x: abs(-x),
    "floor and remainder": lambda x: x // 2 + x % 2,
    "comparisons": lambda x: ((x > 1) & (x <= 5)) | ~(x == 3) ^ (x != 2),
    "shift": lambda x: x.to(torch.int64) << 1,
    "getitem": lambda x: x[0] + x[1:, None, ..., ::2].sum() + x[:, [0, 1]].sum(),
    "mask": lambda x: torch.where(x > 2, x, 0.0),
    "split": lambda x: [part * 2 for part in x.split(2, dim=1)],
    "unbind": lambda x: [row + 1 for row in x.unbind(0)],
    "chunk": lambda x: operator.sub(*torch.chunk(x, 2, dim=-1)),
    "topk": lambda x: operator.mul(*x.topk(2)),
    "max over a dimension": lambda x: operator.add(*x.max(dim=1)),
    "keywords": lambda x: torch.add(input=x, other=x, alpha=2),
    "a number before a tensor": lambda x: torch.where(x > 1, 2.0, x),
    "softmax with dtype": lambda x: F.softmax(x, dim=-1, dtype=torch.float64),
    "cat of a list": lambda x: torch.cat([x, x * 2], dim=1),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "types": lambda x: x.to(torch.bfloat16).float().type_as(x),
    "views": lambda x: x.view(-1).reshape(2, -1).transpose(0, 1).contiguous().unsqueeze(0).expand(2, -1, -1),
    "factories": lambda x: x + torch.ones(4) + torch.zeros_like(x) + torch.full((4,), 2.0),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "in place": in_place,
    "out of nothing": lambda x: torch.arange(4) + 1,
    "not a number": lambda x: torch.log(-x) * 0,
    "nothing at all": lambda x: x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_entries_of_eager(both: Both, name: str) -> None:
    model = Apply(FUNCTIONS[name])
    eager, compiled = both(model, lambda run: run(ones(3, 4)))
    assert differences(eager, compiled) == []
    assert "Module.Apply.forward.0" in compiled.data


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_a_network_has_the_entries_of_eager(both: Both, level: str) -> None:
    eager, compiled = both(Net().eval(), lambda run: run(ones(2, 4, 8)), level=level)
    assert differences(eager, compiled) == []
    assert len(modules(compiled)) == (0 if level == "L1" else 10)
    assert ("Functional.linear.4.forward" in compiled.data) == (level != "L0")


class Arguments(nn.Module):
    """Everything that a module may be given and may return."""

    def __init__(self) -> None:
        super().__init__()
        self.none = Apply(lambda x: None)
        self.nest = Apply(lambda x, y: {"a": x + 1, "b": [y, (x, 2)], "c": None})
        self.pair = Apply(lambda pair, flag: Pair(pair.left * 2, pair.right))
        self.plain = Apply(lambda n, x, *rest, mask, **options: x * n + mask)
        self.several = Apply(lambda x: (x, None, 3, x + 1))
        self.list = Apply(lambda xs: [x + 1 for x in xs])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        self.none(x)
        nest = self.nest(x, y=x * 2)
        pair = self.pair(Pair(x, nest["a"]), flag=True)
        plain = self.plain(2, x, None, "text", torch.float16, slice(0, 2), x.shape, mask=mask, device=x.device)
        assert mask is not None
        return self.several(pair.left + plain), self.list([x, nest["b"][0]])


def test_arguments_and_outputs_of_modules(both: Both) -> None:
    eager, compiled = both(Arguments(), lambda run: run(ones(2, 3), mask=ones(2, 3)))
    assert differences(eager, compiled) == []
    (given,) = [compiled.data["Module.plain.Apply.forward.0"]]
    assert given["input_args"][0] == {"type": "int", "value": 2}
    assert given["input_args"][1]["type"] == "torch.Tensor"
    assert compiled.data["Module.none.Apply.forward.0"]["output"] == [None]


class Twice(nn.Module):
    """A module used twice, one under two names, slices of a list, and a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.table = nn.ModuleDict({"act": nn.GELU()})
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x))
        for block in self.blocks[1:3]:
            x = block(x)
        for block in self.blocks[-1:]:
            x = block(x)
        return self.tied(self.table["act"](x)) * self.scale


def test_modules_used_twice_sliced_and_tied(both: Both) -> None:
    eager, compiled = both(Twice(), lambda run: run(ones(2, 4)))
    assert differences(eager, compiled) == []
    assert [name for name in modules(compiled) if "first" in name] == [
        "Module.first.Linear.forward.0",
        "Module.first.Linear.forward.1",
    ]
    assert "Module.blocks.2.Linear.forward.0" in compiled.data


class Beside(nn.Module):
    """Functions before, between and after modules, and a module inside one that is not called by forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def project(self, x: Tensor) -> Tensor:
        return self.fc(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.project(torch.sin(x))) @ self.fc.weight


GLOBAL = nn.GELU()


def test_modules_of_no_model_are_functions_alone(both: Both) -> None:
    """Eager capture has no hooks on them: a module in a global variable, and one that a function has enclosed."""
    enclosed = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), Apply(lambda x: GLOBAL(x) + 1), Apply(lambda x: enclosed(x)))
    eager, compiled = both(model.eval(), lambda run: run(ones(2, 8)))
    assert differences(eager, compiled) == []


def test_modules_that_a_method_of_another_module_calls(both: Both) -> None:
    """Behind a graph break the method is a frame of its own, and its self is not the module that is running."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def mapped(self, x: Tensor) -> Tensor:
            x = self.up(x)
            torch._dynamo.graph_break()
            return self.down(x)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.down = Experts(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.experts.mapped(x))

    eager, compiled = both(nn.Sequential(Layer(), Layer()).eval(), lambda run: run(torch.ones(2, 8)))
    assert differences(eager, compiled) == []


def test_functions_beside_modules(both: Both) -> None:
    model = nn.Sequential(Beside(), nn.ReLU(), Beside())
    eager, compiled = both(model, lambda run: run(ones(2, 4)))
    assert differences(eager, compiled) == []
    assert compiled.construct["Torch.sin.1.forward"] == "Module.2.Beside.forward.0"
    assert compiled.construct["Functional.linear.1.forward"] == "Module.2.fc.Linear.forward.0"


def test_calls_are_numbered_on_within_a_step(both: Both) -> None:
    def program(run: Any) -> None:
        run(ones(2, 4))
        run(ones(2, 4) * 2)

    eager, compiled = both(Beside(), program)
    assert differences(eager, compiled) == []
    assert "Module.Beside.forward.1" in compiled.data


def test_parameters_stack_and_requires_grad_are_there(both: Both) -> None:
    """Of msProbe's graph mode all of these are missing."""
    eager, compiled = both(Beside(), lambda run: run(ones(2, 4)))
    entry = compiled.data["Module.fc.Linear.forward.0"]
    assert list(entry["parameters"]) == ["weight", "bias"]
    assert entry["output"][0]["requires_grad"] is True
    assert compiled.data["Torch.sin.0.forward"]["output"][0]["requires_grad"] is False

    def innermost(step: StepDump) -> dict[str, str]:
        frames = {name: frames[0] for names, frames in step.stack.values() for name in names}
        # Of frames in torch's own modules dynamo keeps none, and of module calls none at all.
        return {name: frame for name, frame in frames.items() if "Module" not in name and "linear" not in name}

    assert innermost(compiled) == innermost(eager)
    assert "in project" in innermost(compiled)["Tensor.add.0.forward"]


def test_a_model_given_as_a_list_has_prefixes(capture: Capture) -> None:
    parts = [Beside(), Beside()]
    compiled = [torch.compile(part, backend="msprobe", options={"inner": "eager"}) for part in parts]

    def program(run: list[Any]) -> None:
        run[1](run[0](ones(2, 4)))

    eager = capture(parts, lambda: program(parts))
    found = capture(compiled, lambda: program(compiled))
    assert differences(eager, found) == []
    assert "Module.1.fc.Linear.forward.0" in found.data


UNUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "split": (lambda x: x.split([1, 3], dim=1)[1] * 2, "Tensor.split.0.forward.output.0"),
    "chunk": (lambda x: torch.chunk(x, 2, dim=-1)[0] + 1, "Torch.chunk.0.forward.output.1"),
    "topk": (lambda x: x.topk(2)[0], "Tensor.topk.0.forward.output.1"),
    "sort by name": (lambda x: torch.sort(x, descending=True).indices, "Torch.sort.0.forward.output.0"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_an_output_that_nothing_uses_is_a_hole(both: Both, name: str) -> None:
    """Dynamo's graph has no node for it. It is not None, and it is not another output's value."""
    function, site = UNUSED[name]
    eager, compiled = both(Apply(function), lambda run: run(ones(3, 4)))
    assert {line.partition(": ")[0].rpartition(".output.")[0] for line in differences(eager, compiled)} <= {
        site.rpartition(".output.")[0]
    }
    entry, at = site.rpartition(".output.")[::2]
    record = compiled.data[entry]["output"][int(at)]
    assert (record["type"], record["Max"]) == ("torch.Tensor", None)
    assert record["reason"] == holes(compiled)[site] == UNUSED_OUTPUT


class Unused(nn.Module):
    """Calls a module with arguments that it doesn't use."""

    def __init__(self, *arguments: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc = Apply(lambda x, *unused: x * 2)
        self.own = ones(4, 2)
        self._arguments = arguments

    def forward(self, x: Tensor, mask: Tensor, *more: Tensor, **named: Any) -> Tensor:
        variables = {"self": self, "mask": mask, "more": more, "named": named}
        out: Tensor = self.fc(x, *(argument(variables) for argument in self._arguments))
        return out


def test_an_argument_that_nothing_uses_is_read_from_the_frame(both: Both) -> None:
    model = Unused(
        lambda frame: frame["mask"],
        lambda frame: frame["more"][1],
        lambda frame: frame["named"]["masks"][0],
        lambda frame: frame["self"].own,
        lambda frame: frame["mask"],
    )

    def program(run: Any) -> None:
        for factor in range(3):  # the first is described, the others are like it
            x = ones(2, 3) * factor
            run(x, x[0] + 1, x, x[:, 1] + 2, masks=[x[1] + 3])

    eager, compiled = both(model, program)
    assert differences(eager, compiled) == []
    assert compiled.data["Module.fc.Apply.forward.2"]["input_args"][3]["Max"] == 15.0


def test_an_argument_that_nothing_uses_gets_no_gradient(both: Both) -> None:
    model = Unused(lambda frame: frame["mask"])

    def program(run: Any) -> None:
        x, mask = ones(2, 3).requires_grad_(), ones(2).requires_grad_()
        run(x, mask).sum().backward()

    eager, compiled = both(model, program, {"inner": "aot_eager"}, level="L0")
    assert differences(eager, compiled) == []


def test_an_argument_that_nothing_uses_behind_a_graph_break(both: Both) -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    model = Unused(lambda frame: broken(frame["mask"]), lambda frame: frame["mask"])
    eager, compiled = both(model, lambda run: run(ones(2, 3), ones(2)))
    assert differences(eager, compiled) == []


def test_an_argument_that_only_nothing_uses_is_a_hole(both: Both) -> None:
    model = Unused(lambda frame: frame["mask"][0])
    _, compiled = both(model, lambda run: run(ones(2, 3), ones(2)))
    record = compiled.data["Module.fc.Apply.forward.0"]["input_args"][1]
    assert (record["type"], record["dtype"], record["Max"]) == ("torch.Tensor", "torch.float32", None)
    assert holes(compiled)["Module.fc.Apply.forward.0.input.1"] == NOT_TAKEN


def test_after_a_write_into_a_part_a_value_is_right_or_a_hole(both: Both) -> None:
    def program(x: Tensor) -> Tensor:
        x = x * 2
        x[:, 0] = 0.5
        y = x + 1
        x[1:] *= 2
        return x - y

    eager, compiled = both(Apply(program), lambda run: run(ones(3, 4)))
    assert list(compiled.data) == list(eager.data)
    missing = {site for site, reason in holes(compiled).items() if reason == WRITTEN}
    assert "Tensor.add.0.forward.input.0" in missing
    for one, other in zip(eager.tensors(), compiled.tensors(), strict=True):
        assert other.record["Max"] is None or other.record == one.record, other
    assert compiled.data["Tensor.mul.0.forward"]["output"] == eager.data["Tensor.mul.0.forward"]["output"]


def test_a_returned_tensor_is_not_taken_for_what_it_was_before(both: Both) -> None:
    def program(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y

    eager, compiled = both(Apply(program), lambda run: run(ones(3, 4)))
    assert differences(eager, compiled) == []
    assert compiled.data["Tensor.mul.0.forward"]["output"][0]["Max"] == 24


def test_a_compiled_function_has_entries_too(capture: Capture) -> None:
    x = ones(3)

    def function(x: Tensor) -> Tensor:
        return F.gelu(x) * 2

    compiled = torch.compile(function, backend="msprobe", options={"inner": "eager"})
    model = nn.Linear(1, 1)
    eager = capture(model, lambda: function(x), level="L1")
    found = capture(model, lambda: compiled(x), level="L1")
    assert differences(eager, found) == []
    assert list(found.data) == ["Functional.gelu.0.forward", "Tensor.mul.0.forward"]


class Calls(nn.Module):
    """Its forward calls a compiled function with a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.function: Callable[[nn.Module, Tensor], Tensor] = through

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, torch.sin(x))


def through(module: nn.Module, x: Tensor) -> Tensor:
    return module(x) + 1


def test_a_compiled_function_that_is_given_a_module(capture: Capture) -> None:
    model, x = nn.Sequential(Calls(), Calls()), ones(2, 4)
    eager = capture(model, lambda: model(x))
    compiled = torch.compile(through, backend="msprobe", options={"inner": "eager"})
    for part in model:
        part.function = compiled
    found = capture(model, lambda: model(x), level="L0")
    assert list(found.data) == [name for name in eager.data if name.startswith("Module")]
    assert {name: found.data[name] for name in modules(found)} == {name: eager.data[name] for name in modules(eager)}


@pytest.mark.parametrize("wrapped", [nn.Sequential, lambda part: nn.Sequential(torch.compile(part, backend="eager"))])
def test_wrappers_of_torch_compile_are_in_no_name(both: Both, wrapped: Callable[[nn.Module], nn.Module]) -> None:
    _, compiled = both(wrapped(Beside()), lambda run: run(ones(2, 4)), level="L0")
    assert modules(compiled) == [
        "Module.0.fc.Linear.forward.0",
        "Module.0.Beside.forward.0",
        "Module.Sequential.forward.0",
    ]
