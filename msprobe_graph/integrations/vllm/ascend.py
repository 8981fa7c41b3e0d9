"""vllm-ascend with graphs: what its calls of AclGraphDumper leave unsaid.

Its model runner makes the dumper, starts it when the model is loaded, and calls step() after each run, dummy runs
included: what a step is stays its to say. By then it is too late for taps in what is compiled, and a replay runs no
Python. So the taps are put in here, before the model is made; and a step's capture begins here, when its batch is laid
out, so that neither warm-up nor the capture of ACL graphs is in anyone's way. Written to vllm-ascend 0.23; what of it
was run where is in docs/ascend.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import CompilationMode

from msprobe_graph.debugger.acl_graph_dumper import AclGraphDumper
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.records import Hole

from . import log
from .batch import padded_rows, requests, row_order
from .compiled import heed_hooks
from .graph import GraphCapture
from .sharding import sharding

CHANGED = (
    "this vllm-ascend has %s where 0.23 has %s, so nothing is captured inside of what it compiles or replays; start "
    "vLLM with --enforce-eager to have that, too"
)
UNCOMPILED = (
    "vllm-ascend replays ACL graphs of a model that vLLM does not compile, and no tap is in them: start vLLM with "
    "--enforce-eager to have it"
)


class AscendGraphs:
    """Wraps four methods of `worker`, this instance's only, and one of its model runner's.

    | method | |
    |---|---|
    | init_device | when it returns, there is a model runner with its dumper, and no model |
    | load_model | when it returns, the model is there, and nothing of it compiled |
    | compile_or_warm_up_model | when it returns, warm-up, profiling and graph capture are over |
    | execute_model | knows the requests of the batch |
    | the runner's _model_forward | called once the batch is laid out: a step's capture begins |

    A failure in here ends capture, not serving.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._dumper: AclGraphDumper | None = None
        """vllm-ascend's; None until it is known, and where it can't be followed."""
        self._graphs: GraphCapture | None = None
        """Puts taps into what is compiled; None where nothing is."""
        self._scheduled: Any = None
        """The scheduler's output for the batch that runs; None for a dummy run."""
        self._boundary = Boundary()
        for name in ("init_device", "load_model", "compile_or_warm_up_model", "execute_model"):
            setattr(worker, name, functools.partial(getattr(self, f"_{name}"), getattr(worker, name)))

    def _init_device(self, init_device: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = init_device(*args, **kwargs)
        self._safely(self._follow)
        return made

    def _load_model(self, load_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        if self._graphs is not None:
            self._safely(self._graphs.loaded, self._worker.get_model())
        return loaded

    def _compile_or_warm_up_model(self, compile_or_warm_up_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        times = compile_or_warm_up_model(*args, **kwargs)
        if self._dumper is not None:
            self._safely(self._warm, self._dumper)
        return times

    def _execute_model(
        self, execute_model: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._scheduled = scheduler_output if scheduler_output.total_num_scheduled_tokens else None
        try:
            return execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._scheduled = None

    def _model_forward(self, model_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._scheduled is not None and self._dumper is not None:
            self._safely(self._begin, self._dumper)
        return model_forward(*args, **kwargs)

    def _follow(self) -> None:
        """Take vllm-ascend's dumper, and have what is compiled tapped."""
        runner = self._worker.model_runner
        dumper = getattr(runner, "debugger", None)
        if not isinstance(dumper, AclGraphDumper):
            log.warning(CHANGED, f"{type(dumper).__name__} as its model runner's debugger", "AclGraphDumper")
            return
        if not hasattr(runner, "_model_forward"):
            log.warning(CHANGED, f"a {type(runner).__name__} without _model_forward", "one")
            return
        self._dumper = dumper
        dumper.awaits_batches = True
        if self._worker.vllm_config.compilation_config.mode == CompilationMode.VLLM_COMPILE:
            self._graphs = GraphCapture(self._worker.vllm_config, dumper.session)
        else:
            log.warning(UNCOMPILED)
            dumper.session.out_of_reach.append(Hole("what vllm-ascend replays", UNCOMPILED))

    def _warm(self, dumper: AclGraphDumper) -> None:
        """Warm-up is over: what runs from now on may be a step."""
        runner, model = self._worker.model_runner, self._worker.get_model()
        dumper.session.sharding = sharding(model)
        if self._graphs is not None:
            self._graphs.warm(model)
        heed_hooks(model)
        runner._model_forward = functools.partial(self._model_forward, runner._model_forward)

    def _begin(self, dumper: AclGraphDumper) -> None:
        batch = requests(self._worker, self._scheduled, row_order(self._worker, self._scheduled))
        dumper.begin(self._worker.get_model(), batch, padded_rows(self._worker))

    def _safely(self, act: Callable[..., Any], *args: Any) -> None:
        """`act`, unless something failed before: then vllm-ascend is left alone."""
        if not self._boundary.failures:
            self._boundary.attempt("a step of vllm-ascend", act, *args)
            if self._boundary.failures:
                if self._dumper is not None:
                    self._boundary.attempt("a step of vllm-ascend", self._dumper.session.leave)
                log.error("msprobe_graph captures no more steps of this worker, because of the error above")
