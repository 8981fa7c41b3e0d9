"""The full pass: every value that it taps is right, and it may be asked for some values only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msprobe_graph.graph.full import FullPass, PinPass
from msprobe_graph.graph.stamps import Wanted

from .inserted import Block, Convolutional, Mixed, Run, assert_accounted, assert_right


class Scaled(nn.Module):
    """A function of the product of the input and a parameter."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x * self.scale)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_transformer(train: bool) -> None:
    torch.manual_seed(0)
    run = Run(nn.Sequential(Block(), Block()), [torch.randn(2, 16, 64)], "full", train)
    assert_right(run, train)
    assert_accounted(run)
    assert run.share() == 1


@pytest.mark.slow
def test_bf16_and_dynamic_shapes() -> None:
    torch.manual_seed(0)
    run = Run(Block().bfloat16(), [torch.randn(2, 16, 64).bfloat16()], "full", dynamic=True)
    assert_right(run, tolerance=5e-2)
    assert run.share() == 1


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_in_place_operations_views_and_several_outputs(train: bool) -> None:
    torch.manual_seed(0)
    run = Run(Mixed(), [torch.randint(0, 50, (2, 8))], "full", train)
    assert_right(run, train)
    assert_accounted(run)


@pytest.mark.slow
def test_convolutions() -> None:
    torch.manual_seed(0)
    run = Run(Convolutional().eval(), [torch.randn(2, 3, 16, 16)], "full")
    assert_right(run)
    assert_accounted(run)


def added_after_a_product(x: torch.Tensor) -> torch.Tensor:
    """Inductor makes one operator of both, and the transposed weight is as large as the product."""
    product = F.linear(x, x)
    return (product + x[0]).exp()


def times_ones(x: torch.Tensor) -> torch.Tensor:
    """Inductor drops the product, and what it multiplies gets the product's stamp."""
    normal = F.layer_norm(x, (8,), x[0], x[1])
    return (normal * torch.ones_like(normal)).exp()


def made_of_an_item(x: torch.Tensor) -> torch.Tensor:
    """Both results are made of items of one operator that gives the variance."""
    deviation, mean = torch.std_mean(x, -1)
    return deviation.exp() + mean


def not_copied_after_a_write(x: torch.Tensor) -> torch.Tensor:
    wave = x.sin()
    wave.add_(1.0)
    return wave.contiguous() * 3


def not_copied_after_a_write_to_what_it_views(x: torch.Tensor) -> torch.Tensor:
    wave = x.sin()
    view = wave.view(8, 8)
    wave.mul_(2)
    return view.contiguous() + 1


def equal_calls(x: torch.Tensor) -> torch.Tensor:
    """The compiler makes one of both where it computes gradients."""
    return F.layer_norm(x, (8,)).sin() * F.layer_norm(x, (8,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        added_after_a_product,
        times_ones,
        made_of_an_item,
        not_copied_after_a_write,
        not_copied_after_a_write_to_what_it_views,
        equal_calls,
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_what_looks_like_a_value_is_not_taken_for_it(
    function: Callable[[torch.Tensor], torch.Tensor], train: bool
) -> None:
    torch.manual_seed(0)
    run = Run(Scaled(function), [torch.randn(8, 8)], "full", train)
    assert_right(run, train)
    assert_accounted(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "train"), [(added_after_a_product, False), (times_ones, True)], ids=["product", "gradients"]
)
def test_exact_takes_it_for_nothing_else_either(function: Callable[[torch.Tensor], torch.Tensor], train: bool) -> None:
    torch.manual_seed(0)
    run = Run(Scaled(function), [torch.randn(8, 8)], "exact", train)
    assert_right(run, train)
    assert_accounted(run)


def test_what_changes_nothing_is_what_it_was_given() -> None:
    torch.manual_seed(0)

    def function(x: torch.Tensor) -> torch.Tensor:
        same = x.contiguous().to(torch.float32)
        wave = F.dropout(same.sin(), 0.5, False)
        heads = wave.view(8, 2, 4).transpose(0, 1).contiguous().transpose(0, 1).reshape(8, 8)
        return same * heads.clone()

    run = Run(Scaled(function), [torch.randn(8, 8)], "full")
    assert_right(run)
    assert run.share() == 1


def test_full_for_some_and_exact_for_the_rest() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = (x @ x).sin()
            return (hidden + 1).exp() @ x

    inputs = [torch.randn(8, 8) / 8]
    exact, mixed = Run(Model(), inputs, "exact"), Run(Model(), inputs, "exact", names=lambda name: name == "hidden")
    (hidden,) = [2 * at for at, node in enumerate(mixed.nodes) if node.name == "hidden"]
    assert hidden not in exact.received.values
    assert set(mixed.received.values) == {hidden, *exact.received.values}
    assert_right(mixed)


def test_user_s_first_passes_run_behind_ours() -> None:
    seen = []

    def theirs(graph: torch.fx.Graph) -> None:
        seen.append(graph.output_node().prev.meta["custom"])

    first = PinPass({0: Wanted(0, (1,), torch.float32)}, "one", chained=[theirs])
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.ones.default, ([1],))
    node.meta.update(custom={"msprobe_graph": 0}, val=torch.ones(1))
    graph.output((node,))
    first(graph)
    assert seen == [{"msprobe_graph": 0, "msprobe_graph_pins": ((0,), (0,))}]
    assert first.uuid() is None


def test_user_s_passes_run_first() -> None:
    seen = []
    tap = FullPass({0: Wanted(0, (1,), torch.float32)}, "one", chained=[lambda graph: seen.append(len(graph.nodes))])
    graph = torch.fx.Graph()
    graph.output(())
    tap(graph)
    assert seen == [1]
    assert tap.uuid() is None
