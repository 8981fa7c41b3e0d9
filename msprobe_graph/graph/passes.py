"""Our three passes for Inductor, and the slots of its configuration that they go into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx

from .exact import ExactPass
from .full import FullPass, PinPass
from .handoff import Taps

PIN, FULL, EXACT = "joint_custom_pre_pass", "post_grad_custom_post_pass", "_post_fusion_custom_pass"
"""The slots, in the order in which Inductor comes to them."""


class Passes(NamedTuple):
    """One for each slot."""

    pin: PinPass
    full: FullPass
    exact: ExactPass


def passes(
    taps: Taps,
    pin: Sequence[Callable[[fx.Graph], None]] = (),
    full: Sequence[Callable[[fx.Graph], None]] = (),
    exact: Callable[[list[Any]], list[Any]] | None = None,
) -> Passes:
    """Those that put `taps` into a graph; `pin`, `full` and `exact` are the user's own in the three slots."""
    in_memory = {ref: value for ref, value in taps.wanted.items() if ref not in taps.in_full}
    return Passes(
        PinPass(taps.wanted, taps.digest, pin, taps.boundary),
        FullPass(taps.wanted, taps.digest, taps.in_full, full, taps.boundary),
        ExactPass(in_memory, taps.digest, exact, taps.boundary),
    )
