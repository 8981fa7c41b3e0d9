"""Captures of compiled models: off, one after another, without a debugger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter

from msprobe_graph import PrecisionDebugger, flush, msprobe_backend
from msprobe_graph.dump.reader import StepDump
from msprobe_graph.eager.capture import BEGUN

from ..capturing import Capture, holes, modules
from .conftest import EAGER, Dumped, Net, differences


def graphs() -> int:
    """How many graphs dynamo has compiled."""
    number: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return number


def test_without_capture_nothing_is_compiled_anew_or_recorded(tmp_path: Path, dumped: Dumped) -> None:
    """Between start and stop, before and after: the same compiled graph."""
    counter = CompileCounter()
    model, x = Net().eval(), torch.randn(2, 8)
    debugger = PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"})
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": counter})
    for _ in range(2):
        compiled(x)
    before = torch._dynamo.utils.counters["stats"].copy()
    for _ in range(2):
        debugger.start(compiled)
        compiled(x)
        debugger.stop()
        compiled(x)
        debugger.step()
    compiled(x)
    debugger.flush()
    assert counter.frame_count == 1
    assert torch._dynamo.utils.counters["stats"] == before
    found = dumped()
    assert [list(step.data) for step in found.values()] == [list(found[0].data)] * 2
    assert modules(found[0]) == [name for name in modules(found[0]) if name.endswith(".forward.0")]
    assert len(modules(found[0])) == 10


def test_one_debugger_after_another(tmp_path: Path, dumped: Dumped) -> None:
    """The compiled graph stays; who captures is asked when it runs."""
    model, x = Net().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    for name in ("first", "second"):
        debugger = PrecisionDebugger({"dump_path": str(tmp_path / name), "level": "mix", "risk_level": "ALL"})
        with debugger.start(compiled):
            compiled(x)
    assert graphs() == 1
    assert differences(dumped("first")[0], dumped("second")[0]) == []


def test_a_debugger_that_was_not_started_captures_nothing(tmp_path: Path) -> None:
    PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix"})
    model, x = Net().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    assert torch.equal(compiled(x), model(x))
    flush()
    assert not (tmp_path / "dump").exists()


def test_without_a_debugger_all_is_step0(tmp_path: Path, capture: Capture, dumped: Dumped) -> None:
    settings = {"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"}
    model, x = Net().eval(), torch.randn(2, 8)
    inputs = [x, x + 1, x + 2]
    eager = capture(model, lambda: [model(each) for each in inputs])
    compiled = torch.compile(model, backend="msprobe", options={**EAGER, "config_path": settings})
    for each in inputs:
        compiled(each)
    flush()
    found = dumped()
    assert list(found) == [0]
    assert inside(found[0]) == inside(eager)
    assert "Module.head.Linear.forward.2" in found[0].data
    # The outermost call runs when capture begins, in the middle of it: it counts, and it is not seen.
    assert "Module.Net.forward.0" not in found[0].data
    assert holes(found[0])["Module.Net.forward.0"] == BEGUN
    assert found[0].data["Module.Net.forward.1"]["output"] == eager.data["Module.Net.forward.1"]["output"]


def test_several_models_share_a_config_and_step0(tmp_path: Path, dumped: Dumped) -> None:
    settings = {"dump_path": str(tmp_path / "dump"), "level": "L1", "risk_level": "ALL"}
    x = torch.randn(2, 8)
    options = {**EAGER, "config_path": settings}
    one = torch.compile(lambda x: torch.sin(x), backend="msprobe", options=options)
    other = torch.compile(lambda x: torch.sin(x) * 2, backend="msprobe", options=options)
    one(x)
    other(x)
    one(x)
    flush()
    names = ["Torch.sin.0.forward", "Torch.sin.1.forward", "Tensor.mul.0.forward", "Torch.sin.2.forward"]
    assert list(dumped()[0].data) == names


def inside(step: StepDump) -> dict[str, Any]:
    """All entries but the root's own, with their values."""
    return {
        name: {key: part for key, part in entry.items() if key != "site"}
        for name, entry in step.data.items()
        if not name.startswith("Module.Net.")
    }
