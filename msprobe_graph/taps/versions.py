"""Whether tensors were written to since, by their version counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .likeness import extension


class Versions(Protocol):
    """The counters of some tensors as they were."""

    def stand(self) -> bool:
        """Whether they still are. A few nanoseconds for each, where there is compiled code for it."""


class _ByPython:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._counted = self._count()

    def stand(self) -> bool:
        return self._counted == self._count()

    def _count(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]


def versions(tensors: Sequence[torch.Tensor]) -> Versions:
    """Those of `tensors`, which are kept. RuntimeError for tensors of inference mode, which have none."""
    compiled = extension()
    if compiled is None:
        return _ByPython(tensors)
    return compiled.Versions(torch.Tensor._version, list(tensors))
