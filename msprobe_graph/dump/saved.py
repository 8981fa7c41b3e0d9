"""Tensors on their way to disk: values in memory, and the files that are to hold them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import torch


class Saved(msgspec.Struct, eq=False):
    """The values of one tensor, for one file or for several that are the same."""

    value: torch.Tensor | None
    """None once they are in a file, or were dropped."""
    size: int
    """Bytes."""
    path: Path | None = None
    """The file that holds them, once it is written."""
    _wanted: int = 1
    """How many files were asked for and not dropped since."""
    _lock: threading.Lock = msgspec.field(default_factory=threading.Lock)

    def want(self) -> bool:
        """Ask for one file more. False when the values are there no longer, in memory or on disk."""
        with self._lock:
            if self.value is None and (self.path is None or not self.path.exists()):
                return False
            self._wanted += 1
            return True

    def unwant(self) -> int:
        """Drop a file that was asked for. Returns how many bytes of memory are free again."""
        with self._lock:
            self._wanted -= 1
            if self._wanted or self.value is None:
                return 0
            self.value = None
            return self.size


class File(msgspec.Struct, eq=False):
    """One file of a step."""

    step: int
    name: str
    saved: Saved
    queued: int = 0
    """Bytes that wait in the writer's queue because of this file."""


def same_files(step: int, names: Sequence[str], value: torch.Tensor) -> list[File]:
    """Files of one tensor, whose memory holds nothing else."""
    saved = Saved(value, value.nbytes, _wanted=len(names))
    return [File(step, name, saved) for name in names]


class Sink(Protocol):
    """Where the files of a step go."""

    def keep(self, step: int, names: Sequence[str], value: torch.Tensor) -> bool:
        """Take a tensor, whose memory holds nothing else, as files of a step that is about to be taken. False when it
        is not taken because max_bytes leaves no room."""
