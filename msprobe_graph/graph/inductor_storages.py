"""The memory of a scheduler's buffers. Private Inductor, tested with torch 2.13."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._inductor import ir, scheduler
from torch._inductor.virtualized import V


class Storages:
    """Which buffers share memory, and which scheduler nodes write into it after it was made."""

    def __init__(self, nodes: Sequence[scheduler.BaseSchedulerNode]) -> None:
        self._sets: dict[str, set[str]] = {}
        self._writes: list[tuple[int, str, fx.Node | None]] = []
        for at, node in enumerate(nodes):
            for buffer in node.get_outputs():
                layout = buffer.node.layout
                aliases = list(buffer.get_aliases())
                if isinstance(layout, ir.NoneLayout) and len(aliases) > 1:
                    aliases = []  # an operator that writes several arguments: they don't share memory with each other
                if isinstance(layout, ir.NonOwningLayout):
                    aliases.append(layout.view.get_name())
                mutations = list(buffer.get_mutations())
                for other in [*aliases, *mutations]:
                    self._join(buffer.get_name(), other)
                for name in mutations:
                    self._writes.append((at, name, _origin(buffer.node)))

    def _join(self, one: str, other: str) -> None:
        joined = self.of(one) | self.of(other)
        for name in joined:
            self._sets[name] = joined

    def of(self, name: str) -> set[str]:
        return self._sets.get(name, {name})

    def mutations(self, names: set[str]) -> list[tuple[int, fx.Node | None]]:
        """Index of the scheduler node that writes, and the FX node that it stands for, if known."""
        return [(at, origin) for at, name, origin in self._writes if name in names]


def _origin(buffer: ir.Buffer) -> fx.Node | None:
    """The FX node that a buffer written in place stands for."""
    operation: Any = getattr(buffer, "mutating_node", buffer)
    found = getattr(operation, "fx_node", None) or operation.get_origin_node()
    if found is None:
        origins = [origin for origin in operation.get_origins() if isinstance(origin, fx.Node)]
        order = {node: at for at, node in enumerate(V.graph.graph.nodes)}
        found = max((origin for origin in origins if origin in order), key=order.__getitem__, default=None)
    return found if isinstance(found, fx.Node) else None
