from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.dump import reader
from msprobe_graph.dump.reader import StepDump

from .agreement import agreement, relative_error

LINEAR, RELU, OPERATOR = "Module.0.Linear.forward.0", "Module.1.ReLU.forward.0", "Functional.linear.0.forward"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> StepDump:
    """Three modules and two operators."""
    folder = tmp_path_factory.mktemp("dump")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    debugger = PrecisionDebugger({"level": "mix", "risk_level": "ALL"}, task="statistics", dump_path=str(folder))
    x = torch.randn(3, 4)
    with torch.no_grad(), debugger.start(model):
        model(x)
    return reader.read(reader.steps(folder)[0])


def changed(dump: StepDump) -> StepDump:
    """A copy to be changed."""
    return copy.deepcopy(dump)._replace(manifest={"holes": [], "status": "finished"})


def test_a_dump_agrees_with_itself(dump: StepDump) -> None:
    found = agreement(dump, changed(dump))
    assert found.worst == 0
    for level, count in (("L0", 3), ("L1", 2)):
        assert found.coverage[level] == (count, count, 0, (), ())


def test_what_is_missing_must_be_explained(dump: StepDump) -> None:
    compiled = changed(dump)
    del compiled.data[RELU], compiled.data[OPERATOR]["output"]
    assert agreement(dump, compiled).coverage["L0"] == (3, 2, 0, (), (RELU,))
    assert agreement(dump, compiled).coverage["L1"] == (2, 1, 1, (), (f"{OPERATOR} output.0",))
    for sites in ((RELU, OPERATOR), ("Module.1.ReLU", f"{OPERATOR}.output"), ("Module.1", f"{OPERATOR}.output.0")):
        assert compiled.manifest is not None
        compiled.manifest["holes"] = [{"site": site, "reason": "fused away"} for site in sites]
        found = agreement(dump, compiled)
        assert not found.coverage["L0"].unexplained + found.coverage["L1"].unexplained
        assert found.holes == {"fused away": 2}
    compiled.manifest["holes"] = [{"site": site, "reason": "fused away"} for site in ("Module.1.ReL", "Functional.lin")]
    assert agreement(dump, compiled).coverage["L0"].unexplained == (RELU,)


def test_a_record_without_statistics_is_not_whole(dump: StepDump) -> None:
    compiled = changed(dump)
    record = compiled.data[LINEAR]["output"][0]
    record.update(dict.fromkeys(("Max", "Min", "Mean", "Norm")))
    assert agreement(dump, compiled).coverage["L0"] == (3, 2, 1, (), (f"{LINEAR} output.0",))
    record["reason"] = "fused away"
    assert agreement(dump, compiled).coverage["L0"] == (3, 2, 1, (), ())


def test_an_empty_tensor_has_no_statistics_and_may_be_missing_too(dump: StepDump) -> None:
    eager, compiled = changed(dump), changed(dump)
    for step in (eager, compiled):
        step.data[LINEAR]["output"][0].update({"shape": [0], **dict.fromkeys(("Max", "Min", "Mean", "Norm"))})
    assert agreement(eager, compiled).coverage["L0"] == (3, 3, 0, (), ())
    compiled.data[LINEAR]["output"][0].update(shape=None, reason="rewritten away")
    found = agreement(eager, compiled)
    assert found.coverage["L0"] == (3, 2, 1, (), ())
    assert found.worst == 0


def test_what_eager_has_not_is_foreign(dump: StepDump) -> None:
    compiled = changed(dump)
    compiled.data["Module.2.Tanh.forward.0"] = compiled.data[RELU]
    compiled.data[LINEAR]["output"].append(compiled.data[RELU]["output"][0])
    assert agreement(dump, compiled).coverage["L0"].foreign == ("Module.2.Tanh.forward.0", f"{LINEAR} output.1")


def test_the_worst_statistic_is_named(dump: StepDump) -> None:
    compiled = changed(dump)
    compiled.data[LINEAR]["output"][0]["Norm"] *= 1.001
    compiled.data[RELU]["output"][0]["Norm"] *= 1.01
    found = agreement(dump, compiled)
    assert found.worst == pytest.approx(0.01)
    assert found.worst_at == f"{RELU} output.0 Norm"


def record(tensor: torch.Tensor) -> dict[str, Any]:
    finite = tensor[tensor.isfinite()].double()
    statistics = {"Max": finite.max(), "Min": finite.min(), "Mean": finite.mean(), "Norm": finite.norm()}
    values = {key: value.item() for key, value in statistics.items()}
    infinite = {f"finite_{key}": value for key, value in values.items()}
    counts = {"nan_count": int(tensor.isnan().sum()), "posinf_count": int((tensor == math.inf).sum())}
    if any(counts.values()):
        values = {**dict.fromkeys(values, math.nan), **infinite}
    shape = list(tensor.shape)
    return {"dtype": str(tensor.dtype), "shape": shape, **values, **counts, "neginf_count": 0}


def test_errors_are_relative_to_what_a_statistic_can_be_at_most() -> None:
    """A mean near zero does not explode: noise of 1e-6 of each element's size never makes more than about that."""
    torch.manual_seed(0)
    eager = torch.randn(1000)
    eager -= eager.mean()
    assert relative_error(record(eager * (1 + 1e-6 * torch.randn(1000))), record(eager))[0] < 1e-5
    assert relative_error(record(eager + 0.01), record(eager)) == (pytest.approx(0.01, rel=0.05), "Mean")
    assert relative_error(record(eager), record(torch.zeros(1000)))[0] == math.inf
    assert relative_error(record(torch.zeros(1000)), record(torch.zeros(1000)))[0] == 0


def test_the_finite_values_of_a_tensor_with_others_are_compared() -> None:
    eager = torch.tensor([1.0, 2.0, math.inf, math.nan])
    assert relative_error(record(eager), record(eager))[0] == 0
    assert relative_error(record(torch.tensor([1.0, 3.0, math.inf, math.nan])), record(eager))[0] == pytest.approx(0.5)
    assert relative_error(record(torch.tensor([1.0, 2.0, math.inf, 2.0])), record(eager)) == (math.inf, "nan_count")


def test_another_dtype_or_shape_is_infinitely_wrong() -> None:
    eager = record(torch.ones(4))
    assert relative_error(record(torch.ones(4).double()), eager) == (math.inf, "dtype")
    assert relative_error(record(torch.ones(2, 2)), eager) == (math.inf, "shape")
