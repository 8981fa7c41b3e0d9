"""What is known of a tensor that was measured before, so that no value is read twice.

A weight is measured once per version, not once per call, and a large output of one call that is the input of the next
is measured once. A tensor counts as unchanged while it is the same Python object, its version counter stands still and
a probe of some of its elements (`fingerprint`) gives the same; the probe is there for writes that the version counter
does not see, through ``.data`` or by an operator that writes into its arguments without saying so. It looks at 3
elements, of all weights once a step, when the step meets the first of them: a write through ``.data`` to a few other
elements goes unnoticed, and one after that moment is seen in the next step. Tensors of inference mode have no version
counter: they are measured every time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import msgspec
import torch

from msprobe_graph.dump.records import TensorRecord
from msprobe_graph.dump.saved import Saved

from .likeness import Probes, extension, is_weight
from .native import fingerprint

WORTH_REMEMBERING = 128 * 1024
"""Bytes; to measure less than this again costs about as much as to look it up and to probe it. Weights are remembered
whatever their size."""


class Known(msgspec.Struct, gc=False):
    """One measured tensor, as it was when it was measured."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    form: tuple[torch.dtype, torch.Size]
    """Assigned to ``.data``, a weight may take another."""
    address: int
    """Of a weight's values; 0 of other tensors."""
    fingerprint: int | None
    record: TensorRecord | None = None
    saved: Saved | None = None
    """The values as the writer has them, from whichever step saved them first."""


class Measured:
    """The tensors measured so far that are still alive."""

    def __init__(self, across_steps: bool, outdated: Callable[[], None]) -> None:
        """across_steps: False where only weights are known from one step to the next, because the records of other
        values are filled in anew. `outdated` is called when records of weights are not to be used any more."""
        self._across_steps = across_steps
        self._outdated = outdated
        self._weights: dict[int, Known] = {}
        self._others: dict[int, Known] = {}
        self._probed = False
        """Whether the weights have been probed in this step."""
        self._probes: Probes | None = None
        """Of all weights, if they are still the same."""

    def begin(self) -> None:
        """A new step: what is known of tensors long gone is forgotten, and of those that can't be probed, because the
        replay of a CUDA graph writes into the same tensors again. The weights are to be probed again."""
        self._others = {
            key: known
            for key, known in self._others.items()
            if self._across_steps and known.fingerprint is not None and known.tensor() is not None
        }
        self._probed = False

    def lookup(self, tensor: torch.Tensor) -> Known | None:
        """What is known of `tensor` as it is now, without a record when it is new or has changed.

        None when it isn't remembered: too small to be worth it, or without a version counter.
        """
        if is_weight(tensor):
            known = self.weight(tensor)
            if known is None:
                known = _remember(tensor, tensor.data_ptr(), self._weights)
                self._probes = None
            return known
        if tensor.numel() * tensor.itemsize < WORTH_REMEMBERING:
            return None
        known = self._others.get(id(tensor))
        if (
            known is not None
            and known.tensor() is tensor
            and known.version == tensor._version
            and known.fingerprint == fingerprint(tensor)
        ):
            return known
        return _remember(tensor, 0, self._others)

    def weight(self, tensor: torch.Tensor) -> Known | None:
        """What is known of a weight that has not changed; None otherwise, and for what is no weight."""
        if not self._probed:
            self._probe()
        known = self._weights.get(id(tensor))
        if known is None or known.tensor() is not tensor or known.version != tensor._version:
            return None
        if known.form != (tensor.dtype, tensor.shape):
            return None
        if known.address != tensor.data_ptr():
            if known.fingerprint != fingerprint(tensor):
                return None
            known.address = tensor.data_ptr()
            self._probes = None
        return known

    def probes(self) -> Probes | None:
        """What tells whether one of the weights was written to since; None without the compiled code for it."""
        compiled = extension()
        if self._probes is None and compiled is not None:
            each = ((known.tensor(), known) for known in self._weights.values())
            self._probes = compiled.Probes(
                [
                    (known.tensor, known.address, weight.numel(), weight.itemsize, known.fingerprint)
                    for weight, known in each
                    if weight is not None and known.fingerprint is not None
                ]
            )
        return self._probes

    def _probe(self) -> None:
        """Forget the weights that have changed. All in one go: a probe between two operators would find cold caches."""
        self._probed = True
        unchanged = {}
        changed = False
        for key, known in list(self._weights.items()):
            weight = known.tensor()
            if weight is not None and known.fingerprint == fingerprint(weight):
                unchanged[key] = known
            elif weight is not None:
                changed = True
        if len(unchanged) < len(self._weights):
            self._weights, self._probes = unchanged, None
        if changed:
            self._outdated()


def _remember(tensor: torch.Tensor, address: int, where: dict[int, Known]) -> Known | None:
    if tensor.is_inference():
        return None
    known = where[id(tensor)] = Known(
        weakref.ref(tensor), tensor._version, (tensor.dtype, tensor.shape), address, fingerprint(tensor)
    )
    return known
