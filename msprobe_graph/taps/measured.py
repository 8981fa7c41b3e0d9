"""What is known of a tensor that was measured before, so that no value is read twice.

A weight is measured once per version, not once per call, and a large output of one call that is the input of the next
is measured once. A tensor counts as unchanged while it is the same Python object, its version counter stands still and
a probe of some of its elements (`fingerprint`) gives the same; the probe is there for writes that the version counter
does not see, through ``.data`` or by an operator that writes into its arguments without saying so. It looks at 3
elements, of a weight once a step: a write through ``.data`` to a few others goes unnoticed. Tensors of inference mode
have no version counter: they are measured every time.
"""

from __future__ import annotations

import weakref

import msgspec
import torch

from msprobe_graph.dump.records import TensorRecord
from msprobe_graph.dump.saved import Saved

from .native import fingerprint

WORTH_REMEMBERING = 32 * 1024
"""Bytes; to measure less than this again costs about as much as to look it up. Parameters are remembered whatever
their size."""


class Known(msgspec.Struct, gc=False):
    """One measured tensor, as it was when it was measured."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    address: int
    fingerprint: int | None
    probed: int
    """The step in which the fingerprint was last found to be the same."""
    record: TensorRecord | None = None
    saved: Saved | None = None
    """The values as the writer has them, from whichever step saved them first."""


class Measured:
    """The tensors measured so far that are still alive."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._step = 0

    def begin(self, step: int) -> None:
        """A new step: what is known of tensors long gone is forgotten, and each weight is probed again."""
        self._step = step
        self._known = {key: known for key, known in self._known.items() if known.tensor() is not None}

    def lookup(self, tensor: torch.Tensor) -> Known | None:
        """What is known of `tensor` as it is now, without a record when it is new or has changed.

        None when it isn't remembered: too small to be worth it, or without a version counter.
        """
        weight = type(tensor) is torch.nn.Parameter
        if not weight and tensor.numel() * tensor.itemsize < WORTH_REMEMBERING:
            return None
        if tensor.is_inference():
            return None
        known = self._known.get(id(tensor))
        version = tensor._version
        if known is not None and known.version == version and known.tensor() is tensor:
            if weight and known.probed == self._step and known.address == tensor.data_ptr():
                return known
            if known.fingerprint == fingerprint(tensor):
                known.probed = self._step
                return known
        address = tensor.data_ptr() if weight else 0
        known = self._known[id(tensor)] = Known(weakref.ref(tensor), version, address, fingerprint(tensor), self._step)
        return known
