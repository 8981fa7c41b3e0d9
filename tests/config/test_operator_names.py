"""Real functions, called under a real TorchFunctionMode, get the names that the list promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from msprobe_graph.config.operators import OperatorTable, _operator_list

from .conftest import double_, twice


class Arrivals(TorchFunctionMode):
    """The names of what arrives, in order; what a named call calls in its turn doesn't."""

    def __init__(self, table: OperatorTable) -> None:
        super().__init__()
        self.table = table
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = self.table.name(func)
        if name is not None:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


X = torch.tensor([[0.5, 1.5], [2.5, 3.5]])
IMAGE = torch.ones(1, 1, 4, 4)
INDEX = torch.tensor([0, 1])
SLOPE = torch.tensor([0.1])
WHOLE = torch.tensor([1, 2, 3])
TRUTH = torch.tensor([True, False])
STATE = (torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))
RNN_WEIGHTS = [torch.zeros(4, 4), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4)]
RNN = (True, 1, 0.0, False, False, True)
INPUT = torch.ones(1, 3, 4)

CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    # functions of torch.nn.functional, in Python and in C
    "F.linear": (lambda: F.linear(X, X), "Functional.linear"),
    "C._nn.linear": (lambda: torch._C._nn.linear(X, X), "Functional.linear"),
    "F.relu": (lambda: F.relu(X), "Functional.relu"),
    "F.softmax": (lambda: F.softmax(X, -1), "Functional.softmax"),
    "F.gelu": (lambda: F.gelu(X), "Functional.gelu"),
    "F.rms_norm": (lambda: F.rms_norm(X, (2,)), "Functional.rms_norm"),
    "F.one_hot": (lambda: F.one_hot(WHOLE), "Functional.one_hot"),
    "F.embedding": (lambda: F.embedding(INDEX, X), "Functional.embedding"),
    "F.dropout": (lambda: F.dropout(X), "Functional.dropout"),
    "attention": (lambda: F.scaled_dot_product_attention(X, X, X), "Functional.scaled_dot_product_attention"),
    # one function, two names: functional before vf before torch
    "F.conv2d": (lambda: F.conv2d(IMAGE, IMAGE), "Functional.conv2d"),
    "torch.conv2d": (lambda: torch.conv2d(IMAGE, IMAGE), "Functional.conv2d"),
    "torch.prelu": (lambda: torch.prelu(X, SLOPE), "Functional.prelu"),
    "VF.lstm": (lambda: torch._VF.lstm(INPUT, STATE, RNN_WEIGHTS, *RNN), "VF.lstm"),
    "torch.lstm": (lambda: torch.lstm(INPUT, STATE, RNN_WEIGHTS, *RNN), "VF.lstm"),
    # functional names that never ask the mode
    "F.tanh": (lambda: F.tanh(X), "Tensor.tanh"),
    "F.sigmoid": (lambda: F.sigmoid(X), "Tensor.sigmoid"),
    "F.upsample": (lambda: F.upsample(IMAGE, scale_factor=2), "Functional.interpolate"),
    "F.upsample_nearest": (lambda: F.upsample_nearest(IMAGE, scale_factor=2), "Functional.interpolate"),
    # and that dispatch on an argument
    "F.max_pool2d": (lambda: F.max_pool2d(IMAGE, 2), "Functional.max_pool2d"),
    "F.max_pool2d indices": (lambda: F.max_pool2d(IMAGE, 2, return_indices=True), "Functional.max_pool2d"),
    "torch.max_pool2d": (lambda: torch.max_pool2d(IMAGE, 2), "Torch.max_pool2d"),
    # every spelling of a product
    "x * y": (lambda: X * X, "Tensor.mul"),
    "2 * x": (lambda: 2 * X, "Tensor.mul"),
    "x.mul": (lambda: X.mul(X), "Tensor.mul"),
    "x.__mul__": (lambda: X.__mul__(X), "Tensor.mul"),
    "x.__rmul__": (lambda: X.__rmul__(X), "Tensor.mul"),
    "torch.mul": (lambda: torch.mul(X, X), "Torch.mul"),
    # other operators
    "1 + x": (lambda: 1 + X, "Tensor.add"),
    "x - 1": (lambda: X - 1, "Tensor.sub"),
    "1 - x": (lambda: 1 - X, "Tensor.__rsub__"),
    "x / 2": (lambda: X / 2, "Tensor.div"),
    "x // 2": (lambda: X // 2, "Tensor.floor_divide"),
    "x.floor_divide": (lambda: X.floor_divide(2), "Tensor.floor_divide"),
    "x % 2": (lambda: X % 2, "Tensor.remainder"),
    "2 % x": (lambda: 2 % X, "Tensor.__rmod__"),
    "x ** 2": (lambda: X**2, "Tensor.pow"),
    "x.pow": (lambda: X.pow(2), "Tensor.pow"),
    "2 ** x": (lambda: 2**X, "Tensor.__rpow__"),
    "x @ y": (lambda: X @ X, "Tensor.matmul"),
    "-x": (lambda: -X, "Tensor.neg"),
    "+x": (lambda: +X, "Tensor.positive"),
    "abs(x)": (lambda: abs(X), "Tensor.abs"),
    "~t": (lambda: ~TRUTH, "Tensor.bitwise_not"),
    "t & t": (lambda: TRUTH & TRUTH, "Tensor.bitwise_and"),
    "True & t": (lambda: True & TRUTH, "Tensor.bitwise_and"),
    "t | t": (lambda: TRUTH | TRUTH, "Tensor.bitwise_or"),
    "True ^ t": (lambda: True ^ TRUTH, "Tensor.bitwise_xor"),
    "i << 1": (lambda: WHOLE << 1, "Tensor.bitwise_left_shift"),
    "i >> 1": (lambda: WHOLE >> 1, "Tensor.bitwise_right_shift"),
    "x == y": (lambda: X == X, "Tensor.eq"),
    "x.eq": (lambda: X.eq(X), "Tensor.eq"),
    "x != y": (lambda: X != X, "Tensor.ne"),
    "x > 0": (lambda: X > 0, "Tensor.gt"),
    "0 <= x": (lambda: 0 <= X, "Tensor.ge"),  # noqa: SIM300
    "bool(x)": (lambda: bool(X[0, 0] > 0), "Tensor.__getitem__ Tensor.gt Tensor.__bool__"),
    # in place
    "x += 1": (lambda: X.clone().__iadd__(1), "Tensor.clone Tensor.add_"),
    "x *= 1": (lambda: X.clone().__imul__(1), "Tensor.clone Tensor.mul_"),
    "x /= 1": (lambda: X.clone().__itruediv__(1), "Tensor.clone Tensor.div_"),
    "x //= 1": (lambda: X.clone().__ifloordiv__(1), "Tensor.clone Tensor.floor_divide_"),
    "x **= 1": (lambda: X.clone().__ipow__(1), "Tensor.clone Tensor.pow_"),
    "t &= t": (lambda: TRUTH.clone().__iand__(TRUTH), "Tensor.clone Tensor.bitwise_and_"),
    "x[0] = 1": (lambda: X.clone().__setitem__(0, 1.0), "Tensor.clone Tensor.__setitem__"),
    "x.copy_": (lambda: X.clone().copy_(X), "Tensor.clone Tensor.copy_"),
    # methods, properties, and what has no tensor to show
    "x[0]": (lambda: X[0], "Tensor.__getitem__"),
    "x.split": (lambda: X.split(1), "Tensor.split"),
    "x.norm": (lambda: X.norm(), "Tensor.norm"),
    "x.T": (lambda: X.T, "Tensor.T"),
    "x.real": (lambda: X.real, "Tensor.real"),
    "x.stride": (lambda: X.stride(), "Tensor.stride"),
    "x.shape": (lambda: X.shape, ""),
    "x.data": (lambda: X.data, ""),
    "x.grad": (lambda: X.grad, ""),
    "x.size": (lambda: X.size(), ""),
    "x.is_contiguous": (lambda: X.is_contiguous(), ""),
    "x.item": (lambda: WHOLE.sum().item(), "Tensor.sum"),
    "x.detach": (lambda: X.detach(), ""),
    # functions of torch, in Python and in C, and of its modules
    "torch.matmul": (lambda: torch.matmul(X, X), "Torch.matmul"),
    "torch.einsum": (lambda: torch.einsum("ij,jk->ik", X, X), "Torch.einsum"),
    "torch.split": (lambda: torch.split(X, 1), "Torch.split"),
    "torch.where": (lambda: torch.where(X > 0, X, X), "Tensor.gt Torch.where"),
    "torch.cat": (lambda: torch.cat([X, X]), "Torch.cat"),
    "torch.arange": (lambda: torch.arange(3), "Torch.arange"),
    "torch.rand": (lambda: torch.rand(3), "Torch.rand"),
    "torch.zeros": (lambda: torch.zeros(3), ""),
    "torch.unique": (lambda: torch.unique(X), "Torch.unique"),
    "torch.norm": (lambda: torch.norm(X), "Torch.norm"),
    "torch.linalg.norm": (lambda: torch.linalg.norm(X), "Torch.norm"),
    "torch.linalg.vector_norm": (lambda: torch.linalg.vector_norm(X), "Torch.vector_norm"),
    "torch.fft.fft": (lambda: torch.fft.fft(X), "Torch.fft"),
    "torch.special.expit": (lambda: torch.special.expit(X), "Torch.expit"),
    "torch.spmm": (lambda: torch.spmm(X, X), "Torch.mm"),
    # operators of torch.ops: packet, overload, custom op object, one that returns nothing
    "ops.aten.mul": (lambda: torch.ops.aten.mul(X, X), "Aten.mul"),
    "ops.aten.mul.Tensor": (lambda: torch.ops.aten.mul.Tensor(X, X), "Aten.mul"),
    "ops.aten.detach": (lambda: torch.ops.aten.detach(X), ""),
    "ops.custom": (lambda: torch.ops.msprobe_graph_test.twice(X), "msprobe_graph_test.twice"),
    "ops.custom.default": (lambda: torch.ops.msprobe_graph_test.twice.default(X), "msprobe_graph_test.twice"),
    "custom_op": (lambda: twice(X), "msprobe_graph_test.twice"),
    "custom_op in place": (lambda: double_(X.clone()), "Tensor.clone msprobe_graph_test.double_"),
    "ops.prims": (lambda: torch.ops.prims.mul(X, X), ""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_a_call_arrives_under_its_name(call: str, table: OperatorTable) -> None:
    run, names = CALLS[call]
    with Arrivals(table) as arrivals:
        run()
    assert " ".join(arrivals.names) == names


def test_profiling_and_other_machinery_is_left_out(table: OperatorTable) -> None:
    with Arrivals(table) as arrivals, torch.profiler.record_function("a block"):
        pass
    assert arrivals.names == []


def test_every_listed_name_exists_in_this_torch() -> None:
    everything = _operator_list()
    for category in everything.categories.values():
        assert OperatorTable()._list_functions(category, category.names) == []
    for operator in everything.namespaces["aten"].excepted:
        assert hasattr(torch.ops.aten, operator), operator


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (torch.nn.LayerNorm(4), INPUT),
        (torch.nn.RMSNorm(4), INPUT),
        (torch.nn.GroupNorm(1, 3), INPUT),
        (torch.nn.BatchNorm1d(3), INPUT),
        (torch.nn.InstanceNorm1d(3, affine=True, track_running_stats=True), INPUT),
        (torch.nn.EmbeddingBag(3, 2), INDEX[None]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arguments_stand_where_the_module_wrote_them(
    module: torch.nn.Module, inputs: torch.Tensor, table: OperatorTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, written = [], []

    class Arguments(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if (name := table.name(func)) and name.startswith("Functional."):
                arrived.append((name, *table.as_written(name, args, kwargs or {})))
            return func(*args, **(kwargs or {}))

    with Arguments():
        module(inputs)
    (name, args, kwargs) = arrived[0]
    api = name.removeprefix("Functional.")
    original = getattr(F, api)
    monkeypatch.setattr(F, api, lambda *args, **kwargs: written.append((args, kwargs)) or original(*args, **kwargs))
    module(inputs)

    def tensors(values: Any) -> dict[Any, int]:
        return {place: id(value) for place, value in values if isinstance(value, torch.Tensor)}

    assert tensors(enumerate(args)) == tensors(enumerate(written[0][0]))
    assert tensors(kwargs.items()) == tensors(written[0][1].items())


def test_operators_are_named_for_a_dispatch_mode_too(table: OperatorTable) -> None:
    aten = torch.ops.aten
    assert table.aten_name(aten.addmm.default) == "Aten.addmm"
    assert table.aten_name(aten.add_.Tensor) == "Aten.add_"
    assert table.aten_name(aten.detach.default) is None
    assert table.aten_name(torch.ops.msprobe_graph_test.twice.default) == "msprobe_graph_test.twice"
    assert table.name(aten.addmm.default) is table.name(aten.addmm.default)  # remembered


def test_collectives_have_one_name_by_either_mode(table: OperatorTable) -> None:
    assert table.name(torch.distributed.all_reduce) == "Distributed.all_reduce"
    assert table.name(torch.distributed.all_gather_into_tensor) == "Distributed.all_gather_into_tensor"
    assert table.name(torch.ops.c10d.allreduce_.default) == "Distributed.all_reduce"
    assert table.name(torch.ops.c10d._allgather_base_.default) == "Distributed.all_gather_into_tensor"
    assert table.name(torch.ops._c10d_functional.all_reduce) == "Distributed.all_reduce"
    assert table.name(torch.ops.c10d.barrier.default) is None
    assert table.name(torch.ops._c10d_functional.wait_tensor.default) is None
