"""What the tests of the two tap passes share: models, a compile with taps, and what dynamo's own graph computes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from msprobe_graph.graph.exact import ExactPass
from msprobe_graph.graph.full import FullPass, PinPass
from msprobe_graph.graph.plan import node_of
from msprobe_graph.graph.stamps import stamp, values
from msprobe_graph.graph.tap_op import invocations


class Block(nn.Module):
    """A transformer's layer: the projections of attention in one, split by chunk."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = [part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mixed(nn.Module):
    """In-place operations, views, operators with several outputs, an embedding, softmax by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x.add_(1.0)
        x = x.relu_()
        a, b = x.split([8, 24], -1)
        y = torch.cat([b, a], -1) * 2
        scores = (y @ y.transpose(-1, -2) / 64).softmax(-1)  # else it saturates, and its gradients are all rounding
        top, _ = torch.topk(scores @ y, 4, -1)
        return self.head(y) + top.sum(-1, keepdim=True)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        return self.head(F.max_pool2d(self.second(x), 2).mean((2, 3)))


class Received:
    """An invocation that keeps copies of what taps hand over."""

    def __init__(self) -> None:
        self.values: dict[int, torch.Tensor] = {}
        self.notes: list[dict[str, Any]] = []

    def receive(self, values: Sequence[torch.Tensor], ids: Sequence[int], note: str, standing: bool = False) -> None:
        if note:
            self.notes.append(json.loads(note))
        for value, id in zip(values, ids, strict=True):
            assert id not in self.values, f"value {id} came twice"
            self.values[id] = value.detach().clone()


class Run:
    """A model compiled and run once, forward and, in training, backward.

    `fidelity` is None (no taps), "exact" or "full"; `names` limits full to those nodes of dynamo's graph, and exact
    does the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[torch.Tensor],
        fidelity: str | None,
        train: bool = False,
        dynamic: bool | None = None,
        names: Callable[[str], bool] | None = None,
        patches: dict[str, Any] | None = None,
    ) -> None:
        torch._dynamo.reset()
        self.received = Received()
        self._fidelity, self._names = fidelity, names
        self._patches = {"force_disable_caches": True} if patches is None else patches
        self.model = copy.deepcopy(model)
        compiled = torch.compile(self.model, backend=self._backend, fullgraph=True, dynamic=dynamic)

        def step() -> torch.Tensor:
            result: torch.Tensor = compiled(*inputs)
            if train:
                result.float().pow(2).sum().backward()
            return result

        invocations.push(self.received)
        try:
            with torch.set_grad_enabled(train):
                result, self.code = run_and_get_code(step)
        finally:
            invocations.pop()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        self.results = [result.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def _backend(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        stamp(module)
        self.module = copy.deepcopy(module)
        self.nodes = list(self.module.graph.nodes)
        known = values(module.graph)
        wanted = {id: value for id, value in known.items() if self.nodes[node_of(id)].op != "placeholder"}
        wanted |= {id + 1: value for id, value in known.items() if value.dtype.is_floating_point}
        patches = dict(self._patches)
        if self._fidelity is not None:
            in_full: set[int] = set(wanted) if self._fidelity == "full" else set()
            if self._names is not None:
                in_full = {id for id in wanted if self._names(self.nodes[node_of(id)].name)}
            self.exact = ExactPass({id: value for id, value in wanted.items() if id not in in_full}, "digest")
            patches["joint_custom_pre_pass"] = PinPass(wanted, "digest")
            patches["post_grad_custom_post_pass"] = FullPass(wanted, "digest", in_full)
            patches["_post_fusion_custom_pass"] = self.exact
        self.wanted = wanted
        call = compile_fx(module, inputs, config_patches=patches)

        def run(*args: Any) -> Any:
            self.args = [_fresh(argument) for argument in args]
            return call(*args)

        return run

    def functions(self) -> list[str]:
        """The generated kernels, body by body, in the order of the code."""
        bodies = []
        for code in self.code:
            bodies += re.findall(r"async_compile\.cpp_pybinding\(.*?'''(.*?)'''", code, re.DOTALL)
        return bodies

    def share(self) -> float:
        """Of the forward values that were wanted, how many came."""
        forward = [id for id in self.wanted if id % 2 == 0]
        return sum(id in self.received.values for id in forward) / len(forward)


class Interpreted(fx.Interpreter):
    """Dynamo's graph, run node by node in eager mode: what each value and gradient really is."""

    def __init__(self, run: Run, train: bool = False) -> None:
        super().__init__(run.module)
        self.values: dict[int, torch.Tensor] = {}
        self._live: dict[int, torch.Tensor] = {}
        self._index = {node: at for at, node in enumerate(run.nodes)}
        with torch.set_grad_enabled(train):
            (result,) = self.run(*[_fresh(argument) for argument in run.args])
            if train:
                result.float().pow(2).sum().backward()
        for id, tensor in self._live.items():
            if tensor.grad is not None:
                self.values[id + 1] = tensor.grad

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "output":
            id = 2 * self._index[n]
            self.values[id] = result.detach().clone()
            # What an operation has written in place is its result from then on, and has its gradient.
            self._live = {other: tensor for other, tensor in self._live.items() if tensor is not result}
            self._live[id] = result
            if result.requires_grad:
                result.retain_grad()
        return result


def _fresh(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def assert_right(run: Run, train: bool = False, tolerance: float = 1e-4) -> None:
    """Each value that came is the one that dynamo's graph computes, within `tolerance` of its largest element. Eager
    mode can't tell the gradients of what is written in place later."""
    expected = Interpreted(run, train).values
    assert run.received.values
    for id, value in run.received.values.items():
        if id % 2 and id not in expected:
            continue
        reference = expected[id]
        name = f"{run.nodes[node_of(id)].name}{' (gradient)' if id % 2 else ''}"
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype), name
        scale = reference.double().abs().max().item() + 1e-3
        error = (value.double() - reference.double()).abs().max().item() / scale
        assert error <= tolerance, f"{name} is {error} off"


def assert_accounted(run: Run) -> None:
    """Each wanted value either came or is in a note."""
    missing = {int(id) for note in run.received.notes for id in note["missing"]}
    graphs = {note["graph"] for note in run.received.notes}
    expected = {id for id in run.wanted if id % 2 == 0 or "backward" in graphs}
    assert missing.isdisjoint(run.received.values)
    assert missing | set(run.received.values) == expected
