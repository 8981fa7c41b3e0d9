"""The full pass: every value that it taps is right, and it may be asked for some values only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msprobe_graph.graph.full import FullPass
from msprobe_graph.graph.stamps import Wanted

from .inserted import Block, Convolutional, Mixed, Run, assert_accounted, assert_right


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


def test_user_s_passes_run_first() -> None:
    seen = []
    tap = FullPass({0: Wanted(0, (1,), torch.float32)}, "one", chained=[lambda graph: seen.append(len(graph.nodes))])
    graph = torch.fx.Graph()
    graph.output(())
    tap(graph)
    assert seen == [1]
    assert tap.uuid() is None
