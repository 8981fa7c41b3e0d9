"""acl_save in eager and compiled code: file contents in every mode, numbering, errors, exits, warm caches."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

import msprobe_graph
from msprobe_graph import acl_save, flush, save_tensor

BACKENDS = ["eager", "aot_eager", "inductor", "cudagraphs"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """tmp_path for f-strings: dynamo folds only those of strings and numbers."""
    return str(tmp_path)


def saved(path: Path) -> list[torch.Tensor]:
    """The tensors saved under `path`, in the order of their numbers."""
    flush()
    found = list(path.parent.glob(f"{path.name}_*.pt"))
    return [torch.load(path.with_name(f"{path.name}_{number}.pt"), weights_only=True) for number in range(len(found))]


class Block(nn.Module):
    """Two layers that save, in this order, ``hidden`` (twice), ``input`` (then changed in place) and ``out``."""

    def __init__(self, folder: Path, save: Callable[[torch.Tensor, str], torch.Tensor] = acl_save) -> None:
        super().__init__()
        self.folder = str(folder)
        self.save = save
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.save(self.up(x).relu(), f"{self.folder}/hidden")
        scratch = hidden.detach().clone()
        self.save(scratch, f"{self.folder}/scratch.pt")
        scratch.add_(1)
        self.save(scratch, f"{self.folder}/scratch.pt")
        out = x + self.down(hidden)
        return self.save(out, f"{self.folder}/out")


def unsaved(x: torch.Tensor, path: str) -> torch.Tensor:
    return x


NAMES = ["hidden", "scratch", "out"]


def block(folder: Path, save: Callable[[torch.Tensor, str], torch.Tensor] = acl_save) -> Block:
    torch.manual_seed(7)
    return Block(folder, save)


def run(call: Callable[[torch.Tensor], torch.Tensor], mode: str) -> list[torch.Tensor]:
    """Three calls, in `mode`, whose rows differ in number when it is "dynamic"."""
    generator = torch.Generator().manual_seed(3)
    outputs = []
    for rows in (3, 5, 6) if mode == "dynamic" else (4, 4, 4):
        x = torch.randn(rows, 8, generator=generator)
        if mode in ("training", "checkpoint"):
            x.requires_grad_()
        with torch.inference_mode() if mode == "inference_mode" else nullcontext():
            with nullcontext() if mode in ("training", "checkpoint") else torch.no_grad():
                out = checkpoint(call, x, use_reentrant=False) if mode == "checkpoint" else call(x)
            outputs.append(out)
        if x.requires_grad:
            out.square().sum().backward()
            assert x.grad is not None
            outputs.append(x.grad)
    return outputs


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "dynamic", "training", "checkpoint"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_saves_what_eager_does(tmp_path: Path, backend: str, mode: str) -> None:
    """The same files with the same values; outputs and gradients bit-equal to the program that saves nothing."""
    eager = block(tmp_path / "eager")
    run(eager, mode)
    tapped, plain = block(tmp_path / "compiled"), block(tmp_path / "plain", unsaved)
    outputs = []
    for model in (tapped, plain):
        torch._dynamo.reset()

        def call(x: torch.Tensor, model: Block = model) -> torch.Tensor:
            return model(x) if mode != "checkpoint" else checkpoint(model, x, use_reentrant=False)

        compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=mode == "dynamic")
        outputs.append(run(compiled, "training" if mode == "checkpoint" else mode))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
    for ours, theirs in zip(tapped.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) is (theirs.grad is None) is (mode not in ("training", "checkpoint"))
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert not (tmp_path / "plain").exists()
    for name in NAMES:
        expected, found = saved(tmp_path / "eager" / name), saved(tmp_path / "compiled" / name)
        calls = 6 if name == "scratch" else 3
        if mode == "checkpoint":
            # Recomputed in the backward, which in eager code stops at the last value that is needed.
            assert len(expected) == (calls if name == "out" else 2 * calls)
            # The backend "eager" recomputes too, in some releases of torch.
            assert len(found) in ((calls, 2 * calls) if backend == "eager" else (calls,))
            expected, found = firsts(expected, calls), firsts(found, calls)
        assert len(found) == len(expected) == calls
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    flush()


def firsts(tensors: list[torch.Tensor], calls: int) -> list[torch.Tensor]:
    """Of what three steps saved, each in its forward and then perhaps in its recomputation: the forwards' `calls`."""
    step, each = calls // 3, len(tensors) // 3
    return [tensor for at in range(3) for tensor in tensors[at * each : at * each + step]]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_order_on_one_path_is_that_of_the_program(tmp_path: Path, folder: str, backend: str, grad: bool) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        for factor in range(8):
            acl_save((x * factor).sum(0 if factor % 2 else 1), f"{folder}/x")
        return x.sin()

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend, fullgraph=True)(torch.ones(4, 4))
    assert [tensor[0].item() for tensor in saved(tmp_path / "x")] == [4 * factor for factor in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_is_saved_before_it_is_changed_in_place(tmp_path: Path, folder: str, backend: str) -> None:
    def model(x: torch.Tensor) -> None:
        acl_save(x, f"{folder}/x")
        x.mul_(2)
        acl_save(x, f"{folder}/x")

    x = torch.ones(4)
    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert [tensor.tolist() for tensor in saved(tmp_path / "x")] == [[1] * 4, [2] * 4]
    assert x.tolist() == [2] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_does_nothing_but_save(tmp_path: Path, folder: str, backend: str) -> None:
    compiled = torch.compile(lambda x: acl_save(x, f"{folder}/x"), backend=backend, fullgraph=True)
    x = torch.randn(3)
    assert torch.equal(compiled(x), x)
    (found,) = saved(tmp_path / "x")
    assert torch.equal(found, x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_gradients_can_be_saved_in_hooks(tmp_path: Path, folder: str, backend: str) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y.register_hook(lambda gradient: acl_save(gradient, f"{folder}/gradient"))
        return (y * torch.arange(3.0)).sum()

    torch.compile(loss, backend=backend, fullgraph=True)(torch.randn(3, requires_grad=True)).backward()
    assert [tensor.tolist() for tensor in saved(tmp_path / "gradient")] == [[0, 1, 2]]


def test_it_returns_its_input(tmp_path: Path) -> None:
    x = torch.randn(3, requires_grad=True)
    assert acl_save(x, tmp_path / "x.pt") is x
    y = save_tensor(x * 2, f"{tmp_path}/y.pt")
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    assert acl_save is save_tensor


def test_it_can_be_reached_through_the_package(tmp_path: Path) -> None:
    compiled = torch.compile(lambda x: msprobe_graph.acl_save(x, tmp_path / "x.pt"), fullgraph=True, backend="eager")
    compiled(torch.ones(1))
    assert len(saved(tmp_path / "x")) == 1


def test_numbering_goes_on_between_eager_compiled_and_recompiled_code(tmp_path: Path, folder: str) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return acl_save(x * 2, f"{folder}/x")

    compiled = torch.compile(double, backend="inductor", dynamic=False)
    for rows, call in enumerate([double, compiled, compiled, double, compiled], start=1):
        call(torch.ones(rows))
    assert [len(tensor) for tensor in saved(tmp_path / "x")] == [1, 2, 3, 4, 5]


def test_compiled_code_on_two_threads(tmp_path: Path, folder: str) -> None:
    compiled = torch.compile(lambda x: acl_save(x + 1, f"{folder}/x"), backend="inductor", fullgraph=True)
    compiled(torch.zeros(2))
    threads = [
        threading.Thread(target=lambda base=base: [compiled(torch.full((2,), base + n)) for n in range(20)])
        for base in (100.0, 200.0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = [tensor[0].item() for tensor in saved(tmp_path / "x")]
    assert values[0] == 1
    assert [value for value in values if 100 < value < 200] == [101.0 + n for n in range(20)]
    assert [value for value in values if value > 200] == [201.0 + n for n in range(20)]


def test_paths_may_be_built_in_compiled_code(tmp_path: Path, folder: str) -> None:
    class Model(nn.Module):
        step = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return acl_save(x.sin(), f"{folder}/step{self.step}/rank{torch.distributed.get_rank()}/rows{x.shape[0]}")

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Model()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for model.step in range(3):
            compiled(torch.zeros(model.step + 2))
    finally:
        torch.distributed.destroy_process_group()
    flush()
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.pt"))
    assert files == [f"step{step}/rank0/rows{step + 2}_0.pt" for step in range(3)]


def test_a_path_that_dynamo_cannot_build_breaks_the_graph_and_is_saved(tmp_path: Path) -> None:
    compiled = torch.compile(lambda x: acl_save(x * 2, f"{tmp_path}/x") + 1, backend="aot_eager")
    assert compiled(torch.ones(1)).item() == 3
    assert [tensor.item() for tensor in saved(tmp_path / "x")] == [2]


def test_what_is_wrong_is_said_at_the_first_eager_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"acl_save can't write .*file/x.pt': Not a directory"):
        acl_save(torch.ones(1), tmp_path / "file" / "x.pt")
    with pytest.raises(ValueError, match="needs the path of a file"):
        acl_save(torch.ones(1), "")
    with pytest.raises(TypeError, match=r"^acl_save takes a tensor, not float$"):
        acl_save(1.0, tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a sparse one"):
        acl_save(torch.eye(2).to_sparse(), tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_wrong_is_said_when_it_is_compiled(tmp_path: Path, backend: str) -> None:
    (tmp_path / "file").touch()
    ran: list[str] = []

    def inner(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        ran.append("compiled")
        return graph.forward

    for choice in (backend, inner):
        compiled = torch.compile(lambda x: acl_save(x * 2, tmp_path / "file" / "x.pt"), backend=choice)
        with pytest.raises(RuntimeError, match=r"acl_save can't write .*file/x.pt.*Not a directory"):
            compiled(torch.ones(1))
    assert ran == []
    sparse = torch.compile(lambda x: acl_save(x, tmp_path / "x"), backend=backend)
    with pytest.raises((TypeError, RuntimeError), match="not one on the meta device"):
        sparse(torch.ones(3, device="meta"))


def test_a_path_lost_while_running_breaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(lambda x: acl_save(x * 2, tmp_path / "sub" / "x.pt"), backend="inductor", fullgraph=True)
    compiled(torch.ones(1))
    flush()
    (tmp_path / "sub" / "x_0.pt").unlink()
    (tmp_path / "sub").rmdir()
    (tmp_path / "sub").touch()
    assert [compiled(torch.ones(1)).item() for _ in range(3)] == [2, 2, 2]
    flush()
    (tmp_path / "sub").unlink()
    compiled(torch.ones(1))
    flush()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x_4.pt"]
    assert sum("could not save" in record.getMessage() for record in caplog.records) <= 1


def python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_the_exit_waits_for_the_files(tmp_path: Path) -> None:
    """40 tensors of 1 MB each are still being written when the program ends."""
    script = """
import torch
from msprobe_graph import acl_save
for number in range(40):
    acl_save(torch.full((250_000,), float(number)), "x")
"""
    done = python(script, tmp_path)
    assert done.stderr == ""
    assert [torch.load(tmp_path / f"x_{n}.pt", weights_only=True)[-1].item() for n in range(40)] == list(range(40))
    assert len(list(tmp_path.iterdir())) == 40


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_a_worker_process_saves_and_its_exit_waits_too(tmp_path: Path, start: str) -> None:
    (tmp_path / "worker.py").write_text(
        """
import torch, multiprocessing, sys
from msprobe_graph import acl_save
def work():
    for number in range(10):
        acl_save(torch.full((250_000,), float(number)), "worker/x")
if __name__ == "__main__":
    acl_save(torch.ones(3), "parent/x")
    worker = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    worker.start(); worker.join(); sys.exit(worker.exitcode)
"""
    )
    subprocess.run([sys.executable, "worker.py", start], cwd=tmp_path, timeout=120, check=True)
    assert [saved(tmp_path / "worker" / "x")[n][-1].item() for n in range(10)] == list(range(10))
    assert len(saved(tmp_path / "parent" / "x")) == 1


def test_warm_caches_save_as_cold_ones_do(tmp_path: Path) -> None:
    """The second process takes its code from the caches of the first, and writes into its own working folder."""
    script = """
import torch
from torch._dynamo.utils import counters
from msprobe_graph import acl_save
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
def call(x):
    y = acl_save(model(x).relu(), "hidden")
    return acl_save(y.sum(), "sum")
compiled = torch.compile(call, fullgraph=True)
compiled(torch.ones(2, 4)).backward()
with torch.no_grad():
    compiled(torch.zeros(2, 4))
    compiled(torch.ones(2, 4))
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""
    hits = []
    for folder in ("cold", "warm"):
        done = python(script, tmp_path / folder, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        hits.append([int(count) for count in done.stdout.split()])
    assert hits[0] == [0, 0]
    assert min(hits[1]) >= 1  # the graph without a backward; Inductor caches none with an effect
    for name in ("hidden", "sum"):
        cold, warm = saved(tmp_path / "cold" / name), saved(tmp_path / "warm" / name)
        assert len(cold) == len(warm) == 3
        assert all(torch.equal(*pair) for pair in zip(cold, warm, strict=True))
        assert torch.equal(cold[0], cold[2])
        assert not torch.equal(cold[0], cold[1])
