"""What writes into the memory of a tensor of dynamo's graph, after a certain node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from msprobe_graph.graph.writes import Writes


@torch.library.custom_op("msprobe_graph_test::fill", mutates_args=("out",))
def fill(out: torch.Tensor) -> None:
    out.fill_(1)


@torch.library.custom_op("msprobe_graph_test::fill_all", mutates_args=("outs",))
def fill_all(outs: list[torch.Tensor]) -> None:
    for out in outs:
        out.fill_(2)


def read(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out + x


def write_a_part(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out[0] = x[0]
    return out + x


def write_a_view(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.view(-1).add_(1)
    return out + x


def write_by_an_operator(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    fill(out)
    return out + x


def write_in_a_list(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    fill_all([x.clone(), out])
    return out + x


@pytest.mark.parametrize(
    ("after", "stands"),
    [
        (read, True),
        (write_a_part, False),
        (write_a_view, False),
        (write_by_an_operator, False),
        (write_in_a_list, False),
    ],
)
def test_what_an_operator_has_written_stands(after: Callable[..., torch.Tensor], stands: bool) -> None:
    found: list[bool] = []

    def backend(module: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        nodes = list(module.graph.nodes)
        made, filled = (node for node in nodes[:3] if node.op == "call_function")
        found.append(Writes(nodes).stands(made, since=filled))
        return module

    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        fill(out)
        return after(x, out)

    x = torch.randn(3, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(program, backend=backend, fullgraph=True)(x), program(x))
    assert found == [stands]
