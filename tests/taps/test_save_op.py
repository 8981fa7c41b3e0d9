"""The save operator: what each kind of tensor becomes, that compilers keep it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from msprobe_graph.taps.save_op import files, refuse

OPERATORS = [torch.ops.msprobe_graph.save, torch.ops.msprobe_graph.save_effect]
save = OPERATORS[0]


def saved(path: Path) -> list[torch.Tensor]:
    """The tensors saved under `path`, in the order of their numbers."""
    files.flush()
    found = list(path.parent.glob(f"{path.name}_*.pt"))
    return [torch.load(path.with_name(f"{path.name}_{number}.pt"), weights_only=True) for number in range(len(found))]


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.randn(3, 5).t(),
    "expanded": lambda: torch.randn(3, 1).expand(3, 1000),
    "strided": lambda: torch.randn(10)[::3],
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.randn(0, 7),
    "bool": lambda: torch.tensor([True, False]),
    "int64": lambda: torch.tensor([2**62, -1]),
    "float64": lambda: torch.randn(3, dtype=torch.float64),
    "not finite": lambda: torch.tensor([float("nan"), float("inf"), -0.0]),
    "float16": lambda: torch.randn(7).half(),
    "bfloat16": lambda: torch.randn(7).bfloat16(),
    "float8_e4m3fn": lambda: torch.randn(7).to(torch.float8_e4m3fn),
    "float8_e5m2": lambda: torch.randn(7).to(torch.float8_e5m2),
    "complex64": lambda: torch.randn(3, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(3, 4, dtype=torch.complex64).conj().t(),
    "negated": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "parameter": lambda: torch.nn.Parameter(torch.randn(3)),
    "requires grad": lambda: torch.randn(3, requires_grad=True) * 2,
}


def bits(x: torch.Tensor) -> list[int]:
    """The values, byte by byte: NaN and -0.0 have their own."""
    values: list[int] = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()
    return values


@pytest.mark.parametrize("kind", TENSORS)
def test_the_file_holds_the_values(tmp_path: Path, kind: str) -> None:
    x = TENSORS[kind]()
    save(x, f"{tmp_path}/x")
    (found,) = saved(tmp_path / "x")
    assert type(found) is torch.Tensor
    assert found.is_contiguous()
    assert not found.requires_grad
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert bits(found) == bits(x)


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    save(torch.zeros(1_000_000)[5:8], f"{tmp_path}/x")
    (found,) = saved(tmp_path / "x")
    assert found.untyped_storage().nbytes() == 12
    assert (tmp_path / "x_0.pt").stat().st_size < 5000


def test_an_inference_tensor_is_saved(tmp_path: Path) -> None:
    with torch.inference_mode():
        save(torch.ones(3).mul_(2), f"{tmp_path}/x")
    assert saved(tmp_path / "x")[0].tolist() == [2, 2, 2]


def test_values_are_those_at_the_call(tmp_path: Path) -> None:
    x = torch.arange(1000.0)
    for _ in range(10):
        save(x, f"{tmp_path}/x")
        x.add_(1)
    assert [tensor[0].item() for tensor in saved(tmp_path / "x")] == list(range(10))


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"a sparse one \(torch.sparse_coo\): save x.to_dense\(\)"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), r"a sparse one \(torch.sparse_csr\)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested one"),
    "meta": (lambda: torch.ones(3, device="meta"), "one on the meta device, which has no values"),
    "wrapper": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "a TwoTensor, which is made of others"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_values_of_its_own_is_refused(kind: str) -> None:
    make, why = REFUSED[kind]
    with pytest.raises(TypeError, match=f"^acl_save takes a dense tensor, not {why}"):
        refuse(make())


class Sine(torch.nn.Module):
    """Saves the sine of its input under `path`."""

    def __init__(self, path: Path, operator: Callable[[torch.Tensor, str], None] = save) -> None:
        super().__init__()
        self.path = str(path)
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        self.operator(y, self.path)
        return y * 2


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_saves_when_it_runs(
    tmp_path: Path, operator: Callable[[torch.Tensor, str], None], strict: bool, decomposed: bool
) -> None:
    exported = torch.export.export(Sine(tmp_path / "x", operator), (torch.ones(3),), strict=strict)
    if decomposed:
        exported = exported.run_decompositions()
    assert saved(tmp_path / "x") == []
    x = torch.randn(3)
    assert torch.equal(exported.module()(x), x.sin() * 2)
    (found,) = saved(tmp_path / "x")
    assert torch.equal(found, x.sin())


def test_a_traced_graph_saves_when_it_runs(tmp_path: Path) -> None:
    graph = make_fx(Sine(tmp_path / "x"), tracing_mode="fake")(torch.ones(3))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph(torch.zeros(3))
    assert [tensor.tolist() for tensor in saved(tmp_path / "x")] == [[0, 0, 0]]


def test_vmap_saves_the_whole_batch_with_its_dimension_in_front(tmp_path: Path) -> None:
    x = torch.randn(3, 4, 5)
    torch.func.vmap(Sine(tmp_path / "x"), in_dims=1)(x)
    torch.func.vmap(torch.func.vmap(Sine(tmp_path / "y")), in_dims=2)(x)
    assert torch.equal(saved(tmp_path / "x")[0], x.sin().movedim(1, 0))
    assert torch.equal(saved(tmp_path / "y")[0], x.sin().movedim(2, 0))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_func_transforms_pass_it_through(
    tmp_path: Path, operator: Callable[[torch.Tensor, str], None], compiled: bool
) -> None:
    x, model = torch.randn(3), Sine(tmp_path / "x", operator)
    gradient = torch.func.grad(lambda x: model(x).sum())
    if compiled:
        gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(x), x.cos() * 2)
    (found,) = saved(tmp_path / "x")
    assert torch.equal(found, x.sin())


def test_forward_mode_and_hessian(tmp_path: Path) -> None:
    x = torch.randn(3)
    out, tangent = torch.func.jvp(Sine(tmp_path / "x"), (x,), (torch.ones(3),))
    assert torch.equal(out, x.sin() * 2)
    assert torch.equal(tangent, x.cos() * 2)
    assert torch.equal(saved(tmp_path / "x")[0], x.sin())
    torch.func.hessian(lambda x: Sine(tmp_path / "h")(x).sum())(x)
    assert torch.equal(saved(tmp_path / "h")[0], x.sin())


@pytest.mark.gpu
def test_on_a_device_values_are_those_of_the_stream_at_the_call(tmp_path: Path) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(4_000_000, device="cuda")
        for _ in range(5):
            save(x, f"{tmp_path}/x")
            x.add_(1)
    found = saved(tmp_path / "x")
    assert [(tensor.min().item(), tensor.max().item()) for tensor in found] == [(n, n) for n in range(5)]


@pytest.mark.gpu
def test_inductor_runs_it_between_its_cuda_graphs(tmp_path: Path) -> None:
    compiled = torch.compile(Sine(tmp_path / "x"), mode="reduce-overhead", fullgraph=True)
    inputs = torch.randn(5, 3, device="cuda")
    for x in inputs:
        compiled(x)
    torch.testing.assert_close(torch.stack(saved(tmp_path / "x")), inputs.sin().cpu())
