"""Every call that msProbe's eager capture records, ours records too: same order, same tensors, same values."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph import PrecisionDebugger
from msprobe_graph.config.operators import OperatorTable

from .models import CASES
from .parity import Difference, Record, compare, read_entries

HERE = Path(__file__).parent
STEPS = {name: number for number, name in enumerate(CASES)}

Entries = Mapping[str, Mapping[str, Record]]
"""By case, then by entry name."""


@pytest.fixture(scope="module", params=["L0", "L1", "mix"])
def level(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(scope="module")
def theirs(level: str, msprobe: Path, tmp_path_factory: pytest.TempPathFactory) -> Entries:
    dump = tmp_path_factory.mktemp(f"msprobe_{level}")
    command = [msprobe.with_name("python"), "-B", HERE / "run_msprobe.py", level, dump]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return {name: read_entries(dump / f"step{number}") for name, number in STEPS.items()}


@pytest.fixture(scope="module")
def ours(level: str, tmp_path_factory: pytest.TempPathFactory) -> Entries:
    dump = tmp_path_factory.mktemp(f"ours_{level}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in msProbe's run: how a sum is split among threads decides its last bits
    debugger = PrecisionDebugger(
        {"task": "statistics", "dump_path": str(dump), "level": level, "risk_level": "ALL", "statistics": {}}
    )
    for case in CASES.values():
        torch.manual_seed(0)
        model, step = case()
        debugger.start(model)
        step()
        debugger.stop()
        debugger.step()
    debugger.flush()
    torch.set_num_threads(threads)
    return {name: read_entries(dump / f"step{number}") for name, number in STEPS.items()}


# Where modules are hooked, msProbe hands a module copies of its inputs and outputs, and that changes the program:
PERTURBED = {
    # in MultiheadAttention `key is value` no longer holds, so it transposes three tensors in place of one;
    "encoder": re.compile(r"Tensor[.]transpose[.]\d+[.]\w+|Module[.].*[.]MultiheadAttention[.]backward[.]0"),
    # an in-place ReLU acts on a view, whose backward is CopySlices' (at L1 msProbe has what we have).
    "cnn": re.compile(r"Functional[.]relu[.]0[.]backward"),
}


@pytest.mark.msprobe
@pytest.mark.parametrize("case", CASES)
def test_nothing_that_msprobe_records_is_missing(case: str, level: str, theirs: Entries, ours: Entries) -> None:
    perturbed = PERTURBED.get(case) if level != "L1" else None
    expected = {
        entry: record for entry, record in theirs[case].items() if perturbed is None or not perturbed.fullmatch(entry)
    }
    differences = compare(expected, dict(ours[case]), OperatorTable().fold)
    assert differences == [], "\n".join(f"{entry}: {reason}" for entry, reason in differences)


def _tensor(value: float, **changes: Any) -> Record:
    statistics = {"Max": value, "Min": value, "Mean": value, "Norm": 2 * value}
    described = {"type": "torch.Tensor", "dtype": "torch.float32", "shape": [4]}
    return {**described, **statistics, "requires_grad": False, **changes}


def _call(value: float, out: float, **changes: Any) -> Record:
    return {"input_args": [_tensor(value)], "input_kwargs": {}, "output": [_tensor(out, **changes)]}


THEIRS = {
    "Tensor.__mul__.0.forward": _call(1.0, 2.0),
    "Tensor.mul.0.forward": _call(2.0, 4.0),
    "Module.fc.Linear.forward.0": _call(4.0, 1.0) | {"parameters": {"weight": _tensor(0.5)}},
    "Tensor.mul.0.backward": {"input": [_tensor(1.0)], "output": [_tensor(3.0), None]},
    "Tensor.__mul__.0.backward": {"input": [_tensor(3.0)], "output": [None, _tensor(5.0)]},
}
OURS = {
    "Tensor.mul.0.forward": THEIRS["Tensor.__mul__.0.forward"],
    "Tensor.mul.1.forward": _call(7.0, 7.0),  # one that msProbe doesn't see
    "Tensor.mul.2.forward": THEIRS["Tensor.mul.0.forward"],
    "Module.fc.Linear.forward.0": THEIRS["Module.fc.Linear.forward.0"],
    "Tensor.mul.2.backward": THEIRS["Tensor.mul.0.backward"],
    "Tensor.mul.0.backward": THEIRS["Tensor.__mul__.0.backward"],
}


def _compared(ours: dict[str, Record]) -> list[Difference]:
    return compare(THEIRS, ours, OperatorTable().fold)


def test_parity_of_equal_dumps() -> None:
    assert _compared(OURS) == []


def test_parity_finds_what_is_missing() -> None:
    without = {entry: record for entry, record in OURS.items() if entry != "Tensor.mul.2.backward"}
    assert _compared(without) == [Difference("Tensor.mul.0.backward", "missing")]


def test_parity_finds_another_value() -> None:
    (difference,) = _compared(OURS | {"Tensor.mul.0.forward": _call(1.0, 2.00001)})
    assert difference.entry == "Tensor.__mul__.0.forward"
    assert "output.0: Max 2.00001, there 2.0" in difference.reason
    assert _compared(OURS | {"Tensor.mul.0.forward": _call(1.0, 2.0000001)}) == []


def test_parity_finds_another_dtype_place_or_number_of_tensors() -> None:
    record = OURS["Tensor.mul.0.forward"]
    for changed, reason in [
        (_call(1.0, 2.0, dtype="torch.float64"), "dtype torch.float64, there torch.float32"),
        (record | {"input_args": [], "input_kwargs": {"other": _tensor(1.0)}}, "no tensor at input_args.0"),
        (record | {"output": [_tensor(2.0), _tensor(2.0)]}, "more tensors in output: ['1']"),
    ]:
        (difference,) = _compared(OURS | {"Tensor.mul.0.forward": changed})
        assert reason in difference.reason


def test_parity_finds_another_order() -> None:
    entries = list(OURS)
    entries.insert(0, entries.pop(entries.index("Module.fc.Linear.forward.0")))
    (difference,) = _compared({entry: OURS[entry] for entry in entries})
    assert difference.entry == "Module.fc.Linear.forward.0"
    assert difference.reason.startswith("out of order")


def test_parity_finds_a_backward_of_the_wrong_call() -> None:
    swapped = OURS | {
        "Tensor.mul.0.backward": OURS["Tensor.mul.2.backward"],
        "Tensor.mul.2.backward": OURS["Tensor.mul.0.backward"],
    }
    assert {difference.entry for difference in _compared(swapped)} == {
        "Tensor.mul.0.backward",
        "Tensor.__mul__.0.backward",
    }
