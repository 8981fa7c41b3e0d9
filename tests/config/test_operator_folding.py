"""Every spelling that msProbe lists folds to one name of ours, and has msProbe's risk."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch.overrides import get_overridable_functions

from msprobe_graph.config.operators import OperatorTable

PREFIXES = ("Functional", "Tensor", "Torch", "VF", "Distributed")
MSPROBE = yaml.safe_load(Path(__file__).with_name("msprobe_apis.yaml").read_text(encoding="utf-8"))
MSPROBE_NAMES = [f"{prefix}.{api}" for prefix in PREFIXES for api in MSPROBE[prefix]]
# Listed by msProbe, invisible to a function mode; docs/operators.md gives the reasons.
UNSEEN = {
    "Tensor.__rdiv__",
    "Tensor.eig",
    "Tensor.lstsq",
    "Tensor.solve",
    "Tensor.symeig",
    "Torch.symeig",
    "Torch.range",
}


def test_folding_is_idempotent_and_total_over_msprobes_names(table: OperatorTable) -> None:
    captured = {name for name in table._names.values() if name is not None}
    folded = {name: table.fold(name) for name in MSPROBE_NAMES}
    assert {name for name, ours in folded.items() if ours not in captured} == UNSEEN
    assert all(table.fold(ours) == ours for ours in [*folded.values(), *captured])
    assert len(MSPROBE_NAMES) > 1000


@pytest.mark.parametrize(
    ("spelling", "ours"),
    [
        ("Tensor.__rmul__", "Tensor.mul"),
        ("Tensor.mul", "Tensor.mul"),
        ("Tensor.__idiv__", "Tensor.div_"),
        ("Functional.tanh", "Tensor.tanh"),
        ("Functional.upsample_bilinear", "Functional.interpolate"),
        ("Torch.conv1d", "Functional.conv1d"),
        ("Torch.gru", "VF.gru"),
        ("Distributed._all_gather_base", "Distributed.all_gather_into_tensor"),
        ("vllm.unified_attention", "vllm.unified_attention"),
    ],
)
def test_spellings_fold(spelling: str, ours: str, table: OperatorTable) -> None:
    assert table.fold(spelling) == ours


def test_risk_is_msprobes_on_our_names(table: OperatorTable) -> None:
    ours, theirs = {}, {}
    for name in MSPROBE_NAMES:
        api = name.partition(".")[2]
        theirs[name] = "core" if api in MSPROBE["risk"]["core"] else "low" if api in MSPROBE["risk"]["low"] else "focus"
        ours[name] = table.risk(name)
    differing = {name: ours[name] for name in ours if ours[name] != theirs[name] and name not in UNSEEN}
    assert differing == {
        "Functional.linear": "core",  # "chain_matmul" "linear": a comma is missing in msProbe's list
        "Torch.chain_matmul": "core",
        "Torch.multi_dot": "core",  # listed there as linalg.multi_dot, a name that no entry bears
        "Torch.vecdot": "core",
        "Torch.dsmm": "core",  # is mm
        "Torch.spmm": "core",
        "Tensor.__nonzero__": "low",  # is __bool__
    }
    assert table.risk("Distributed.all_reduce_coalesced") == "core"
    assert table.risk("vllm.unified_attention") == "focus"


def test_what_a_captured_python_function_hides_is_no_more_than_msprobe_hides(table: OperatorTable) -> None:
    """Listing a Python function hides what it calls, so those that msProbe doesn't list must call nothing it lists."""
    known = {"Functional.rms_norm", "Torch.meshgrid", "Torch.unique"}
    extra = set()
    for functions in get_overridable_functions().values():
        for func in functions:
            name = table.name(func)
            if hasattr(func, "__code__") and name is not None:
                spelled = {spelling for spelling in MSPROBE_NAMES if table.fold(spelling) == name}
                if not spelled:
                    extra.add(name)
    assert extra == known
