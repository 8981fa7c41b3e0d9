"""token_range: capture only some forwards of the model within one start and stop."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from msprobe_graph.eager.capture import EagerCapture


class TokenRange:
    """Counts the forwards of `model`, from 0, and captures those in `forwards`."""

    def __init__(self, model: nn.Module, capture: EagerCapture, forwards: range) -> None:
        self._capture = capture
        self._range = forwards
        self._forwards = 0
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._count, prepend=True)
        capture.stop()

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._forwards in self._range:
            self._capture.start()
        else:
            self._capture.stop()
        self._forwards += 1

    def remove(self) -> None:
        self._handle.remove()
