"""Rows: numbers, memory, and the moment at which a tensor is read."""

import math
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from msprobe_graph.taps import Rows, Unmeasurable, native, rows
from msprobe_graph.taps.unmeasurable import refuse_unmeasurable


@pytest.fixture(params=["native", "portable"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the C code is not compiled")


def test_rows_are_numbered_from_zero_and_may_outgrow_a_chunk() -> None:
    step = Rows()
    count = 2 * rows.CHUNK + 3
    assert [step.add(torch.tensor([float(number)])) for number in range(count)] == list(range(count))
    assert [statistics.max for statistics in step.fetch()] == [float(number) for number in range(count)]


def test_rows_of_all_kinds_keep_their_places() -> None:
    step = Rows()
    for tensor in (torch.tensor([1, 2]), torch.tensor([3 + 4j]), torch.empty(0), torch.tensor(True), torch.tensor(2.5)):
        step.add(tensor)
    assert [statistics.max for statistics in step.fetch()] == [2, 5.0, None, True, 2.5]


def test_no_rows() -> None:
    assert Rows().fetch() == []


def test_a_later_change_in_place_does_not_alter_a_row() -> None:
    step, tensor = Rows(), torch.ones(8)
    step.add(tensor)
    tensor.fill_(math.nan)
    step.add(tensor)
    tensor.zero_()
    first, second = step.fetch()
    assert (first.max, first.nan_count, second.nan_count) == (1.0, 0, 8)


def test_measuring_makes_no_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    step = Rows()
    step.add(weight)
    step.add((weight * 2).view(3, 1))
    with torch.inference_mode():
        step.add(weight * 3)
    assert weight.grad_fn is None
    assert [statistics.max for statistics in step.fetch()] == [1.0, 2.0, 3.0]


def test_several_threads_may_add() -> None:
    step, numbers = Rows(), []

    def add(value: int) -> None:
        tensor = torch.full((2,), value)
        numbers.extend((step.add(tensor), value) for _ in range(600))

    threads = [threading.Thread(target=add, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = step.fetch()
    assert sorted(number for number, _ in numbers) == list(range(2400))
    assert all(found[number].max == value for number, value in numbers)


class Wrapper(torch.Tensor):
    """A tensor made of another one, as DTensor is."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    def __tensor_flatten__(self) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{func} was called")


class Labelled(torch.Tensor):
    """A tensor that has its own memory, as vLLM's parameters have."""


def freed(offset: int) -> torch.Tensor:
    tensor = torch.ones(100)[offset:]
    tensor.untyped_storage().resize_(0)
    return tensor


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo is not strided"),
        (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr is not strided"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
        (quantized, "torch.qint8"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "fake"),
        (lambda: Wrapper(torch.ones(3)), "Wrapper keeps its values in other tensors"),
        (lambda: freed(0), "freed"),
        (lambda: freed(3), "freed"),
        (lambda: torch._efficientzerotensor(3), "no memory"),
        (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "torch.bits8"),
        (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "torch.float4_e2m1fn_x2"),
    ],
)
def test_a_tensor_without_readable_values_is_refused_with_the_reason(make, reason: str) -> None:  # type: ignore[no-untyped-def]
    step = Rows()
    with pytest.raises(Unmeasurable, match=reason):
        step.add(make())
    assert step.add(torch.ones(1)) == 0


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_tensors_inside_a_transform_are_refused(transform) -> None:  # type: ignore[no-untyped-def]
    step = Rows()

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        with pytest.raises(Unmeasurable, match=r"torch\.func"):
            step.add(tensor)
        return tensor

    transform(inside)(torch.ones(3))


def test_a_subclass_with_memory_of_its_own_is_measured() -> None:
    step = Rows()
    step.add(torch.ones(3).as_subclass(Labelled))
    assert step.fetch()[0].max == 1.0


def test_an_empty_tensor_is_not_refused() -> None:
    for tensor in (torch.empty(0), torch.empty(3, 0)[1:], torch.empty(0, 4).t()):
        refuse_unmeasurable(tensor)
        assert Rows().add(tensor) == 0
