"""msProbe's own tools read our dumps: compare, overflow_check, graph_visualize."""

from __future__ import annotations

import csv
import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msprobe_graph import PrecisionDebugger

pytestmark = [pytest.mark.msprobe, pytest.mark.slow]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x)) + self.fc(x)


class Model(nn.Module):
    """Two residual blocks; what stands between them is up to the test."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.between(self.blocks[0](x))))


def dump(
    path: Path,
    between: Callable[[Tensor], Tensor] = lambda x: x,
    scale: float = 1.0,
    rank: int | None = 0,
    **settings: Any,
) -> Path:
    """One training step of the model, its second layer's weight scaled; returns the folder of the step."""
    torch.manual_seed(0)
    model = Model(between)
    with torch.no_grad():
        model.blocks[1].fc.weight.mul_(scale)
    debugger = PrecisionDebugger({"dump_path": str(path), "level": "mix", "risk_level": "ALL", **settings})
    debugger.start(model, rank_id=rank)
    model(torch.randn(2, 8)).sum().backward()
    debugger.stop()
    debugger.step()
    debugger.flush()
    return path / "step0"


def run(msprobe: Path, *arguments: object) -> None:
    finished = subprocess.run(
        [msprobe, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, cwd=msprobe.parent
    )
    said = finished.stdout + finished.stderr
    complaints = [line for line in said.splitlines() if "[ERROR]" in line and "CANN environment" not in line]
    assert finished.returncode == 0, said[-3000:]
    assert complaints == []
    assert "Traceback" not in said, said[-3000:]


def compared(msprobe: Path, target: Path, golden: Path, out: Path) -> list[dict[str, str]]:
    run(msprobe, "compare", "-tp", target, "-gp", golden, "-o", out)
    (result,) = out.glob("compare_result*.csv")
    with result.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def tensor_names(step: Path) -> set[str]:
    """The names of a step's tensors as compare calls them."""
    (process,) = step.iterdir()
    kinds = {"input_args": "input", "input_kwargs": "input"}
    found = set()
    for entry, record in json.loads((process / "dump.json").read_text())["data"].items():
        for part in ("input_args", "input", "output", "parameters"):
            values = record.get(part, [])
            for key, value in values.items() if isinstance(values, dict) else enumerate(values):
                if isinstance(value, dict) and value.get("type") == "torch.Tensor":
                    found.add(f"{entry}.{kinds.get(part, part)}.{key}")
    return found


@pytest.mark.parametrize("task", ["statistics", "tensor"])
@pytest.mark.parametrize("rank", [0, None], ids=["rank", "proc"])
def test_compare_reads_every_tensor_and_finds_the_changed_layer(
    msprobe: Path, tmp_path: Path, task: str, rank: int | None
) -> None:
    ours, other = dump(tmp_path / "a", task=task, rank=rank), dump(tmp_path / "b", task=task, rank=rank, scale=3.0)
    rows = compared(msprobe, ours, other, tmp_path / "out")
    by_name = {row["NPU Name"]: row for row in rows}
    missing = tensor_names(ours) - by_name.keys()
    assert missing == set()
    assert all(row["NPU Name"] == row["Bench Name"] for row in rows)
    assert all(row["Requires_grad Consistent"] == "True" for row in rows)

    same, changed = by_name["Functional.linear.0.forward.output.0"], by_name["Functional.linear.2.forward.output.0"]
    if task == "statistics":
        assert float(same["Max diff"]) == float(same["L2norm diff"]) == 0
        assert abs(float(changed["L2norm diff"])) > 0.1
        entries = json.loads((ours / ("rank0" if rank == 0 else next(ours.iterdir()).name) / "dump.json").read_text())
        measured = entries["data"]["Functional.linear.2.forward"]["output"][0]
        assert float(changed["NPU l2norm"]) == pytest.approx(measured["Norm"])
        assert float(changed["NPU max"]) == pytest.approx(measured["Max"])
    else:
        assert float(same["MaxAbsErr"]) == 0
        assert float(changed["MaxAbsErr"]) > 0.1
    assert {row["Result"] for name, row in by_name.items() if name.startswith("Module.blocks.0.")} == {"pass"}
    assert any(row["Result"] != "pass" for name, row in by_name.items() if name.startswith("Module.blocks.1."))


@pytest.mark.parametrize("summary_mode", ["md5", "xor"])
def test_compare_reads_checksums(msprobe: Path, tmp_path: Path, summary_mode: str) -> None:
    block = {"summary_mode": summary_mode}
    ours, other = dump(tmp_path / "a", statistics=block), dump(tmp_path / "b", statistics=block, scale=3.0)
    rows = {row["NPU Name"]: row["Result"] for row in compared(msprobe, ours, other, tmp_path / "out")}
    assert tensor_names(ours) <= rows.keys()
    assert rows["Functional.linear.0.forward.output.0"] == "pass"
    assert rows["Functional.linear.2.forward.output.0"] != "pass"


def strange(x: Tensor) -> Tensor:
    """NaN and both infinities, an empty and a 0-d tensor, a complex one, a dtype, a slice and an int that is huge."""
    torch.stack([x.sum() / 0, -x.sum().abs() / 0, (x.sum() * 0) / 0])
    torch.clamp(torch.view_as_complex(x.detach().reshape(-1, 2)).abs(), max=2**53)
    x[:0].sum()
    x[0:1, ..., None].to(torch.bfloat16)
    torch.full_like(x, float("-inf"))
    return x


def test_compare_reads_nan_infinities_and_every_kind_of_argument(msprobe: Path, tmp_path: Path) -> None:
    ours, other = dump(tmp_path / "a", strange), dump(tmp_path / "b", strange)
    rows = {row["NPU Name"]: row for row in compared(msprobe, ours, other, tmp_path / "out")}
    infinite = rows["Torch.full_like.0.forward.output.0"]
    assert float(infinite["NPU max"]) == float("-inf")
    assert float(infinite["NPU l2norm"]) == float("inf")
    assert rows["Torch.stack.0.forward.output.0"]["NPU max"].lower() == "nan"


def test_overflow_check_names_the_entry_that_made_the_nan(msprobe: Path, tmp_path: Path) -> None:
    step = dump(tmp_path / "dump", lambda x: torch.log(-x.abs()))
    run(msprobe, "overflow_check", "-i", step, "-o", tmp_path / "out")
    (result,) = (tmp_path / "out").glob("anomaly_analyze*.json")
    first = json.loads(result.read_text())["rank_0"][0]
    assert first["op_name"] == "Torch.log.0.forward"
    assert first["construct_info"] == ["Module.Model.forward.0", "Torch.log.0.forward"]
    assert any("torch.log" in frame for frame in first["stack_info"])


def test_overflow_check_finds_nothing_in_a_clean_dump(msprobe: Path, tmp_path: Path) -> None:
    run(msprobe, "overflow_check", "-i", dump(tmp_path / "dump"), "-o", tmp_path / "out")
    assert list((tmp_path / "out").glob("anomaly_analyze*.json")) == []


def test_graph_visualize_draws_every_entry_under_its_parent(msprobe: Path, tmp_path: Path) -> None:
    process = dump(tmp_path / "dump") / "rank0"
    run(msprobe, "graph_visualize", "-tp", process, "-o", tmp_path / "out")
    (database,) = (tmp_path / "out").glob("build_*.vis.db")
    with sqlite3.connect(database) as connection:
        drawn = dict(connection.execute("select node_name, up_node from tb_nodes").fetchall())
    construct = json.loads((process / "construct.json").read_text())
    assert construct.keys() <= drawn.keys()
    for entry, parent in construct.items():
        # Only a forward entry that stands alone is drawn elsewhere: under the model, or in a group of its own.
        if parent is not None:
            assert drawn[entry] == parent


def test_graph_visualize_compares_two_dumps(msprobe: Path, tmp_path: Path) -> None:
    ours, other = dump(tmp_path / "a") / "rank0", dump(tmp_path / "b", scale=3.0) / "rank0"
    run(msprobe, "graph_visualize", "-tp", ours, "-gp", other, "-o", tmp_path / "out")
    (database,) = (tmp_path / "out").glob("compare_*.vis.db")
    with sqlite3.connect(database) as connection:
        nodes = connection.execute("select node_name, matched_node_link from tb_nodes where data_source = 'NPU'")
        links = dict(nodes.fetchall())
    unmatched = [name for name in json.loads((ours / "construct.json").read_text()) if not json.loads(links[name])]
    assert unmatched == []
