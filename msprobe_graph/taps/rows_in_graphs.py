"""What rows that graphs write can do, whichever device's graphs these are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from .arrival import Arrival, Slot


class RowsInGraphs(Protocol):
    """`graph_rows.GraphRows`, with kernels for CUDA, or `plain_graph_rows.PlainGraphRows`: they say what each does."""

    device: torch.device

    def takes(self, value: object) -> bool: ...

    def prepare(self, values: Iterable[torch.Tensor]) -> None: ...

    def measure(self, values: Iterable[tuple[Sequence[Slot], torch.Tensor]], padded: int | None) -> list[Slot]: ...

    def switch(self, on: bool, begin: int = 0, end: int = -1) -> None: ...

    def arrive(self) -> Arrival | None: ...
