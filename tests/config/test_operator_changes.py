"""What add, remove, only and the custom namespaces make of the operator list."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from msprobe_graph.config import OperatorChanges
from msprobe_graph.config.operators import OperatorTable


def test_namespaces_limit_the_custom_operators() -> None:
    none = OperatorTable(namespaces=())
    assert none.name(torch.ops.msprobe_graph_test.twice) is None
    assert none.name(torch.ops.aten.mul) == "Aten.mul"
    named = OperatorTable(namespaces=("msprobe_graph_test", "prims"))
    assert named.name(torch.ops.msprobe_graph_test.twice) == "msprobe_graph_test.twice"
    assert named.name(torch.ops.prims.mul) == "prims.mul"


def test_add() -> None:
    table = OperatorTable(
        OperatorChanges(add={"tensor": ("item", "data"), "aten": ("detach",), "prims": ("mul",), "torch": ("zeros",)})
    )
    assert table.name(torch.Tensor.item) == "Tensor.item"
    assert table.name(torch.Tensor.data.__get__) == "Tensor.data"
    assert table.name(torch.ops.aten.detach.default) == "Aten.detach"
    assert table.name(torch.ops.prims.mul) == "prims.mul"
    assert table.name(torch.zeros) == "Torch.zeros"
    assert table.name(torch.ops.aten.alias) is None
    assert OperatorTable().name(torch.Tensor.item) is None  # tables share nothing


def test_remove_and_what_is_inside_is_seen() -> None:
    table = OperatorTable(OperatorChanges(remove=("Tensor.__mul__", "Torch.*", "msprobe_graph_test.twice", "Aten.mul")))
    assert table.name(torch.Tensor.mul) is None
    assert table.name(torch.Tensor.add) == "Tensor.add"
    assert table.name(torch.matmul) is None
    assert table.name(torch.conv2d) == "Functional.conv2d"
    assert table.name(torch.ops.msprobe_graph_test.twice) is None
    assert table.name(torch.ops.aten.mul.Tensor) is None
    assert table.name(torch.ops.aten.add.Tensor) == "Aten.add"


def test_only() -> None:
    table = OperatorTable(OperatorChanges(only=("Functional.linear", "msprobe_graph_test.*")))
    assert table.name(F.linear) == "Functional.linear"
    assert table.name(F.relu) is None
    assert table.name(torch.ops.msprobe_graph_test.twice) == "msprobe_graph_test.twice"
    assert table.name(torch.ops.aten.mul) is None


def test_operators_that_come_later_may_be_named() -> None:
    OperatorTable(OperatorChanges(remove=("vllm.unified_attention", "_C.*", "NPU.npu_rms_norm", "Aten.*")))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            OperatorChanges(add={"tensr": ("item",)}),
            "operators.add has the category 'tensr', but a category is one of functional, tensor, vf, torch, linalg, "
            "fft, special, distributed, or a namespace of torch.ops of which not all is captured, such as aten; did "
            "you mean 'tensor'?",
        ),
        (
            OperatorChanges(add={"tensor": ("itm",)}),
            "operators.add.tensor names 'itm', which torch.Tensor does not have; did you mean 'item'?",
        ),
        (
            OperatorChanges(add={"aten": ("not_an_operator",)}),
            "operators.add.aten names 'not_an_operator', which torch.ops.aten does not have",
        ),
        (
            OperatorChanges(remove=("Tensor.mull",)),
            "operators.remove names 'Tensor.mull', which is not in the operator list; did you mean 'Tensor.mul'?",
        ),
        (
            OperatorChanges(remove=("mul",)),
            "operators.remove names 'mul', which is not in the operator list; did you mean 'Tensor.mul'?",
        ),
        (
            OperatorChanges(only=("tensor.mul",)),
            "operators.only names 'tensor.mul', which is not in the operator list; did you mean 'Tensor.mul'?",
        ),
        (
            OperatorChanges(only=("Functional.xyzzy*",)),
            "operators.only names 'Functional.xyzzy*', which is not in the operator list",
        ),
        (
            OperatorChanges(only=("Distributed.all_reduc",)),
            "operators.only names 'Distributed.all_reduc', which is not in the operator list; did you mean "
            "'Distributed.all_reduce'?",
        ),
    ],
)
def test_a_wrong_change_is_one_sentence(changes: OperatorChanges, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        OperatorTable(changes)
    assert str(raised.value) == sentence
