"""vllm-ascend's model runner with its real methods, and a small torch model on the CPU in place of what needs an NPU.

Real, out of the wheel: the statements of __init__ that make the debugger; load_model, execute_model, sample_tokens,
_model_forward, _dummy_run and what they call to start and end a capture; ACLGraphWrapper, which is not asked to
capture. Stands in: the scheduler's batch, its way to the model's inputs, attention metadata, the sampler and its
bookkeeping, and whatever of vllm-ascend and torch_npu is switched off (`released.Nothing`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode

from ..released import NOTHING, Given, Wheel, run

RUNNER = "vllm_ascend/worker/model_runner_v1.py"
GRAPHS = "vllm_ascend/compilation/acl_graph.py"
METHODS = (
    "load_model", "get_model", "execute_model", "sample_tokens", "_model_forward", "_dummy_run", "_start_dump_data",
    "_finalize_dump_data",
)  # fmt: skip
VOCABULARY = 17


class Torch:
    """torch, with an empty torch.npu."""

    npu = NOTHING

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Model(nn.Module):
    """A model as vLLM runs it: flat batches of tokens in, hidden states out, logits by a call of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None,
        inputs_embeds: None,
    ) -> torch.Tensor:
        hidden = self.embed(input_ids) + positions.unsqueeze(-1) / 100
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden)
        return logits


def new_runner(wheel: Wheel, config: Path | None, mode: CUDAGraphMode, model: nn.Module) -> Any:
    """A runner of the wheel's vllm-ascend that has loaded `model`. `config`: what --additional-config names."""
    runner = runner_class(wheel, lambda: model)(config, mode)
    runner.load_model()
    return runner


def runner_class(wheel: Wheel, get_model: Callable[[], nn.Module], **instead: Any) -> Any:
    """The class of the wheel's runners; `instead` goes before what stands in for parts of its module."""
    forward_context = Given(cudagraph_runtime_mode=CUDAGraphMode.NONE, batch_descriptor=None)
    standing_in = {
        "torch": Torch(),
        "get_forward_context": lambda: forward_context,
        "current_platform": NOTHING,
        "get_pp_group": lambda: SimpleNamespace(world_size=1, is_last_rank=True, is_first_rank=True),
        "DeviceMemoryProfiler": NOTHING,
        "get_model": lambda vllm_config: get_model(),
        "ModelRunnerOutput": SimpleNamespace,  # whose fields differ from one vLLM to the next
    }
    if "ACLGraphWrapper" not in instead:
        graphs = wheel.module(GRAPHS, {"ACLGraphWrapper"}, **standing_in, _acl_graph_wrappers=set())
        standing_in["ACLGraphWrapper"] = graphs["ACLGraphWrapper"]
    standing_in |= instead
    names = {"ExecuteModelState", *(f"NPUModelRunner.{name}" for name in METHODS)}
    namespace = wheel.module(RUNNER, names, **standing_in)

    class Runner(namespace["NPUModelRunner"]):  # type: ignore[misc]
        def __init__(self, config: Path | None, mode: CUDAGraphMode) -> None:
            self.ascend_config = Given(dump_config_path=None if config is None else str(config))
            self.compilation_config = Given(cudagraph_mode=mode)
            self.model_config = Given(enforce_eager=mode == CUDAGraphMode.NONE)
            self.scheduler_config = Given(max_num_batched_tokens=64, max_num_seqs=4)
            self.max_num_tokens, self.uniform_decode_query_len = 64, 1
            self.execute_model_state = None
            self.kv_connector_output = None
            ids = torch.arange(64) % VOCABULARY
            self.input_ids, self.positions = Given(gpu=ids), _Positions(torch.arange(64))
            self._batch: tuple[torch.Tensor, ...] = ()
            of_debugger = [
                statement
                for statement in wheel.body(RUNNER, "NPUModelRunner.__init__")
                if any(name in ast.unparse(statement) for name in ("dump_cfg", "self.debugger"))
            ]
            run(of_debugger, RUNNER, namespace | {"self": self})

        def __getattr__(self, name: str) -> Any:
            return NOTHING

        def step(self, tokens: list[int]) -> list[int]:
            """One step of a scheduler: `tokens` of one request; the token sampled behind the last."""
            self._batch = torch.tensor(tokens), torch.arange(len(tokens)), torch.tensor([len(tokens) - 1])
            self.input_batch = Given(num_reqs=1, req_ids=["request"])
            scheduled = SimpleNamespace(
                total_num_scheduled_tokens=len(tokens),
                num_scheduled_tokens={"request": len(tokens)},
                scheduled_spec_decode_tokens={},
                scheduled_encoder_inputs={},
                scheduled_cached_reqs=NOTHING,
            )
            if self.execute_model(scheduled) is None:
                sampled: list[int] = self.sample_tokens(None).sampled_token_ids
                return sampled
            return []

        def _prepare_inputs(self, scheduled: Any, _: Any) -> tuple[torch.Tensor, None, int]:
            return self._batch[2], None, len(self._batch[0])

        def _determine_batch_execution_and_padding(self, num_tokens: int, **_: Any) -> tuple[Any, ...]:
            return CUDAGraphMode.NONE, Given(num_tokens=num_tokens, num_reqs=None), False, None, None

        def _build_attention_metadata(self, **_: Any) -> tuple[dict[str, Any], None]:
            return {}, None

        def _preprocess(self, *_: Any) -> tuple[Any, ...]:
            return self._batch[0], None, self._batch[1], None, {}, None

        def _sample(self, logits: torch.Tensor, _: Any) -> Any:
            return Given(sampled_token_ids=logits.argmax(-1))

        def _bookkeeping_sync(self, scheduled: Any, sampled: Any, *_: Any) -> tuple[Any, ...]:
            return None, sampled.sampled_token_ids.tolist(), {}, ["request"], {"request": 0}, []

    return Runner


class _Positions:
    """A buffer that 0.18 asks for its part on the device, and 0.23 for its rows."""

    def __init__(self, gpu: torch.Tensor) -> None:
        self.gpu = gpu

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self.gpu[rows]
