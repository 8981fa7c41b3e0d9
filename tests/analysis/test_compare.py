"""Where two dumps part: on dumps written as msProbe writes them, and as we do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msprobe_graph.analysis.compare import UNSAID, Comparison, compare, distance, pairs
from msprobe_graph.dump.reader import StepDump

NULL = {"Max": None, "Min": None, "Mean": None, "Norm": None}


def tensor(*shape: int, dtype: str = "torch.float32", **fields: Any) -> dict[str, Any]:
    """A tensor record: a plain one unless `fields` say otherwise."""
    statistics = {"Max": 1.5, "Min": -0.5, "Mean": 0.25, "Norm": 4.0, "requires_grad": False}
    return {"type": "torch.Tensor", "dtype": dtype, "shape": list(shape or (2, 8)), **statistics, **fields}


def lost(reason: str = "fused away") -> dict[str, Any]:
    return {**tensor(**NULL), "shape": None, "reason": reason}


def call(given: Any, made: Any, module: str | None = None, number: int = 0) -> dict[str, Any]:
    site = {} if module is None else {"site": {"module": module, "number": number}}
    return {"input_args": [given], "input_kwargs": {}, "output": [made], **site}


def step(data: dict[str, Any], **manifest: Any) -> StepDump:
    return StepDump(Path("dump"), "statistics", "mix", data, {}, {}, manifest or None)


def compared(*calls: tuple[tuple[Any, Any], tuple[Any, Any]], tolerance: float | None = None) -> Comparison:
    """Of dumps of calls a, b, c ...: each (input and output in A, input and output in B)."""
    a = {f"Torch.{name}.0.forward": call(*one) for name, (one, _) in zip("abcdef", calls, strict=False)}
    b = {f"Torch.{name}.0.forward": call(*other) for name, (_, other) in zip("abcdef", calls, strict=False)}
    return compare(step(a), step(b), tolerance)


def origin(found: Comparison) -> str | None:
    return found.origin.entry if found.origin else None


SAME, OTHER = tensor(), tensor(Max=1.6)


def test_the_first_whose_inputs_agree_and_whose_output_does_not() -> None:
    found = compared(((SAME, SAME), (SAME, SAME)), ((SAME, SAME), (SAME, OTHER)), ((SAME, SAME), (OTHER, OTHER)))
    assert [entry.entry for entry in found.parting] == ["Torch.b.0.forward", "Torch.c.0.forward"]
    assert origin(found) == "Torch.b.0.forward"
    assert [entry.inputs for entry in found.entries] == ["agree", "agree", "part"]


def test_equal_dumps_agree() -> None:
    found = compared(((SAME, SAME), (SAME, SAME)))
    assert not found.parting
    assert origin(found) is None


def test_a_tensor_without_values_is_skipped_and_tells_nothing() -> None:
    found = compared(((SAME, SAME), (lost(), OTHER)), ((SAME, SAME), (SAME, lost())), ((SAME, SAME), (SAME, OTHER)))
    assert [entry.unseen for entry in found.entries] == [["input_args.0"], ["output.0"], []]
    assert [entry.inputs for entry in found.entries] == ["not seen", "agree", "agree"]
    assert origin(found) == "Torch.c.0.forward"


def test_parameters_are_inputs_and_a_modules_gradients_are_no_origin() -> None:
    def data(weight: Any) -> dict[str, Any]:
        return {
            "Module.a.Linear.forward.0": {**call(SAME, weight), "parameters": {"weight": weight}},
            "Module.a.Linear.parameters_grad.0": {"weight": [weight]},
        }

    found = compare(step(data(SAME)), step(data(OTHER)))
    assert [entry.inputs for entry in found.parting] == ["part", "agree"]
    assert origin(found) is None


def test_missing_entries_are_counted_with_the_reasons_of_the_other_dump() -> None:
    data = {f"Torch.{name}.0.forward": call(SAME, SAME) for name in "abc"} | {
        "Module.x.Linear.forward.0": call(SAME, SAME)
    }
    holes = [{"site": "Torch.a.0.forward", "reason": "fused"}, {"site": "Module.x.Linear", "reason": "not run"}]
    found = compare(step(data), step({"Torch.d.0.forward": call(SAME, SAME)}, holes=holes))
    assert found.only_a == {"fused": 1, "not run": 1, UNSAID: 2}
    assert found.only_b == {UNSAID: 1}
    assert found.entries == []


def test_calls_are_joined_by_name() -> None:
    """Also where the sites' numbers differ, which count only what was recorded."""
    a = {f"Tensor.mul.{number}.forward": call(SAME, SAME, "m", number) for number in (0, 1, 2)}
    b = {f"Tensor.mul.{number}.forward": call(SAME, SAME, "m", at) for at, number in enumerate((0, 2))}
    assert set(pairs(step(a), step(b))) == {(name, name) for name in b}


def test_calls_are_joined_by_site_where_their_numbers_mean_other_calls() -> None:
    a = {f"Tensor.mul.{number}.forward": call(SAME, SAME, f"layers.{number}") for number in (0, 1)}
    b = {"Tensor.mul.0.forward": call(SAME, SAME, "")} | {
        f"Tensor.mul.{number + 1}.forward": call(SAME, SAME, f"layers.{number}") for number in (0, 1)
    }
    assert set(pairs(step(a), step(b))) == {
        ("Tensor.mul.1.forward", "Tensor.mul.0.forward"),
        ("Tensor.mul.2.forward", "Tensor.mul.1.forward"),
    }
    assert compare(step(a), step(b)).only_b.total() == 1


