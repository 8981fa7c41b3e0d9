"""What is known of a tensor that was measured before, so that no value is read twice.

A weight is measured once per version, not once per call, and the output of one call that is the input of the next is
measured once. A tensor counts as unchanged while it is the same Python object, its version counter stands still and a probe
of some of its elements (`fingerprint`) gives the same; the probe is there for writes through ``.data``, which
the version counter does not see. Tensors of inference mode have no version counter: they are measured every time.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import msgspec
import torch

from .native import fingerprint
from .rows import KeptRow

WORTH_REMEMBERING = 16 * 1024
"""Bytes; measuring less than this costs no more than looking it up."""


class Known(msgspec.Struct):
    """One measured tensor, as it was when it was measured."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    fingerprint: int | None
    raw: KeptRow | None = None
    row: int | None = None
    """The row in the step that runs; None until it is needed there."""
    checksum: str | None = None
    file: Path | None = None
    """Where the values are saved, by whichever step saved them first."""


class Measured:
    """The tensors measured so far that are still alive."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def begin(self) -> None:
        """A new step: forget what has died; the rest keeps its values but has no row in the new step yet."""
        self._known = {key: known for key, known in self._known.items() if known.tensor() is not None}
        for known in self._known.values():
            known.row = None

    def lookup(self, tensor: torch.Tensor) -> Known | None:
        """What is known of `tensor` as it is now; an empty Known when it is new or has changed; None when it can't be
        remembered (too small to be worth it, or without a version counter)."""
        if tensor.nbytes < WORTH_REMEMBERING or tensor.is_inference():
            return None
        key = id(tensor)
        known = self._known.get(key)
        version = tensor._version
        probe = fingerprint(tensor)
        if known is None or known.tensor() is not tensor or known.version != version or known.fingerprint != probe:
            known = self._known[key] = Known(weakref.ref(tensor), version, probe)
        return known
