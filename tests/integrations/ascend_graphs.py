"""A worker of vllm-ascend 0.23 that compiles a small model and replays ACL graphs, on the tests' own device as "npu".

Real, out of the wheel: AscendCompiler and the fusion manager that it calls, ACLGraphWrapper, the worker's init_device,
compile_or_warm_up_model, execute_model and sample_tokens, and of the model runner what ascend_runner has. Out of
torch_npu's: npugraph_ex, as AscendCompiler sets it up. Of the vLLM that is installed, which is not the one of 0.23: its
backend, which splits the graph and calls the compiler, its decorator of compiled modules, its forward context. The
plugin is asked as vLLM asks it.

Stands in: the platform, whose kernels are the CPU's; torch_npu; the fusion passes, which are switched off; the choice
of a graph for a batch; and vLLM's loop over the sizes to capture.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn
from torch._functorch import config as functorch
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from ..released import NOTHING, Given, Wheel
from .ascend_runner import GRAPHS, VOCABULARY, runner_class

COMPILER = "vllm_ascend/compilation/compiler_interface.py"
FUSION = "vllm_ascend/compilation/graph_fusion_pass_manager.py"
WORKER = "vllm_ascend/worker/worker.py"
WORKER_METHODS = ("init_device", "get_model", "compile_or_warm_up_model", "execute_model", "sample_tokens")
PASS_KEY = "graph_fusion_manager"
ASCEND = Given(enable_npugraph_ex=False)
"""Its ascend_compilation_config."""
SIZES = (4, 8)
"""The batches that graphs are captured for."""

_operators = torch.library.Library("ascend_tests", "DEF")
_operators.define("attention(Tensor x, Tensor(a!) out) -> ()")


def _attention(x: torch.Tensor, out: torch.Tensor) -> None:
    """Each token sees those before it. Written into `out`, as vLLM's attention does."""
    out.copy_(x.cumsum(0) / 4)


_operators.impl("attention", _attention, "CompositeExplicitAutograd")
_operators.impl("attention", lambda x, out: None, "Meta")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up = self.up(self.norm(hidden))
        mixed = torch.zeros_like(up)
        torch.ops.ascend_tests.attention(up, mixed)
        return hidden + self.down(nn.functional.gelu(mixed))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class Body(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.embed(input_ids) + positions.unsqueeze(-1) / 100
        for layer in self.layers:
            hidden = layer(hidden)
        normed: torch.Tensor = self.norm(hidden)
        return normed


class Model(nn.Module):
    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.model = Body(vllm_config=vllm_config, prefix="model")
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.model(*args, **kwargs)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden)
        return logits


def graph_for(mode: CUDAGraphMode, rows: int) -> CUDAGraphMode:
    """Which kind of graph runs a batch. vLLM tells decode steps from others; here they are told by their size."""
    if rows > max(SIZES):
        return CUDAGraphMode.NONE
    return mode.decode_mode() if rows <= min(SIZES) else mode.mixed_mode()


def new_model(vllm_config: VllmConfig, device: str) -> Model:
    torch.manual_seed(0)
    with set_current_vllm_config(vllm_config):
        return Model(vllm_config).eval().to(device)


def new_config(mode: CUDAGraphMode, additional_config: dict[str, Any]) -> VllmConfig:
    """What vllm-ascend's platform makes of a start with these graphs; NONE: eager."""
    found = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    off = dict.fromkeys(("fuse_norm_quant", "fuse_qknorm_rope", "fuse_allreduce_rms", "fuse_muls_add"), False)
    found.additional_config = {**additional_config, "ascend_compilation_config": off}
    compilation = found.compilation_config
    object.__setattr__(compilation.pass_config, "enable_sp", False)  # which vLLM has dropped since
    compilation.cudagraph_mode = mode
    compilation.cudagraph_num_of_warmups = 1
    compilation.cudagraph_capture_sizes = list(SIZES)
    compilation.max_cudagraph_capture_size = max(SIZES)
    compilation.compile_sizes = []
    compilation.splitting_ops = ["ascend_tests::attention"] if mode.has_piecewise_cudagraphs() else []
    if mode != CUDAGraphMode.NONE:
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.backend = current_platform.get_compile_backend()
    return found


