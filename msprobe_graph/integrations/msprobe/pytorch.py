"""What ``msprobe.pytorch`` is once `install_as_msprobe` was called: msProbe's signatures, our capture."""

from __future__ import annotations

import logging
from typing import Any

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


class PrecisionDebugger(ours.PrecisionDebugger):
    """Ours, for services that were written for msProbe's: they end their workers without a word, so a step is on disk
    when step() returns."""

    @property
    def config(self) -> Settings:
        """The settings. vllm-ascend 0.18 asks their `level` whether start() is to get the model."""
        return self.session.settings

    def step(self, dump: bool = True) -> None:
        super().step(dump)
        self.flush()


def seed_all(seed: int = 1234, mode: bool = False, rm_dropout: bool = False, is_enhanced: bool = False) -> None:
    """`msprobe_graph.seed_all`, with msProbe's signature.

    Raises ValueError for the two keywords for which msProbe replaces functions of torch, which is not done here.
    """
    if rm_dropout:
        raise ValueError("seed_all: rm_dropout is not supported; call model.eval(), which switches dropout off")
    if is_enhanced:
        raise ValueError("seed_all: is_enhanced is not supported; seed each generator where it is made")
    seeds.seed_all(seed, mode)
