"""Taps as nodes of the aten graph, before Inductor fuses: every selected value, at the price of other fusions."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomGraphPassCallable

from .exact import chained_uuid
from .stamps import Wanted, find, find_gradients, gradient_flow
from .tap_op import KEEP, TAP


class FullPass(CustomGraphPass):
    """Inductor's `post_grad_custom_post_pass` that taps those of the `wanted` values (by value id) that are in `ids`.

    A tap's place is right behind what it reads, and of neighbours several share a tap. It also marks the graph for
    `exact.ExactPass`, which taps the other values.
    """

    def __init__(
        self,
        wanted: Mapping[int, Wanted],
        digest: str,
        ids: Collection[int] | None = None,
        chained: Sequence[CustomGraphPassCallable] = (),
    ) -> None:
        """`ids` None: all."""
        self._wanted = {id: value for id, value in wanted.items() if ids is None or id in ids}
        self._digest = digest
        self._chained = chained

    def __call__(self, graph: fx.Graph) -> None:
        for each in self._chained:
            each(graph)
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            graph.call_function(KEEP).meta["val"] = None
        if self._wanted:
            self._insert(graph)

    def uuid(self) -> Any | None:
        return chained_uuid(self._digest, *self._chained)

    def __deepcopy__(self, memo: dict[int, Any]) -> FullPass:
        """Inductor copies its configuration, to print it; dynamic sizes can't be copied."""
        return self

    def _insert(self, graph: fx.Graph) -> None:
        pass
