"""Rows that a graph writes each time it is replayed, by plain torch operators: for Ascend's ACL graphs, and for CUDA's
where there is no Triton. What `graph_rows` does with kernels of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeGuard

import torch

from . import native, portable
from .arrival import WORDS, Arrival, Landing, Shape, Slot
from .device import Accelerator
from .graph_copies import GraphCopies

SLOTS = 1 << 14
"""So many values, of 80 bytes."""
ROW, FIRED, TAG = slice(0, 8), 8, 9
"""What a slot's words are: see `arrival.SLOT`."""


class PlainGraphRows:
    """Does what `RowsInGraphs` says. To be made before the first graph is captured: its memory is no graph's.

    Everything is an operator on tensors of the device, whose addresses stay: what a replay does follows from what is in
    them then.
    """

    def __init__(self, device: Accelerator, copies: GraphCopies | None = None) -> None:
        """`copies`: None where nothing is to be copied."""
        self.device = device.device
        self._copies = copies
        self._device = device
        self._shapes: list[Shape] = []
        self._single: list[bool] = []
        """By slot: its moments are float32."""
        self._state = (0, 0, -1)
        """As `switch` was told."""
        with torch.inference_mode(False):  # or it could be written in that mode only
            self._words = torch.zeros((SLOTS, WORDS), dtype=torch.int64, device=self.device)
            self._control = torch.tensor(self._state, dtype=torch.int64).to(self.device)

    def takes(self, value: object) -> TypeGuard[torch.Tensor]:
        return (
            isinstance(value, torch.Tensor)
            and value.device == self.device
            and value.dtype in native.CODES
            and value.layout is torch.strided
            and value.numel() > 0
            and not value.is_neg()
        )

    def prepare(self, values: Iterable[torch.Tensor]) -> None:
        """Nothing has to be compiled."""

    @torch.no_grad()
    def measure(
        self,
        values: Iterable[tuple[Sequence[Slot], torch.Tensor]],
        padded: int | None,
        copied: Collection[int] = (),
        standing: bool = False,
    ) -> list[Slot]:
        taken: list[Slot] = []
        on, begin, end = self._control.unbind()
        for position, (slots, tensor) in enumerate(values):
            real = portable.precision(tensor)
            slot = slots[0] if slots else self._slot(real is torch.float32)
            taken.append(slot)
            shape = Shape.of(tensor, padded)
            if self._copies is not None and position in copied:
                shape = self._copies.placed(shape, slot, tensor)
                if shape.place is not None:
                    there = self._copies.memory(shape.place, tensor.nbytes)
                    now = tensor.contiguous().reshape(-1).view(torch.uint8)
                    there.copy_(torch.where(on != 0, now, there))
            counted = _rows(tensor, begin, end) if shape.batch else None
            words = self._words[slot.number]
            tag = torch.full_like(words[:1], len(self._shapes))
            self._shapes.append(shape)
            measured = torch.cat([portable.measure(tensor, real, counted), words[FIRED : FIRED + 1] + 1, tag])
            words.copy_(torch.where(on != 0, measured, words))
        return taken

    def keep(self, values: Mapping[int, object]) -> dict[int, torch.Tensor]:
        return {}  # a copy costs what to measure costs

    def join(self) -> None:
        pass  # it measures in the order of the program

    def switch(self, on: bool, begin: int = 0, end: int = -1) -> None:
        state = (1, begin, end) if on else (0, *self._state[1:])
        if state != self._state:
            self._state = state
            self._control.copy_(torch.tensor(state, dtype=torch.int64))

    def arrive(self, copied: Collection[Slot] = ()) -> Arrival | None:
        count = len(self._single)
        if not count:
            return None
        rows = self._state[1], self._state[2]
        copies = None if self._copies is None else self._copies.bring(copied, rows)
        with torch.inference_mode(False):
            host, wait = self._device.to_host(self._words[:count])
        self._words[:count, FIRED].zero_()
        return Arrival(_Widened(host, wait, self._single), self._shapes, rows, copies)

    def _slot(self, single: bool) -> Slot:
        number = len(self._single)
        if number == SLOTS:
            raise MemoryError(f"there are more than {SLOTS} values in graphs")
        self._single.append(single)
        return Slot(number, number, 1)


class _Widened(Landing):
    """Waits for rows to arrive and makes those of single precision what all rows are."""

    def __init__(self, host: torch.Tensor, wait: Callable[[], None], single: Sequence[bool]) -> None:
        self.address = host.data_ptr()
        self.count = len(host)
        self._host = host
        self._wait = wait
        self._which = [number for number, each in enumerate(single[: len(host)]) if each]

    native = None

    def synchronize(self) -> None:
        which, self._which = self._which, []
        self._wait()
        if which:
            self._host[which, ROW] = portable.widen(self._host[which, ROW])


def _rows(tensor: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Which elements of a batch count: those of its rows from `begin` up to but without `end`, if that is not -1."""
    row = torch.arange(tensor.shape[0], device=tensor.device)
    counts = (row >= begin) & ((row < end) | (end < 0))
    return counts.reshape(-1, *(1,) * (tensor.dim() - 1)).expand(tensor.shape)