def install(wheel: Wheel, sources: Path) -> None:
    """vllm-ascend's modules that vLLM is told of by name, a platform that names them, and npugraph_ex, which lies in
    `sources`. For a process of its own."""
    ascend = Given(ascend_compilation_config=ASCEND)
    platform = Given(get_global_graph_pool=lambda: None)
    sys.path.insert(0, str(sources))
    sys.modules["torch_npu"] = MagicMock(__spec__=ModuleSpec("torch_npu", None), __version__="2.10.0")
    npu: Any = torch.get_device_module("npu")
    npu.set_compile_mode = lambda jit_compile: None
    npugraph_ex: Any = importlib.import_module("npugraph_ex.npu_fx_compiler")
    npugraph_ex._apply_pattern_passes = lambda module, inputs, config: None  # patterns of torch_npu's operators
    _install("vllm_ascend.utils", {"is_310p": lambda: False})
    compiler = {"compile_fx", "fusion_pass_compile", "npugraph_ex_compile", "_configure_backend", "AscendCompiler"}
    _install(
        "vllm_ascend.compilation.compiler_interface",
        wheel.module(COMPILER, compiler, get_ascend_config=lambda: ascend, COMPILATION_PASS_KEY=PASS_KEY),
    )
    _install("vllm_ascend.compilation.graph_fusion_pass_manager", wheel.module(FUSION, {"GraphFusionPassManager"}))
    _install(
        "vllm_ascend.compilation.acl_graph",
        wheel.module(
            GRAPHS,
            {"ACLGraphEntry", "ACLGraphWrapper", "weak_ref_workspaces"},
            current_platform=platform,
            weak_ref_tensors=lambda tensors: tensors,
            _acl_graph_wrappers=set(),
            _graph_params=None,
            _draft_graph_params=None,
            _draft_graph_prefill_params=None,
        ),
    )
    functorch.enable_autograd_cache = False  # torch 2.13's takes only what Inductor makes; 0.23 was written for 2.10
    kind: Any = type(current_platform)
    kind.device_type = "npu"
    kind.pass_key = PASS_KEY
    kind.check_and_update_config = classmethod(lambda cls, vllm_config: None)
    names = {
        "get_compile_backend": "compiler_interface.AscendCompiler",
        "get_pass_manager_cls": "graph_fusion_pass_manager.GraphFusionPassManager",
        "get_static_graph_wrapper_cls": "acl_graph.ACLGraphWrapper",
    }
    for method, name in names.items():
        setattr(kind, method, classmethod(lambda cls, name=name: f"vllm_ascend.compilation.{name}"))


def compile_with(npugraph_ex: bool) -> None:
    """What vllm-ascend compiles with from now on: npugraph_ex, or passes alone."""
    ASCEND.enable_npugraph_ex = npugraph_ex


def _install(name: str, contents: dict[str, Any]) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents, __name__=name)


