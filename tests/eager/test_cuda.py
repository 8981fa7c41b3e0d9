"""Eager capture of a model on a CUDA device: right statistics, and no host synchronisation while the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.taps import Rows

from ..models import Block

pytestmark = pytest.mark.gpu

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_floats(dtype: torch.dtype) -> None:
    values = torch.randn(33, 65, device="cuda", dtype=torch.float32).to(dtype)
    special = values.clone().float()
    special[3, 4], special[5, 6], special[7, 8] = math.nan, math.inf, -math.inf
    special = special.to(dtype) if dtype is not torch.float8_e4m3fn else values
    rows = Rows()
    with no_synchronisation():
        for tensor in (values, values.t()[::2], special):
            rows.add(tensor)
    for found, tensor in zip(rows.fetch(), (values, values.t()[::2], special), strict=True):
        exact = tensor.cpu().to(torch.float64)
        finite = exact[exact.isfinite()]
        assert found.nan_count == int(exact.isnan().sum())
        assert found.posinf_count == int((exact == math.inf).sum())
        assert found.neginf_count == int((exact == -math.inf).sum())
        extremes = (found.max, found.min) if finite.numel() == exact.numel() else (found.finite_max, found.finite_min)
        assert extremes == (finite.max().item(), finite.min().item())
        norm = found.norm if finite.numel() == exact.numel() else found.finite_norm
        assert norm == pytest.approx(finite.norm().item(), rel=1e-6)


def test_rows_of_integers_are_exact() -> None:
    tensor = torch.tensor([2**62 + 1, -(2**61) - 1, 0], device="cuda")
    rows = Rows()
    rows.add(tensor)
    assert (rows.fetch()[0].max, rows.fetch()[0].min) == (2**62 + 1, -(2**61) - 1)


def captured(model: nn.Module, x: torch.Tensor, folder: Path, **config: Any) -> tuple[torch.Tensor, StepDump]:
    debugger = PrecisionDebugger({"dump_path": str(folder), "risk_level": "ALL", **config})
    with debugger.start(model):
        if config.get("task") == "tensor":
            y = model(x)
        else:
            with no_synchronisation():
                y = model(x)
    return y, read(steps(folder)[0])


@pytest.mark.parametrize("level", ["L0", "L1", "L2", "mix"])
@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_the_dump_of_a_gpu_is_that_of_the_cpu(tmp_path: Path, level: str, task: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(64), Block(64)), torch.randn(4, 16, 64)
    with torch.no_grad():
        _, there = captured(model, x, tmp_path / "cpu", level=level, task=task)
        model, x = model.cuda(), x.cuda()
        plain = model(x)
        y, here = captured(model, x, tmp_path / "cuda", level=level, task=task)
    assert torch.equal(plain, y)
    assert here.manifest is not None
    assert here.manifest["device"] == "cuda"
    if level != "L2":  # a GPU runs other aten operators
        assert list(here.data) == list(there.data)
        for a, b in zip(here.tensors(), there.tensors(), strict=True):
            for field in ("Max", "Min", "Mean", "Norm"):
                expected = pytest.approx(b.record[field], rel=1e-3, abs=1e-4)
                assert a.record[field] == expected, (a.entry, a.position, field)
    if task == "tensor":
        output = [tensor for tensor in here.tensors() if tensor.position == "output.0"][-1]
        torch.testing.assert_close(here.load(output), y.cpu())


def test_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Block(64).cuda(), torch.randn(4, 64, device="cuda", requires_grad=True)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path), "level": "L0"})
    with debugger.start(model):
        model(x).sum().backward()
    step = read(steps(tmp_path)[0])
    gradient = next(t for t in step.tensors() if t.entry == "Module.Block.backward.0" and t.position == "output.0")
    assert x.grad is not None
    assert gradient.record["Norm"] == pytest.approx(x.grad.double().norm().item(), rel=1e-5)
