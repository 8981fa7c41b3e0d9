"""The gradients of what `PrecisionDebugger.save` is given: they come when a backward pass does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Record = Callable[[torch.Tensor, str], Any]
"""What is to stand for a gradient in debug.json; `str` is the start of its file's name."""


def await_gradients(value: Any, into: Any, at: Any, stem: str, record: Record) -> bool:
    """Put at ``into[at]`` what `value` is made of with None for every tensor, until its gradient is there. Returns
    whether one may come.

    Of ``[x, {"y": y}]`` that is ``[None, {"y": None}]`` and, when a backward pass has come to x, ``[{"type":
    "torch.Tensor", ...}, {"y": None}]``. A tensor that has no gradient stays None.
    """
    into[at] = None
    if isinstance(value, torch.Tensor):
        if not value.requires_grad:
            return False

        def arrived(gradient: torch.Tensor) -> None:
            into[at] = record(gradient, stem)

        value.register_hook(arrived)  # type: ignore[no-untyped-call]
        return True
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        into[at], items = {}, [(str(name), item) for name, item in value.items()]
    elif isinstance(value, (list, tuple)):
        into[at], items = [None] * len(value), enumerate(value)
    awaited = [await_gradients(item, into[at], key, f"{stem}.{key}", record) for key, item in items]
    return any(awaited)
