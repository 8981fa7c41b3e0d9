"""Taps in what vLLM compiles: its own backends, splitting, passes and caches stay what they are.

vLLM asks its configuration for a backend for each module that it compiles; ours goes around that one. In mode 2 that is
a dynamo backend, "inductor" as a rule. In mode 3 it is vLLM's own, which splits the graph at attention, has Inductor
compile the pieces between and runs the rest as it is. Taps of values that these split-off operators write stand behind
them in the graph; the others go into the pieces. A compiler of a platform's own, such as vllm-ascend's, has no place of
its own for taps: there all stand in the graph, and in the pieces once it is split.

A compiled module that vLLM takes from its cache was never traced: the names of its calls come from a file beside it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import fx, nn
from torch._dynamo.aot_compile_types import SerializableCallable
from torch.utils.hooks import RemovableHandle
from vllm import envs
from vllm.compilation.backends import VllmBackend
from vllm.compilation.partition_rules import should_split
from vllm.compilation.passes.inductor_pass import CallableInductorPass
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available

from msprobe_graph.debugger.session import Session
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.records import Hole
from msprobe_graph.graph._compat import Retrace
from msprobe_graph.graph.exact import Report
from msprobe_graph.graph.handoff import Compiled, Taps, hand_on, tap_dynamo_graph, tap_in_front
from msprobe_graph.graph.lower import lower
from msprobe_graph.graph.options import GraphOptions
from msprobe_graph.graph.passes import EXACT, PIN, passes
from msprobe_graph.graph.pins import handed_on
from msprobe_graph.graph.plan import fixed_in, node_of
from msprobe_graph.graph.region import Region
from msprobe_graph.graph.writes import Writes
from msprobe_graph.version import __version__

from . import log
from .compiled import compiled_modules

CHOOSING = ("level", "scope", "list", "data_mode", "risk_level", "custom_op_namespaces", "operators")
"""The settings that tell which values are tapped."""
COMPILERS = ("inductor", "eager")
"""What vLLM's own backend compiles with by name; any other is the platform's."""
SPLITS = "msprobe_graph::tap", "msprobe_graph::tap_standing"
"""Our taps as vLLM's splitting_ops name them: behind a split-off operator they are split off with it."""
REPLAYED = (
    "vLLM replays CUDA graphs, in which no slice or checksum is taken: start it with --compilation-config "
    '\'{"cudagraph_mode": "NONE"}\' to have that, too'
)
UNNAMED = (
    "vLLM took compiled code from its cache beside which there are no names, so nothing in it is captured; "
    "remove %s to have it compiled anew"
)


