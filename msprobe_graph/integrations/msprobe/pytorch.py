"""What ``msprobe.pytorch`` is once `install_as_msprobe` was called: msProbe's signatures, our capture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

import msprobe_graph.debugger.precision_debugger as ours
from msprobe_graph.config import Settings
from msprobe_graph.debugger import acl_graph_dumper, seeds
from msprobe_graph.debugger.save_tensor import acl_save
from msprobe_graph.dump.records import Hole
from msprobe_graph.integrations.vllm.compiled import compiled_modules

__all__ = ["AclGraphDumper", "PrecisionDebugger", "acl_save", "seed_all"]

log = logging.getLogger("msprobe_graph")


UNSEEN = (
    "vLLM compiles it without taps, so nothing is captured inside of what vllm-ascend compiles or replays: start vLLM "
    "with --enforce-eager to have it"
)


class AclGraphDumper(acl_graph_dumper.AclGraphDumper):
    """Ours, which says what it can't see of the models of vllm-ascend where our plugin has put no taps into them."""

    def start(self, model: Any) -> None:
        super().start(model)
        if self.awaits_batches:  # as the plugin says
            return
        unseen = [name or "the whole model" for name in compiled_modules(acl_graph_dumper.unwrapped(model))]
        if unseen:
            log.warning("of %s there will be holes in the dump: %s", ", ".join(unseen), UNSEEN)
        self._debugger.session.out_of_reach = [Hole(name, UNSEEN) for name in unseen]


class OnClass:
    """A method that may be called on the class as well, as msProbe's may be: then on the debugger that was made last.

    ::

        PrecisionDebugger(config_path="config.json")
        PrecisionDebugger.start(model)
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __set_name__(self, cls: type[PrecisionDebugger], name: str) -> None:
        self._name = name

    def __get__(self, debugger: PrecisionDebugger | None, cls: type[PrecisionDebugger]) -> Callable[..., Any]:
        if debugger is not None:
            return MethodType(self._method, debugger)

        @functools.wraps(self._method)
        def of_latest(*args: Any, **kwargs: Any) -> Any:
            if cls.latest is None:
                raise RuntimeError(f"make a PrecisionDebugger(...) before PrecisionDebugger.{self._name}() is called")
            return self._method(cls.latest, *args, **kwargs)

        return of_latest


class PrecisionDebugger(ours.PrecisionDebugger):
    """Ours, for programs that were written for msProbe's: services end their workers without a word, so a step is on
    disk when step() returns, and methods may be called on the class."""

    latest: ClassVar[PrecisionDebugger | None] = None

    @functools.wraps(ours.PrecisionDebugger.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PrecisionDebugger.latest = self

    @property
    def config(self) -> Settings:
        """The settings. vllm-ascend 0.18 asks their `level` whether start() is to get the model."""
        return self.session.settings

    def _step(self, dump: bool = True) -> None:
        ours.PrecisionDebugger.step(self, dump)
        self.flush()

    start = OnClass(ours.PrecisionDebugger.start)
    stop = OnClass(ours.PrecisionDebugger.stop)
    step = OnClass(_step)
    save = OnClass(ours.PrecisionDebugger.save)


def seed_all(seed: int = 1234, mode: bool = False, rm_dropout: bool = False, is_enhanced: bool = False) -> None:
    """`msprobe_graph.seed_all`, with msProbe's signature.

    Raises ValueError for the two keywords for which msProbe replaces functions of torch, which is not done here.
    """
    if rm_dropout:
        raise ValueError("seed_all: rm_dropout is not supported; call model.eval(), which switches dropout off")
    if is_enhanced:
        raise ValueError("seed_all: is_enhanced is not supported; seed each generator where it is made")
    seeds.seed_all(seed, mode)
