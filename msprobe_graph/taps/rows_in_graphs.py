"""What rows that graphs write can do, whichever device's graphs these are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeGuard

import torch

from .arrival import Arrival, Slot


class RowsInGraphs(Protocol):
    """The rows of one device's graphs: `graph_rows.GraphRows`, with kernels for CUDA, or
    `plain_graph_rows.PlainGraphRows`."""

    device: torch.device

    def takes(self, value: object) -> TypeGuard[torch.Tensor]:
        """Whether a graph can measure this."""

    def prepare(self, values: Iterable[torch.Tensor]) -> None:
        """Have ready what `measure` needs for values like these, so that nothing need be compiled during a capture."""

    def measure(
        self,
        values: Iterable[tuple[Sequence[Slot], torch.Tensor]],
        padded: int | None,
        copied: Collection[int] = (),
        standing: bool = False,
    ) -> list[Slot]:
        """Have the graph that is being captured measure tensors that it `takes`, each into one of the slots given with
        it or, where they have no room, a new one.

        padded: rows of the batch, padding included, if there is one. copied: which of the values, by position, are
        copied too, as far as there is room for copies. standing: as long as they are referred to nothing overwrites
        them before the next call of `join`, so they may be measured as late as then. Raises MemoryError when there is
        no room left for slots.
        """

    def keep(self, values: Mapping[int, object]) -> dict[int, torch.Tensor]:
        """Have the graph that is being captured copy those of the values, by id, that are better measured when they are
        `standing`, as the copies are."""

    def join(self) -> None:
        """Have the graph that is being captured measure what it has not yet. No capture may end without this."""

    def switch(self, on: bool, begin: int = 0, end: int = -1) -> None:
        """From here on, in the current stream's order, values are measured or not, of a batch the rows from `begin` up
        to but without `end` (-1: all). Which rows, is not forgotten when it is switched off: `arrive` asks for it. To
        say again what holds costs nothing."""

    def arrive(self, copied: Collection[Slot] = ()) -> Arrival | None:
        """Have the slots brought to the host as they are at this point of the current stream, and the copies that were
        made of the values of some. From here on they count anew. None where there are none."""
