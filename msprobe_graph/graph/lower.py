"""One graph on its way from dynamo to the inner backend: name, select, tap, hand on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx

from msprobe_graph.config.selection import Selection
from msprobe_graph.version import __version__

from ._compat import Traced
from .handoff import Compiled, Taps, hand_on
from .marks import Marks
from .naming import plan_of
from .options import GraphOptions
from .plan import Plan, gradient_id, refs, valued
from .region import Region
from .runs import SITE
from .stamps import Wanted, stamp, values
from .verify import Verifier
from .watch import Watch

_marks = Marks()


def lower(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: GraphOptions,
    watch: Watch,
    traced: Traced | None,
) -> Callable[..., Any]:
    """What a dynamo backend returns for a graph: a function that computes it and, while something captures, records
    the calls in it. `traced`: see `naming.plan_of`.

    A graph without anything that the settings select is handed on as it came, and so is one that can't be understood:
    then the boundary has the hole.
    """
    settings, operators, boundary = watch.settings, watch.operators, watch.boundary
    modules, apis = settings.level in ("L0", "mix"), settings.level in ("L1", "mix")
    has_modules = any(node.meta.get("nn_module_stack") for node in module.graph.nodes)
    marks = _marks.of(module.graph) if modules and has_modules else ()
    selection = Selection(settings, operators.risk)
    wants_api = selection.may_want_api if apis else lambda name: False

    def prepare() -> tuple[Plan, dict[int, Wanted]]:
        plan = plan_of(module.graph, marks, operators, wants_api, traced)
        stamp(module)
        return plan, _wanted(plan, values(module.graph), selection.backward)

    prepared = boundary.attempt(SITE, prepare)
    if prepared is None or not prepared[0].calls:
        return hand_on(module, inputs, Taps(), options).call
    plan, wanted = prepared
    in_full = _in_full(plan, wanted, options)
    taps = Taps(wanted, in_full, _digest(wanted, in_full), boundary)

    def compile(module: fx.GraphModule, tapped: bool, options: GraphOptions) -> Compiled:
        return hand_on(module, inputs, taps if tapped else Taps(), options)

    verifier = Verifier(module, compile, options) if options.verify else None
    return Region(plan, compile(module, True, options), watch, options, watch.replays.rows(inputs), verifier)


def _wanted(plan: Plan, known: dict[int, Wanted], backward: bool) -> dict[int, Wanted]:
    """The values to tap. The graph's inputs and outputs need none, and views of them neither: they are read where they
    come in and go out."""
    outside = plan.inputs.keys() | plan.outputs.keys()
    wanted = {ref: known[ref] for ref in plan.values if ref in known and ref not in outside}
    derived = {base: [part.id for part in found] for base, found in plan.parts.items()}
    for base, views in plan.reshaped.items():
        derived.setdefault(base, []).extend(views)
    for base, views in derived.items():
        if base in known and base not in outside:
            wanted[base] = known[base]
        for view in views:
            if base in outside:
                wanted.pop(view, None)
            elif view in wanted:
                wanted[view] = wanted[view]._replace(view_of=base)
    if backward:
        for call in plan.calls:
            for ref in refs([call.given, call.gives]):
                if ref.told and valued(ref.id) in known:
                    wanted[ref.id] = known[valued(ref.id)]
    return wanted


def _in_full(plan: Plan, wanted: dict[int, Wanted], options: GraphOptions) -> set[int]:
    if options.fidelity == "full":
        return set(wanted)
    chosen = options.full_modules
    if not chosen:
        return set()
    found: set[int] = set()
    for call in plan.calls:
        path = call.place.path if call.place is not None else ""
        if any(path == name or path.startswith(f"{name}.") for name in chosen):
            for ref in refs([call.args, call.kwargs, call.output]):
                found.update((ref.id, gradient_id(ref.id)))
    return found & wanted.keys()


def _digest(wanted: dict[int, Wanted], in_full: Collection[int]) -> str:
    """Tells what is tapped from any other choice: the caches of the inner backend know nothing of stamps."""
    table = sorted((ref, str(value), ref in in_full) for ref, value in wanted.items())
    return hashlib.sha256(repr((__version__, table)).encode()).hexdigest()
