"""Captures a program eagerly and compiled, and compares the two dumps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

from msprobe_graph import msprobe_backend
from msprobe_graph.dump.reader import StepDump, steps

from ..capturing import Capture, read_strictly

EAGER = {"inner": "eager"}
"""Options under which a compiled model computes as an eager one does."""

Both: TypeAlias = Callable[..., tuple[StepDump, StepDump]]
"""both(model, program, options={"inner": "eager"}, level="mix", **settings): the step that `program(model)` dumps, and
the step that `program(torch.compile(model))` dumps."""
Dumped: TypeAlias = Callable[..., dict[int, StepDump]]
"""The steps below a folder of tmp_path, by number; there is one process."""


class Mlp(nn.Module):
    """A block with a keyword argument that returns a tuple."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, *, scale: float | None = None) -> tuple[torch.Tensor, None]:
        hidden = nn.functional.silu(self.up(self.norm(x)))
        return self.down(hidden) * scale, None


class Net(nn.Module):
    def __init__(self, layers: int = 2, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, scale=2.0)[0]
        return self.head(x)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Dynamo remembers nothing of another test, and random weights are the same each time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def both(capture: Capture) -> Both:
    def run(
        model: nn.Module, program: Callable[[Any], object], options: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[StepDump, StepDump]:
        eager = capture(model, lambda: program(model), **settings)
        compiled = torch.compile(model, backend=msprobe_backend, options=options or {"inner": "eager"})
        return eager, capture(compiled, lambda: program(compiled), **settings)

    return run


@pytest.fixture
def dumped(tmp_path: Path) -> Dumped:
    def read_all(folder: str = "dump") -> dict[int, StepDump]:
        found = list((tmp_path / folder).glob("step*"))
        return {int(path.parent.name[4:]): read_strictly(path) for path in steps(tmp_path / folder)} if found else {}

    return read_all


def differences(expected: StepDump, found: StepDump, tolerance: float = 0.0) -> list[str]:
    """Where two dumps differ: in their entries, the order of these, in anything in them, in construct.json. Statistics
    may differ by `tolerance`, relative to the norm. Values that are missing with a reason are differences."""
    names = list(expected.data)
    if names != list(found.data):
        lost, extra = (
            [each for each in names if each not in found.data],
            [each for each in found.data if each not in names],
        )
        return [f"lost {lost}", f"extra {extra}"] if lost or extra else [f"order {list(found.data)}"]
    told = [line for name in names for line in _unequal(expected.data[name], found.data[name], f"{name}", tolerance)]
    return told + list(_unequal(expected.construct, found.construct, "construct", 0.0))


def _unequal(expected: Any, found: Any, place: str, tolerance: float) -> Iterator[str]:
    if type(expected) is not type(found):
        yield f"{place}: {expected!r} is {found!r}"
    elif isinstance(expected, dict):
        if list(expected) != list(found):
            yield f"{place}: keys {list(expected)} are {list(found)}"
        for key in expected.keys() & found.keys():
            room = tolerance * abs(expected.get("Norm") or 0.0) if expected.get("type") == "torch.Tensor" else 0.0
            yield from _unequal(expected[key], found[key], f"{place}.{key}", room or tolerance)
    elif isinstance(expected, list):
        if len(expected) != len(found):
            yield f"{place}: {len(expected)} items are {len(found)}"
        for at, (one, other) in enumerate(zip(expected, found, strict=False)):
            yield from _unequal(one, other, f"{place}.{at}", tolerance)
    elif repr(expected) != repr(found) and not (isinstance(expected, float) and abs(expected - found) <= tolerance):
        yield f"{place}: {expected!r} is {found!r}"