def test_dumps_of_msprobe_have_no_sites() -> None:
    a = {f"Tensor.mul.{number}.forward": call(SAME, SAME) for number in (0, 1)}
    assert set(pairs(step(a), step(a))) == {(name, name) for name in a}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (tensor(), tensor(), ("Max", 0.0)),
        (tensor(Mean=0.0), tensor(Mean=0.5), ("Mean", 0.5)),  # of the scale: 4 / sqrt(16) is 1
        (tensor(Min=-0.5), tensor(Min=-0.25), ("Min", 0.25)),
        (tensor(Max=100.0), tensor(Max=99.0), ("Max", 0.01)),  # of itself
        (tensor(Norm=4.0), tensor(Norm=3.0), ("Norm", 0.25)),
        (tensor(2, 8), tensor(8, 2), ("shape", math.inf)),
        (tensor(nan_count=0), tensor(nan_count=1), ("nan_count", math.inf)),
        (tensor(posinf_count=2), tensor(posinf_count=1), ("posinf_count", math.inf)),
        (tensor(md5="0a"), tensor(md5="0a", Max=2.0), ("Max", 0.0)),  # an equal checksum is agreement
        (tensor(md5="0a"), tensor(md5="0b"), ("Max", 0.0)),  # of another one the statistics say how much
        (tensor(md5=0.1, **NULL), tensor(md5=0.2, **NULL), ("md5", math.inf)),
        (tensor(0, 8, **NULL), tensor(0, 8, **NULL), ("Max", 0.0)),
        (tensor(Max=True, Min=False), tensor(Max=True, Min=True), ("Min", 1.0)),
    ],
)
def test_distance(a: dict[str, Any], b: dict[str, Any], expected: tuple[str, float]) -> None:
    assert distance(a, b) == pytest.approx(expected)
    assert distance(b, a)[1] == distance(a, b)[1]


def test_of_tensors_with_equal_counts_of_nan_the_finite_values_are_compared() -> None:
    counts = {"nan_count": 1, "Max": math.nan, "Min": math.nan, "Mean": math.nan, "Norm": math.nan}
    finite = {"finite_Max": 1.0, "finite_Min": 0.0, "finite_Mean": 0.5, "finite_Norm": 2.0}
    assert distance(tensor(**counts, **finite), tensor(**counts, **finite)) == ("Max", 0.0)
    assert distance(tensor(**counts, **finite), tensor(**counts, **{**finite, "finite_Norm": 1.0})) == ("Norm", 0.5)
    assert distance(tensor(**counts), tensor(**counts)) == ("Max", 0.0)


@settings(max_examples=50)
@given(st.integers(1, 50), st.floats(1e-3, 1e3), st.floats(-3, 3))
def test_the_distance_does_not_depend_on_the_scale(size: int, factor: float, change: float) -> None:
    values = torch.linspace(-1, 2, size, dtype=torch.float64)

    def measured(values: torch.Tensor) -> dict[str, Any]:
        extremes = {"Max": values.max().item(), "Min": values.min().item()}
        return tensor(size, **extremes, Mean=values.mean().item(), Norm=values.norm().item())

    other = values + change
    plain, scaled = (distance(measured(values * by), measured(other * by))[1] for by in (1.0, factor))
    assert scaled == pytest.approx(plain, rel=1e-6, abs=1e-12)
    assert plain <= 2


@pytest.mark.parametrize(
    ("dtype", "apart", "parts"),
    [
        ("float32", 5e-5, False),
        ("float32", 5e-4, True),
        ("bfloat16", 5e-3, False),
        ("float16", 5e-2, True),
        ("int64", 5e-5, True),
        ("float64", 5e-8, True),
    ],
)
def test_the_tolerance_is_chosen_by_dtype(dtype: str, apart: float, parts: bool) -> None:
    a, b = (tensor(dtype=f"torch.{dtype}", Max=value) for value in (2.0, 2.0 * (1 + apart)))
    assert bool(compared(((a, a), (a, b))).parting) == parts
    assert bool(compared(((a, a), (a, b)), tolerance=apart / 2).parting)


def test_the_coarsest_dtype_counts_for_all() -> None:
    """A value that is cast up is no more exact than it was."""
    coarse = tensor(dtype="torch.bfloat16")
    found = compared(((coarse, SAME), (coarse, tensor(Max=1.51))))
    assert found.tolerance == 2e-2
    assert not found.parting


def test_dtypes_may_differ() -> None:
    assert not compared(((SAME, SAME), (SAME, tensor(dtype="torch.bfloat16")))).parting


def test_a_position_in_one_dump_only_is_not_seen() -> None:
    a = {"Torch.a.0.forward": call(SAME, SAME)}
    b = {"Torch.a.0.forward": {**call(SAME, OTHER), "input_kwargs": {"mask": SAME}}}
    (entry,) = compare(step(a), step(b)).entries
    assert (entry.inputs, entry.unseen) == ("not seen", ["input_kwargs.mask"])