def new_worker(wheel: Wheel, vllm_config: VllmConfig, dump_config: Path | None) -> Any:
    """A worker that is asked to serve, up to where steps come; `install` was called."""
    from msprobe_graph.integrations import vllm as plugin

    mode = vllm_config.compilation_config.cudagraph_mode
    wrapper = sys.modules["vllm_ascend.compilation.acl_graph"].ACLGraphWrapper
    kind = runner_class(
        wheel,
        lambda: new_model(vllm_config, "npu"),
        torch=torch,
        get_forward_context=get_forward_context,
        set_ascend_forward_context=partial(set_ascend_forward_context, vllm_config),
        ACLGraphWrapper=wrapper,
    )

    class Runner(kind):  # type: ignore[misc]
        def __init__(self, vllm_config: VllmConfig, device: object) -> None:
            super().__init__(dump_config, mode)
            self.compilation_config = vllm_config.compilation_config
            self.vllm_config = Given(compilation_config=self.compilation_config)
            self.input_ids = Given(gpu=torch.zeros(64, dtype=torch.int64, device="npu"))
            self.positions = torch.zeros(64, dtype=torch.int64, device="npu")
            self.requests: dict[str, Any] = {}

        def capture_model(self) -> int:
            for size in sorted(SIZES, reverse=True):
                self._dummy_run(size, cudagraph_runtime_mode=CUDAGraphMode.NONE)
                self._dummy_run(size, cudagraph_runtime_mode=graph_for(mode, size), is_graph_capturing=True)
            return 0

        def _determine_batch_execution_and_padding(self, num_tokens: int, **given: Any) -> tuple[Any, ...]:
            padded = next((size for size in SIZES if size >= num_tokens), None)
            if padded is None or given.get("force_eager"):
                return CUDAGraphMode.NONE, BatchDescriptor(num_tokens), False, None, None
            return graph_for(mode, padded), BatchDescriptor(padded), False, None, None

        def _prepare_inputs(self, scheduled: Any, _: Any) -> tuple[torch.Tensor, None, int]:
            tokens = [token for request in scheduled.batch.values() for token in request]
            ends = torch.tensor([len(request) for request in scheduled.batch.values()]).cumsum(0)
            self.input_ids.gpu[: len(tokens)] = torch.tensor(tokens)
            self.positions[: len(tokens)] = torch.arange(len(tokens))
            return (ends - 1).to("npu"), None, len(tokens)

        def _preprocess(self, scheduled: Any, padded: int, *_: Any) -> tuple[Any, ...]:
            return self.input_ids.gpu[:padded], None, self.positions[:padded], None, {}, None

    members = {f"NPUWorker.{name}" for name in WORKER_METHODS}
    standing_in = {
        "torch": torch, "NPUModelRunner": Runner, "get_ascend_config": lambda: NOTHING, "set_random_seed": NOTHING,
        "init_workspace_manager": NOTHING, "report_usage_stats": NOTHING,
        "get_pp_group": lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True),
    }  # fmt: skip
    namespace = wheel.module(WORKER, members, **standing_in)

    class Worker(namespace["NPUWorker"]):  # type: ignore[misc]
        def __init__(self) -> None:
            self.vllm_config = vllm_config
            self.model_config = Given(enforce_eager=mode == CUDAGraphMode.NONE)
            self.use_v2_model_runner = False
            self._pp_send_work: list[Any] = []
            self.profiler = None
            plugin.attach(self)  # as vLLM's WorkerBase does when it is done

        def __getattr__(self, name: str) -> Any:
            return NOTHING

        def load_model(self) -> None:
            self.model_runner.load_model()

    worker = Worker()
    with set_current_vllm_config(vllm_config):
        worker.init_device()
        worker.load_model()
        worker.model_runner._dummy_run(16, with_prefill=True, is_profile=True)
        worker.compile_or_warm_up_model()
    return worker


@contextmanager
def set_ascend_forward_context(vllm_config: VllmConfig, attn_metadata: Any, _: Any, **given: Any) -> Iterator[None]:
    """As far as vLLM's own context goes: ``vllm_ascend/ascend_forward_context.py``."""
    with set_forward_context(
        attn_metadata,
        vllm_config,
        num_tokens=given["num_tokens"],
        cudagraph_runtime_mode=given["aclgraph_runtime_mode"],
        batch_descriptor=given["batch_descriptor"],
    ):
        context: Any = get_forward_context()
        context.flash_comm_v1_enabled = False
        yield


def step(worker: Any, batch: dict[str, list[int]]) -> list[int]:
    """One step of a scheduler, each request's first: tokens by request; the token sampled behind each."""
    runner = worker.model_runner
    runner.input_batch = Given(num_reqs=len(batch), req_ids=list(batch))
    new = [
        SimpleNamespace(
            req_id=name, prompt_embeds=None, prompt_token_ids=tokens, prefill_token_ids=None, num_computed_tokens=0
        )
        for name, tokens in batch.items()
    ]
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], num_output_tokens=[], new_token_ids=[])
    scheduled = SimpleNamespace(
        batch=batch,
        total_num_scheduled_tokens=sum(map(len, batch.values())),
        num_scheduled_tokens={name: len(tokens) for name, tokens in batch.items()},
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
    )
    assert worker.execute_model(scheduled) is None
    sampled: list[int] = worker.sample_tokens(None).sampled_token_ids
    return sampled