class GraphCapture:
    """Puts the taps of `session` into what one worker compiles; to be made before its model is."""

    def __init__(self, vllm_config: Any, session: Session) -> None:
        self._config = vllm_config
        self._session = session
        self._compiling: Path | None = None
        """Where the plan of the module that is being compiled is to be kept; None if vLLM does not save it."""
        self._key: str | None = None
        """Tells this vLLM's compiled code from another's; None until the model is loaded and can be traced anew."""
        self._named: set[str] = set()
        """The modules that were taken from vLLM's cache and have their names."""
        self._rounds: RemovableHandle | None = None
        compilation = vllm_config.compilation_config
        compilation.init_backend = functools.partial(self._init_backend, compilation.init_backend)
        splits = compilation.splitting_ops and not compilation.use_inductor_graph_partition
        if splits and compilation.backend in COMPILERS:
            compilation.splitting_ops = [*compilation.splitting_ops, *SPLITS]
        if isinstance(vllm_config.additional_config, dict):  # vLLM's caches are to know what was tapped
            vllm_config.additional_config = {**vllm_config.additional_config, "msprobe_graph": _choice(session)}

    def loaded(self, model: nn.Module) -> None:
        """The model is there, and nothing of it is compiled yet."""
        self._key = hashlib.sha256(f"{self._config.compute_hash()} {torch.__version__}".encode()).hexdigest()[:16]
        for name, module in compiled_modules(model).items():
            module.aot_compile = functools.partial(self._traced_anew, module.aot_compile, self._plan_file(name))
        if self._replays_graphs:
            self._session.replays.listening = True
            if self._session.replays.saving is not None:
                self._session.replays.saving.paths.add({"": model})
            self._rounds = model.register_forward_pre_hook(
                lambda *_: self._session.boundary.attempt("a round of vLLM's", self._begin_round, model)
            )

    def warm(self, model: nn.Module) -> None:
        """All is compiled, or taken from vLLM's cache, and captured in CUDA graphs if it is to be."""
        self._name_cached(model)
        replays = self._session.replays
        replays.listening = False
        if self._rounds is not None:
            self._rounds.remove()
        if self._replays_graphs and not replays.follows:
            log.warning(REPLAYED)
            self._session.out_of_reach.append(Hole("what vLLM replays as a CUDA graph", REPLAYED))

    @property
    def _replays_graphs(self) -> bool:
        """Whether vLLM replays CUDA graphs."""
        return bool(self._config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE)

    def _begin_round(self, model: nn.Module) -> None:
        """The model is about to run for vLLM's profiling, compiling or capturing."""
        self._name_cached(model)
        descriptor = get_forward_context().batch_descriptor if is_forward_context_available() else None
        self._session.replays.begin_round(None if descriptor is None else int(descriptor.num_tokens))

    def _name_cached(self, model: nn.Module) -> None:
        """Give what vLLM has taken from its cache its names."""
        for name, module in compiled_modules(model).items():
            if name not in self._named and getattr(module, "was_aot_compile_fn_loaded_from_disk", False):
                self._named.add(name)
                self._name(module.aot_compiled_fn._artifacts.compiled_fn, self._plan_file(name))

    def _init_backend(self, init_backend: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(self._compile, init_backend(*args, **kwargs))

    def _compile(self, backend: Any, module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        """The dynamo backend. vLLM's own options come with the string "inductor" only, so they are taken here."""
        inner_options = self._config.compilation_config.inductor_compile_config if backend == "inductor" else {}
        pieces = Pieces(backend) if isinstance(backend, VllmBackend) else None
        options = GraphOptions(inner=pieces or backend, inner_options=inner_options)
        session = self._session
        if self._key is None:
            return backend(module, inputs) if pieces else Unsaved(hand_on(module, inputs, Taps(), options).call)
        call = lower(module, inputs, options, session.watch(session.context), None)
        if pieces is None:
            return Unsaved(call)
        if isinstance(call, Region) and self._compiling is not None:
            session.boundary.attempt("the names of vLLM's cached code", _keep, call, self._compiling)
        pieces.compiled.optimized_call = call
        return pieces.compiled

    def _traced_anew(self, aot_compile: Callable[..., Any], plan_file: Path, *args: Any, **kwargs: Any) -> Any:
        """Dynamo itself traces anew when a backend asks for it, but vLLM's ahead-of-time compilation calls the backend
        when dynamo is done."""
        self._compiling = plan_file
        try:
            while True:
                try:
                    return aot_compile(*args, **kwargs)
                except Retrace:
                    continue
        finally:
            self._compiling = None

    def _name(self, compiled: Any, plan_file: Path) -> None:
        if not plan_file.is_file():
            log.error(UNNAMED, envs.VLLM_CACHE_ROOT)
            return
        plan = pickle.loads(plan_file.read_bytes())
        plan.fixed = fixed_in(plan.calls)
        session = self._session
        watch = session.watch(session.context)
        rows = session.replays.rows_on(torch.device(self._config.device_config.device))
        compiled.optimized_call = Region(
            plan, Compiled(compiled.optimized_call), watch, GraphOptions(inner="vLLM"), rows
        )

    def _plan_file(self, name: str) -> Path:
        parallel = self._config.parallel_config
        rank = f"rank_{parallel.rank}_{parallel.data_parallel_index}"
        return Path(envs.VLLM_CACHE_ROOT, "torch_compile_cache", "msprobe_graph", str(self._key), rank, f"{name}.plan")


class Pieces:
    """vLLM's own backend as an inner one, which puts taps into its pieces and between them."""

    __name__ = "vLLM"

    def __init__(self, backend: VllmBackend) -> None:
        self._backend = backend
        self.compiled: Any = None
        """What it made: vLLM's VllmSerializableFunction, which it can save."""

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return self.compile_with_taps(module, inputs, Taps()).call

    def compile_with_taps(self, module: fx.GraphModule, inputs: Sequence[Any], taps: Taps) -> Compiled:
        boundary, remarks, reports = taps.boundary or Boundary(), None, None
        if self._backend.compilation_config.backend in COMPILERS:
            reports = boundary.attempt("taps", self._place, module, taps)
        elif taps.wanted:
            compiler = self._backend.compiler_manager.compiler.name
            remarks = boundary.attempt("taps", tap_in_front, module, taps, compiler)
        self.compiled = self._backend(module, inputs)
        return Compiled(self.compiled.optimized_call, remarks or (), reports or ())

    def _place(self, module: fx.GraphModule, taps: Taps) -> list[Report]:
        """Tap the graph where vLLM splits it, and have the other taps put into the pieces."""
        backend = self._backend
        config = backend.compilation_config
        nodes = list(module.graph.nodes)
        splitting = [] if config.use_inductor_graph_partition else config.splitting_ops or []
        between = {
            ref: value
            for ref, value in taps.wanted.items()
            if config.backend == "eager" or should_split(nodes[node_of(ref)], splitting)
        }
        writes, inside = Writes(nodes), {}
        for ref, value in taps.wanted.items():
            if ref not in between:
                writers = writes.behind(nodes[node_of(ref)])
                inside[ref] = value._replace(overwritten=any(should_split(each, splitting) for each in writers))
        tap_dynamo_graph(module, between, writes)
        slots = backend.inductor_config
        ours = passes(taps._replace(wanted=inside), tuple(filter(None, [slots.get(PIN)])), exact=slots.get(EXACT))
        if inside:
            slots[PIN], slots[EXACT] = ours.pin, ours.exact
            manager = backend.pass_manager  # the third slot is vLLM's
            manager.add(CallableInductorPass(ours.full, ours.full.uuid()))
            manager.configure = functools.partial(_configure, manager, manager.configure)
        return ours.exact.reports


def _configure(manager: Any, configure: Callable[[Any], None], config: Any) -> None:
    """vLLM sets up its passes only now."""
    configure(config)
    if hasattr(manager, "ir_lowering"):
        manager.ir_lowering = Lowering(manager.ir_lowering)


class Lowering:
    """vLLM's pass that puts the operators of an implementation into the place of one of its own."""

    def __init__(self, lower: Any) -> None:
        self._lower = lower

    def __call__(self, graph: fx.Graph) -> None:
        with handed_on(graph):
            self._lower(graph)

    def uuid(self) -> str:
        """For vLLM's caches, to which it is still the same."""
        return str(self._lower.uuid())


class Unsaved(SerializableCallable):
    """A compiled module that vLLM asks to save, and is told that this can't be: it is compiled anew by the next start,
    out of Inductor's caches."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        raise pickle.PicklingError("what msprobe_graph captures is compiled at each start")

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        raise pickle.UnpicklingError("what msprobe_graph captures is compiled at each start")


def _keep(region: Region, plan_file: Path) -> None:
    plan_file.parent.mkdir(parents=True, exist_ok=True)
    partial = plan_file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(pickle.dumps(region.plan))
    partial.replace(plan_file)


def _choice(session: Session) -> str:
    """Tells what is tapped from any other choice."""
    chosen = {name: getattr(session.settings, name) for name in CHOOSING}
    encoded = msgspec.json.encode([__version__, chosen], order="deterministic")
    return hashlib.sha256(encoded).hexdigest()[:16]
