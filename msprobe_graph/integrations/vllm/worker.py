"""One worker's capture: each scheduler step that computes something becomes one step of a dump."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.config import CompilationMode
from vllm.distributed import get_pp_group

from msprobe_graph.debugger.precision_debugger import PrecisionDebugger
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.records import Request

from . import log, run_name
from .batch import client_name, encodes, padded_rows, requests, row_order
from .compiled import heed_hooks
from .sharding import sharding

if TYPE_CHECKING:
    from .graph import GraphCapture

BEHIND = 8
"""As many steps may be on their way to the disk where the model runs on a GPU: else each would wait for the GPU, and
where CUDA graphs make them short, for the disk whenever that is late."""


class WorkerCapture:
    """Wraps three methods of `worker`, this instance's only, and captures from the end of its warm-up on.

    | method | |
    |---|---|
    | load_model | when it returns, the model is there, and nothing of it compiled |
    | compile_or_warm_up_model | when it returns, warm-up, profiling and graph capture are over |
    | execute_model | begins a step: lays out the batch, runs the model and, in model runner V1, computes the logits |
    | sample_tokens | ends the step; on pipeline ranks before the last execute_model does |

    What is captured begins with the model's forward, when the batch is laid out: how a runner does that differs between
    versions and platforms, and is no part of the model. Where a model has encoders, which run before, and in model
    runner V2, whose replay of a whole model nobody sees begin, it begins with the step.

    A call of execute_model with nothing scheduled is no step, but tells which requests are over. A step is on disk
    before its result is returned, because vLLM kills its processes when it is stopped. In one of them that computes on
    a GPU the last `BEHIND` steps may come later, but when a call with nothing scheduled returns they are there; vLLM
    makes one when nothing is left to do. A failure in here ends capture, not serving.

    Gives the worker three methods for collective_rpc, between steps: msprobe_start, msprobe_stop and msprobe_flush.
    """

    def __init__(self, worker: Any, config: str | Mapping[str, Any]) -> None:
        """Raises ConfigError for a wrong config."""
        self._worker = worker
        self._debugger = PrecisionDebugger(config, run=run_name(worker.vllm_config))
        self._rank = self._debugger.session.rank = _global_rank(worker)
        self._models: Mapping[str, nn.Module] = {}
        self._warm = False
        self._switched_on = True
        """What msprobe_start and msprobe_stop have said last."""
        self._scheduled: Any = None
        """The scheduler's output for the step that runs; None between steps."""
        self._captured = False
        """Whether that step is captured: msprobe_stop, and dump_enable, step and rank in the config, may say no."""
        self._batch: list[Request] | None = None
        """That step's requests with their rows, once the batch has been laid out."""
        self._padded: int | None = None
        """How many rows that step's batch has with its padding, once the model has begun to run."""
        self._behind = 0
        self._early = False
        """What is captured begins with the step."""
        self._at_once = False
        """One step follows the other, but for dummy runs."""
        self._boundary = Boundary()
        self._graphs: GraphCapture | None = None
        """Puts taps into what is compiled; None where nothing is."""
        if worker.vllm_config.compilation_config.mode in (
            CompilationMode.DYNAMO_TRACE_ONCE,
            CompilationMode.VLLM_COMPILE,
        ):
            from .graph import GraphCapture

            self._graphs = GraphCapture(worker.vllm_config, self._debugger.session)
        for name in ("load_model", "compile_or_warm_up_model", "execute_model", "sample_tokens"):
            setattr(worker, name, functools.partial(getattr(self, f"_{name}"), getattr(worker, name)))
        for rpc in (self.msprobe_start, self.msprobe_stop, self.msprobe_flush):
            setattr(worker, rpc.__name__, rpc)

    def msprobe_start(self) -> str:
        """Capture from the next step on, if the config agrees. Returns a sentence that tells what happens next."""
        self._switched_on = True
        return self._state()

    def msprobe_stop(self) -> str:
        """Capture nothing from the next step on; steps are counted all the same. Returns a sentence as well."""
        self._switched_on = False
        return self._state()

    def msprobe_flush(self) -> str:
        """Write what is held in memory, and return a sentence when it is on disk."""
        settings = self._debugger.session.settings
        self._safely(self._debugger.flush if settings.keep_last is None else self._debugger.flush_kept)
        if settings.keep_last is not None and "rpc" not in settings.flush_on:
            return f'{self._state()}; flush_on in the config does not have "rpc", so nothing was written'
        return f"{self._state()}; what was captured before is in {settings.dump_path}"

    def _state(self) -> str:
        session = self._debugger.session
        following = session.step + (self._scheduled is not None)
        if self._boundary.failures:
            told = "a step failed, so nothing is captured any more; the log has the error"
        elif not self._switched_on:
            told = f"capture is off; step {following} comes next"
        elif session.wanted():
            told = f"capture is on; step {following} comes next"
        else:
            told = f"capture is on, but by the config (dump_enable, step, rank or a limit) not of step {following}"
        return f"rank {self._rank}: {told}"

    def _compile_or_warm_up_model(self, compile_or_warm_up_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        times = compile_or_warm_up_model(*args, **kwargs)
        self._warm = True
        self._safely(self._prepare)
        return times

    def _execute_model(
        self, execute_model: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._warm and scheduler_output.finished_req_ids:
            self._safely(self._over, scheduler_output.finished_req_ids)
        if not self._warm or kwargs.get("dummy_run"):
            return execute_model(scheduler_output, *args, **kwargs)
        if not scheduler_output.total_num_scheduled_tokens:
            output = execute_model(scheduler_output, *args, **kwargs)
            self._safely(self._debugger.session.wait, 0)
            return output
        self._safely(self._begin, scheduler_output)
        output = self._watched(execute_model, scheduler_output, *args, **kwargs)
        if output is not None or not _samples():
            self._safely(self._end)
        return output

    def _sample_tokens(self, sample_tokens: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._scheduled is None:
            return sample_tokens(*args, **kwargs)
        self._within_step(self._go_on)
        output = self._watched(sample_tokens, *args, **kwargs)
        self._safely(self._end)
        return output

    def _watched(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `call` returns, with capture off afterwards. When it raises, its step is left unfinished."""
        afterwards = self._debugger.stop
        try:
            output = call(*args, **kwargs)
            afterwards = self._debugger.session.hush
        finally:
            self._safely(afterwards)
        return output

    def _load_model(self, load_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        if self._graphs is not None:
            self._safely(self._graphs.loaded, self._worker.get_model())
        return loaded

    def _prepare(self) -> None:
        """The model is loaded and warm: decide what of it is watched."""
        model = self._worker.get_model()
        # Run in the user's own process vLLM makes no call with nothing scheduled.
        lags = self._worker.device.type != "cpu" and multiprocessing.parent_process() is not None
        self._behind = BEHIND if lags else 0
        mode = self._worker.vllm_config.compilation_config.mode
        self._models = {"": model}
        self._debugger.session.sharding = sharding(model)
        if self._graphs is not None:
            self._graphs.warm(model)
        runner = self._worker.model_runner
        v1 = hasattr(runner, "_model_forward")
        self._early = encodes(self._worker) or not v1
        if mode != CompilationMode.STOCK_TORCH_COMPILE:  # which would compile the hooks, too
            heed_hooks(model)
        if hasattr(model, "load_weights"):  # which writes through .data
            model.load_weights = functools.partial(self._load_weights, model.load_weights)
        if v1 and hasattr(runner, "_dummy_run"):  # all that may be replayed between steps
            self._at_once = True
            runner._dummy_run = functools.partial(self._dummy_run, runner._dummy_run)
        if v1:  # what this calls may be a CUDA graph, in which no hook runs
            runner._model_forward = functools.partial(self._model_forward, runner._model_forward)
        elif mode != CompilationMode.STOCK_TORCH_COMPILE:
            model.register_forward_pre_hook(lambda *_: self._within_step(self._resume), prepend=True)
        log.info("msprobe_graph captures the steps of rank %d (process %d)", self._rank, os.getpid())

    def _model_forward(self, model_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._within_step(self._resume)
        return model_forward(*args, **kwargs)

    def _load_weights(self, load_weights: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loaded = load_weights(*args, **kwargs)
        self._safely(self._debugger.session.forget_weights)
        return loaded

    def _dummy_run(self, dummy_run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._safely(self._debugger.session.rest)
        return dummy_run(*args, **kwargs)

    def _begin(self, scheduler_output: Any) -> None:
        if self._scheduled is not None:  # what was to end it never came
            self._end()
        self._scheduled, self._batch, self._padded, self._captured = scheduler_output, None, None, False
        session = self._debugger.session
        if self._wanted(scheduler_output):
            self._captured = session.attend(self._models)
            if self._captured and self._early:
                session.resume(self._models)
        else:
            session.leave()

    def _wanted(self, scheduler_output: Any) -> bool:
        """Whether a step is to be captured."""
        if not self._switched_on or not self._debugger.session.wanted():
            return False
        return self._asked_for(map(client_name, scheduler_output.num_scheduled_tokens))

    def _asked_for(self, names: Iterable[str]) -> bool:
        """Whether one of these requests is the one that request_id names, if it names one."""
        wanted = self._debugger.session.settings.request_id
        return wanted is None or any(name == wanted or name.startswith(f"{wanted}-") for name in names)

    def _over(self, finished: Iterable[str]) -> None:
        """Requests are over. vLLM says so with the next step or, when there is nothing more to do, with an empty one
        right after the last."""
        if self._scheduled is not None:  # what was to end it never came
            self._end()
        session = self._debugger.session
        if "request" in session.settings.flush_on and self._asked_for(map(client_name, finished)):
            session.fire("request")
            session.flush()

    def _within_step(self, act: Callable[[], Any]) -> None:
        """For what dummy runs call as well."""
        if self._scheduled is not None and self._captured:
            self._safely(act)

    def _go_on(self) -> None:
        """To the sampling."""
        if self._batch is None:
            self._resume()
        else:
            self._debugger.session.go_on()

    def _resume(self) -> None:
        """Capture, with the requests where they are in the batch, which is known once it has been laid out."""
        if self._batch is None:
            self._batch = requests(self._worker, self._scheduled, row_order(self._worker, self._scheduled))
            self._padded = padded_rows(self._worker)
        self._debugger.session.resume(self._models, self._batch, self._padded)

    def _end(self) -> None:
        session = self._debugger.session
        if self._captured:
            if self._batch is None:  # no hook on the model could tell
                self._resume()
            session.hush()
        self._scheduled = None
        session.next_step(at_once=self._at_once)
        if self._captured:
            session.wait(self._behind)

    def _safely(self, act: Callable[..., Any], *args: Any) -> None:
        """`act`, unless something failed before: then this worker is left alone."""
        if not self._boundary.failures:
            self._boundary.attempt("a step of vLLM", act, *args)
            if self._boundary.failures:
                self._warm, self._scheduled = False, None
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
