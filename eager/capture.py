"""Eager capture of a model: which taps a level needs, and when they are in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain

from torch import nn

from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.config.selection import Selection
from msprobe_graph.config.settings import Settings
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.names import module_call
from msprobe_graph.dump.records import Entry, Hole
from msprobe_graph.taps.recorder import Recorder
from msprobe_graph.taps.replayed import ReplayedCall

from ._compat import compiler_at_work
from .backward import Backward
from .call_stacks import CallStacks
from .calls import Calls
from .compiled import Borders, survey
from .context import Context
from .fused import has_fused_path
from .modes import ApiMode, AtenMode, ModeSwitch
from .modules import ModuleHooks, ModuleTap
from .stretches import Stretches
from .unhooked import keep_out_of_compilations, leave_torch_modules_to_python

COMPILED = "it runs inside a compiled region, which eager capture leaves as it is"
BEGUN = "its call had begun when capture did, with the first graph that was compiled in it"
UNFUSED = (
    "under capture it computes step by step, not by its fused fast path: what is captured is right, but an untapped "
    "run may differ in the last bits"
)


class EagerCapture:
    """Captures what runs eagerly on the thread that called `start`, until `stop`.

    | level | taps |
    |---|---|
    | L0 | hooks on each module, hooks on autograd's nodes |
    | L1 | a function mode, hooks on autograd's nodes; module hooks only to know where a call stands |
    | mix | L0 and L1 |
    | L2 | a dispatch mode; module hooks only to know where an operator stands |

    Operators that run on other threads (a DataParallel replica, a backward pass on a GPU) are not seen by the modes.
    """

    def __init__(self, settings: Settings, recorder: Recorder, boundary: Boundary, operators: OperatorTable) -> None:
        stacks = CallStacks() if settings.extra_info else None
        selection = Selection(settings, operators.risk)
        self._context = Context(recorder, selection, boundary, stacks, level=settings.level)
        self._backward = Backward(self._context)
        recorder.forget_calls = self._forget_calls
        self._hooks = ModuleHooks(self._context, self._backward, records=settings.level in ("L0", "mix"))
        self._calls: Calls | None = None
        self._mode: ModeSwitch | None = None
        self._stretches: Stretches | None = None
        if settings.level in ("L1", "mix"):
            self._calls = Calls(self._context, operators.as_written, self._backward)
            self._mode = ModeSwitch(ApiMode(operators.name, self._calls.record))
            self._stretches = Stretches(self._mode, self._context)
            self._context.module_begins = self._stretches.module_begins
        elif settings.level == "L2":
            self._calls = Calls(self._context, operators.as_written, None)
            self._mode = ModeSwitch(AtenMode(operators.aten_name, self._calls.record))
        if self._mode is not None:
            self._context.quiet = self._mode.passive if self._stretches is None else self._stretches.graph
        self._borders = None if self._mode is None else Borders(self._mode)
        self._inside: dict[str, None] = {}
        """Modules inside compiled regions."""
        self._expected: list[str] = []
        """Modules that should have an entry in every step, as their entries' names begin."""
        self._unfused: list[str] = []
        """Modules that would take torch's fused fast path if nobody looked."""
        self._watched: set[nn.Module] = set()
        self._sites_of: tuple[object, list[ReplayedCall], list[str]] | None = None
        """What `_sites` was counted of: the calls, what was replayed, and the entries' names."""
        self._sites: tuple[int, int, list[Hole]] = (0, 0, [])

    @property
    def context(self) -> Context:
        """What compiled regions need to record into the same step."""
        return self._context

    def watch(self, models: Mapping[str, nn.Module], running: Collection[nn.Module] = ()) -> None:
        """Put hooks on the models, given by the prefix of their modules' names ("" for a single model).

        running: modules whose calls have begun already. These count as calls, and are holes.
        """
        self.meet_dynamo()
        new = {prefix: model for prefix, model in models.items() if model not in self._watched}
        if not new:
            return
        self._watched.update(new.values())
        self._context.paths.add(new)
        for prefix, model in new.items():
            modules, borders = survey(model, prefix)
            late = [module for module in running if module not in self._hooks.taps]
            leave_torch_modules_to_python(module for module in modules.values() if module not in self._hooks.taps)
            self._hooks.install(modules)
            if compiler_at_work():  # a backend asks for it: the hooks come when dynamo has ended
                self._hooks.take_away()
            self._miss([self._hooks.taps[module] for module in late if module in self._hooks.taps])
            for border in borders:
                self._inside.update(dict.fromkeys(border.inside))
                if self._borders is not None:
                    self._borders.install(border)
        self._unfused = [tap.prefix for module, tap in self._hooks.taps.items() if has_fused_path(module)]
        wanted = self._context.selection.may_want_module
        self._expected = [tap.prefix for tap in self._hooks.taps.values() if wanted(tap.prefix)]
        self._sites_of = None

    def _miss(self, taps: list[ModuleTap]) -> None:
        """Count a call of each that began before anyone looked."""
        for tap in taps:
            name = module_call(tap.prefix, "forward", self._context.numbering.advance(tap.prefix))
            if self._hooks.records:
                self._context.recorder.holes.append(Hole(name, BEGUN))

    def meet_dynamo(self) -> None:
        """To be called when dynamo may have been imported or reset since."""
        keep_out_of_compilations(self._hooks)

    def start(self) -> None:
        self._context.on = True
        if self._stretches is not None:
            self._stretches.on_this_thread()
        if self._mode is not None:
            self._mode.turn_on()

    def stop(self) -> None:
        self._context.on = False
        if self._mode is not None:
            self._mode.turn_off()

    def remove(self) -> None:
        """Leave the models as they were found."""
        if not self._watched:
            return
        self.stop()
        self._forget_calls()
        self._hooks.remove()
        if self._borders is not None:
            self._borders.remove()
        self._inside.clear()
        self._context.paths.clear()
        self._unfused.clear()
        self._watched.clear()
        self._sites_of = None

    def _forget_calls(self) -> None:
        """What is kept of calls of earlier steps holds no longer."""
        for tap in self._hooks.taps.values():
            tap.forget_calls()
        if self._calls is not None:
            self._calls.forget()

    def begin_step(self, number: int) -> None:
        """Step `number`: call numbers and windows start anew."""
        self._context.step = number
        self._context.numbering.reset()
        self._context.selection.reset()
        self._backward.reset()

    def rest(self) -> list[Entry]:
        """Entries that only the step's end completes."""
        return self._backward.rest()

    def sites(self) -> tuple[int, int, list[Hole]]:
        """Of the modules watched: how many should have an entry in this step, how many have, and why the others
        haven't."""
        recorder = self._context.recorder
        names, counted = list(recorder.entries), self._context.numbering.state()
        if self._sites_of != (counted, recorder.replays, names):
            self._sites_of = counted, list(recorder.replays), names
            replayed = (name for call in recorder.replays for name in call.entries)
            self._sites = self._count_sites(chain(replayed, names))
        return self._sites

    def _count_sites(self, names: Iterable[str]) -> tuple[int, int, list[Hole]]:
        context = self._context
        calls = context.numbering.next
        compiled = [prefix for prefix in self._inside if not calls(prefix)]
        holes = [Hole(prefix, COMPILED) for prefix in compiled]
        holes += [Hole(prefix, UNFUSED) for prefix in self._unfused]
        if not self._hooks.records or not context.selection.forward:
            return 0, 0, holes
        expected = [prefix for prefix in self._expected if prefix not in self._inside or calls(prefix)]
        holes += [Hole(prefix, "its forward did not run in this step") for prefix in expected if not calls(prefix)]
        captured = {name.rpartition(".forward.")[0] for name in names}
        return len(expected), sum(prefix in captured for prefix in expected), holes
