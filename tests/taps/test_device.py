"""What every device's adapter holds to: the CPU, CUDA and, in processes of their own, a device of the tests."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from msprobe_graph import acl_save, flush
from msprobe_graph.taps import Rows, cuda_graphs
from msprobe_graph.taps.device import Device, of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(params=[os.environ.get("HOST_DEVICE", "cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    return of(torch.empty(0, device=request.param).device)


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(shape, dtype=torch.float64) * 20).abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_host_copy_is_of_its_moment(device: Device, dtype: torch.dtype) -> None:
    values = some(dtype, 5, 7)
    tensor = values.clone().to(device.device).t()
    host, wait = device.to_host(tensor)
    tensor.zero_()
    wait()
    assert (host.device.type, host.is_contiguous()) == ("cpu", True)
    assert torch.equal(host, values.t())


def test_outside_of_graphs_nothing_is_captured(device: Device) -> None:
    assert not device.capturing()
    device.synchronize()


def test_what_saves_in_graphs(device: Device) -> None:
    saves = {"npu": True, "cuda": cuda_graphs.saves_in_graphs()}
    assert (device.save_in_graph is not None) == saves.get(device.device.type, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(device: Device, dtype: torch.dtype) -> None:
    values = some(dtype, 33, 5)
    if dtype.is_floating_point:
        values[0, 0], values[1, 1] = math.nan, math.inf
    rows = Rows()
    rows.add(values.to(device.device))
    rows.seal(True)
    (found,) = rows.fetch()
    assert found is not None
    exact = values.to(torch.float64)
    finite = exact[exact.isfinite()]
    single = dtype.is_floating_point
    assert (found.finite_max if single else found.max) == finite.max().item()
    assert (found.finite_min if single else found.min) == finite.min().item()
    assert (found.finite_mean if single else found.mean) == pytest.approx(finite.mean().item(), rel=1e-6)
    assert (found.finite_norm if single else found.norm) == pytest.approx(finite.norm().item(), rel=1e-6)


def test_acl_save(device: Device, tmp_path: Path) -> None:
    tensors = [some(torch.float32, 3, 2) + number for number in range(3)]
    compiled = torch.compile(lambda x: acl_save(x * 2, str(tmp_path / "x.pt")) + 1, backend="aot_eager")
    for number, tensor in enumerate(tensors):
        x = tensor.to(device.device)
        if number == 1:
            acl_save(x * 2, tmp_path / "x.pt")
        else:
            assert torch.equal(compiled(x).cpu(), tensor * 2 + 1)
    flush()
    for number, tensor in enumerate(tensors):
        assert torch.equal(torch.load(tmp_path / f"x_{number}.pt", weights_only=True), tensor * 2)
