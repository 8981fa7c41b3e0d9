"""Which values of a graph are to be saved, where that has to be known before a step runs: when it is captured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from msprobe_graph.config import Settings
from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.config.selection import Selection
from msprobe_graph.eager.context import Numbering, RunningModules
from msprobe_graph.eager.paths import Paths

from .numbered import NumberedCalls
from .plan import Plan


class Saving:
    """Names calls as a step will, as far as that can be known: its `paths` are those of the models, once somebody has
    told. `scope` is not looked at, as other code may open it."""

    def __init__(self, settings: Settings, operators: OperatorTable) -> None:
        self.level: str = settings.level
        self.selection = Selection(msgspec.structs.replace(settings, scope=None), operators.risk)
        self.numbering = Numbering()
        self.running = RunningModules()
        self.paths = Paths()
        self.most_bytes = settings.graph_copy_bytes
        """See `GraphCopies`."""

    def begin(self) -> None:
        """Calls are numbered as in a new step."""
        self.numbering.reset()
        self.selection.reset()

    def values(self, plan: Plan, inputs: Sequence[Any]) -> Collection[int]:
        """The values, by id, that files are made of when a graph with this plan is called now; more than these where
        names are not known."""
        calls = NumberedCalls(plan, self, inputs)
        return calls.saved if calls.placed else range(2**63)
