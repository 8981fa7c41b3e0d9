"""Tensors on their way to disk: values in memory, and the files that are to hold them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch


class Saved(msgspec.Struct, eq=False):
    """The values of one tensor, for one file or for several that are the same."""

    value: torch.Tensor | None
    """None once they are in a file, or were dropped."""
    size: int
    """Bytes."""
    wanted: int = 1
    """How many files were asked for and not dropped since."""
    path: Path | None = None
    """The file that holds them, once it is written."""


class File(msgspec.Struct, eq=False):
    """One file of a step."""

    step: int
    name: str
    saved: Saved
    queued: int = 0
    """Bytes that wait in the writer's queue because of this file."""
