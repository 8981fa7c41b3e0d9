"""Exact taps on a GPU: the Triton kernels are those of the untapped program, source by source."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional

from msprobe_graph import msprobe_backend
from msprobe_graph.dump.reader import StepDump
from msprobe_graph.graph.generated import PINNED, UNCACHED, Function, functions_of, generated_code

from ..capturing import capture_into

pytestmark = pytest.mark.gpu

WIDTH, HEADS, GROUPS, SIZE = 256, 8, 2, 32


class Norm(nn.Module):
    """RMS norm with the residual's sum, as serving engines have it: returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        wide = residual.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return scaled.to(x.dtype) * self.weight, residual


class Layer(nn.Module):
    """A decoder's layer: grouped queries, rotary positions, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * SIZE)
        self.out = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.norm1(x, residual)
        q, k, v = self.qkv(x).unflatten(-1, (-1, SIZE)).transpose(1, 2).split([HEADS, GROUPS, GROUPS], 1)
        q, k = turned(q, turn), turned(k, turn)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x, residual = self.norm2(self.out(mixed.transpose(1, 2).flatten(2)), residual)
        gate, up = self.up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up), residual


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    one, other = x.float().chunk(2, -1)
    return torch.cat([one * turn.cos() - other * turn.sin(), other * turn.cos() + one * turn.sin()], -1).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = torch.arange(x.shape[1], device=x.device)[:, None] / 100 ** (
            torch.arange(SIZE // 2, device=x.device) / SIZE
        )
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, turn)
        return self.norm(x, residual)[0]


class Result:
    """What one compilation gave: the kernels, and the output with the gradients, if it was trained."""

    def __init__(self, dtype: torch.dtype, train: bool, compiler: dict[str, Any], dump: Path | None) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Decoder().to("cuda", dtype).train(train)
        x = torch.randn(2, 48, WIDTH).to("cuda", dtype)
        self.step: StepDump | None = None

        def run() -> None:
            with torch.set_grad_enabled(train):
                self.output = compiled(x)
            if train:
                self.output.float().square().mean().backward()

        with torch._inductor.config.patch({**PINNED, **UNCACHED, **compiler}), generated_code() as programs:
            if dump is None:
                compiled = torch.compile(model)
                run()
            else:
                compiled = torch.compile(model, backend=msprobe_backend)
                self.step = capture_into(dump, compiled, run, "L0")
        self.kernels: list[Function] = functions_of(programs)
        self.tensors = [self.output, *(each.grad for each in model.parameters() if each.grad is not None)]


def same(one: Result, other: Result) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("combo", [False, True], ids=["kernels", "combo kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_and_what_they_compute_are_the_same(
    tmp_path: Path, dtype: torch.dtype, combo: bool, train: bool
) -> None:
    compiler = {"combo_kernels": combo, "combo_kernel_foreach_dynamic_shapes": False}
    plain = Result(dtype, train, compiler, None)
    tapped = Result(dtype, train, compiler, tmp_path)
    assert len(plain.kernels) > 5
    assert tapped.kernels == plain.kernels
    # In float32, trained with combo kernels, one untapped compilation in a few gives other gradients than the rest, so
    # it is compared with some of them: that is the program's own noise.
    untapped = itertools.chain([plain], (Result(dtype, train, compiler, None) for _ in range(4)))
    assert any(same(tapped, each) for each in untapped)
    assert tapped.step is not None
    forward = [name for name in tapped.step.data if name.endswith(".forward.0")]
    assert len(forward) > 0.6 * sum(1 for _ in Decoder().modules())
