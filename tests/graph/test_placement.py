"""Which values of a compiled program may be measured later than they are tapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.graph import exact
from msprobe_graph.graph.generated import UNCACHED
from msprobe_graph.graph.inductor_compat import Buffered

SAME = torch.zeros(4, 8)


@torch.library.custom_op("msprobe_graph_test::same", mutates_args=())
def same(x: torch.Tensor) -> torch.Tensor:
    """Twice `x`, each time in the same memory."""
    return SAME.copy_(x * 2)


@same.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("msprobe_graph_test::into", mutates_args=("out",))
def into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x + 1)


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return same(x)


class Into(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        into(x, out)
        return out


class Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.same = Same()
        self.into = Into()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.into(self.same(self.linear(self.same(self.linear(x))))).sin()


def test_memory_that_others_give_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Buffered] = []

    def standing(schedule: Any, values: Mapping[int, Buffered], places: Mapping[int, int]) -> dict[int, int]:
        seen.extend(values.values())
        return {}

    monkeypatch.setattr(exact, "standing", standing)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0", "risk_level": "ALL"})
    program = Program()
    x = torch.randn(4, 8)
    with torch.no_grad(), torch._inductor.config.patch(UNCACHED):
        compiled = torch.compile(program, backend=msprobe_backend)
        with debugger.start(compiled):
            y = compiled(x).clone()  # Inductor has put it into what `same` gave out
        torch.testing.assert_close(y, program(x))
    debugger.flush()
    in_order = sorted(seen, key=lambda value: value.begin)
    assert [value.foreign for value in in_order] == [False, True, False, True, False]
    _, first, _, second, _ = in_order
    assert first.end < second.begin  # which is when its memory has another value
