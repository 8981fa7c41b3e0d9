"""One worker's capture: each scheduler step that computes something becomes one step of a dump."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from vllm.config import CompilationMode
from vllm.distributed import get_pp_group

from msprobe_graph.debugger.precision_debugger import PrecisionDebugger
from msprobe_graph.dump.boundary import Boundary

from . import log
from .batch import row_order, rows
from .compiled import eager_parts, heed_hooks, is_compiled


class WorkerCapture:
    """Wraps three methods of `worker`, this instance's only, and captures from the end of its warm-up on.

    | method | |
    |---|---|
    | compile_or_warm_up_model | when it returns, warm-up, profiling and graph capture are over |
    | execute_model | begins a step; runs the model and, but for model runner V2, computes the logits |
    | sample_tokens | ends the step; on pipeline ranks before the last execute_model does |

    A call of execute_model with nothing scheduled is no step. A step is on disk before its result is returned, because
    vLLM kills its workers when it is stopped. A failure in here ends capture, not serving.
    """

    def __init__(self, worker: Any, config: str | Mapping[str, Any]) -> None:
        """Raises ConfigError for a wrong config."""
        self._worker = worker
        self._debugger = PrecisionDebugger(config, run=_run(worker.vllm_config))
        self._rank = _global_rank(worker)
        self._models: Mapping[str, nn.Module] = {}
        self._on = False
        self._scheduled: Any = None
        """The scheduler's output for the step that runs; None between steps."""
        self._captured = False
        """Whether that step is captured: dump_enable, step and rank in the config may say no."""
        self._boundary = Boundary()
        for name in ("compile_or_warm_up_model", "execute_model", "sample_tokens"):
            setattr(worker, name, functools.partial(getattr(self, f"_{name}"), getattr(worker, name)))

    def _compile_or_warm_up_model(self, compile_or_warm_up_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        times = compile_or_warm_up_model(*args, **kwargs)
        self._on = True
        self._safely(self._prepare)
        return times

    def _execute_model(
        self, execute_model: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not self._on or not scheduler_output.total_num_scheduled_tokens or kwargs.get("dummy_run"):
            return execute_model(scheduler_output, *args, **kwargs)
        self._safely(self._begin, scheduler_output)
        output = self._watched(execute_model, scheduler_output, *args, **kwargs)
        if output is not None or not _samples():
            self._safely(self._end)
        return output

    def _sample_tokens(self, sample_tokens: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._scheduled is None:
            return sample_tokens(*args, **kwargs)
        self._within_step(self._resume)
        output = self._watched(sample_tokens, *args, **kwargs)
        self._safely(self._end)
        return output

    def _watched(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `call` returns, with capture off afterwards. When it raises, its step is left unfinished."""
        try:
            return call(*args, **kwargs)
        finally:
            self._safely(self._debugger.stop)

    def _prepare(self) -> None:
        """The model is loaded and warm: decide what of it is watched."""
        model = self._worker.get_model()
        mode = self._worker.vllm_config.compilation_config.mode
        compiled = [name or type(model).__name__ for name, module in model.named_modules() if is_compiled(module)]
        self._models = eager_parts(model)
        if mode == CompilationMode.NONE:
            heed_hooks(model)
        if compiled:
            model.register_forward_pre_hook(lambda *_: self._within_step(self._debugger.stop), prepend=True)
            model.register_forward_hook(lambda *_: self._within_step(self._resume), always_call=True)
        elif mode != CompilationMode.STOCK_TORCH_COMPILE:  # which would compile the hook, too
            model.register_forward_pre_hook(lambda *_: self._within_step(self._resume), prepend=True)
        if not self._worker.model_config.enforce_eager:
            log.warning(
                "without --enforce-eager, msprobe_graph captures only what runs outside compiled code and CUDA graphs; "
                "compiled: %s",
                ", ".join(compiled) or "no module that it can tell",
            )
        log.info("msprobe_graph captures the steps of rank %d", self._rank)

    def _begin(self, scheduler_output: Any) -> None:
        if self._scheduled is not None:  # what was to end it never came
            self._end()
        self._scheduled = scheduler_output
        tokens = scheduler_output.num_scheduled_tokens
        self._debugger.start(self._models, rank_id=self._rank, scheduled_tokens=rows(tokens, tokens))
        self._captured = self._debugger.capturing

    def _within_step(self, act: Callable[[], Any]) -> None:
        """For hooks on the model, which dummy runs call as well."""
        if self._scheduled is not None and self._captured:
            self._safely(act)

    def _resume(self) -> None:
        """Go on, with the requests where they are in the batch, which is known once it has been laid out."""
        order = row_order(self._worker, self._scheduled)
        self._debugger.start(scheduled_tokens=rows(order, self._scheduled.num_scheduled_tokens))

    def _end(self) -> None:
        if self._captured:
            self._resume()  # for the rows of requests, where no hook on the model could tell
            self._debugger.stop()
        self._scheduled = None
        self._debugger.step()
        self._debugger.flush()

    def _safely(self, act: Callable[..., Any], *args: Any) -> None:
        """`act`, unless something failed before: then this worker is left alone."""
        if not self._boundary.failures:
            self._boundary.attempt("a step of vLLM", act, *args)
            if self._boundary.failures:
                self._on, self._scheduled = False, None
                self._boundary.attempt("a step of vLLM", self._debugger.stop)
                log.error("msprobe_graph captures no more steps of rank %d, because of the error above", self._rank)


def _samples() -> bool:
    """Whether this rank samples tokens: the last of a pipeline."""
    last: bool = get_pp_group().is_last_rank
    return last


def _global_rank(worker: Any) -> int:
    """The worker's rank among all of this vLLM's, over tensor, pipeline and data parallelism."""
    parallel = worker.vllm_config.parallel_config
    rank: int = worker.rank
    if parallel.distributed_executor_backend == "external_launcher":  # which counts over all of them
        return rank
    return int(parallel.data_parallel_index * parallel.world_size) + rank


def _run(vllm_config: Any) -> str:
    """A name for the run that all of its workers know, data-parallel ones (``<instance>_dp1``) included."""
    instance: str = vllm_config.instance_id.partition("_dp")[0]
    return f"vllm-{instance}"
