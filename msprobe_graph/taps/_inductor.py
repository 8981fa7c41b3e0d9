"""Private Inductor that taps need, in one place. Tested with torch 2.13."""

from __future__ import annotations

import sys
from typing import Any

import torch


def keep_order(operator: torch._ops.OpOverload) -> None:
    """Have Inductor run the calls of `operator`, which returns nothing, in the order in which the program has them.

    Left alone, its scheduler sorts calls by when their arguments are ready; registering an ordered effect doesn't help,
    since that order gets lost with operators that return nothing. It takes hold once Inductor is loaded and costs
    nothing before, so it is to be called while tracing.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in lowering.lowerings:
        return
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def lower(*args: Any) -> None:
        graph = V.graph
        earlier = [call for call in graph.operations if getattr(call, "op_overload", None) is operator]
        ir.FallbackKernel.create(operator, *args)
        if earlier:
            name = graph.operations[-1].get_operation_name()
            graph.additional_buffer_deps[name].add(earlier[-1].get_name())

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)
