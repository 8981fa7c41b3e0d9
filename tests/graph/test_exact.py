"""The exact pass: generated code and results stay what they were, and what is tapped is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from msprobe_graph.graph.exact import REASONS, ExactPass
from msprobe_graph.graph.plan import value_id
from msprobe_graph.graph.stamps import Wanted

from .inserted import Block, Convolutional, Mixed, Run, assert_accounted, assert_right


def transformer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).to(dtype), [torch.randn(2, 16, 64).to(dtype)]


def assert_unchanged(plain: Run, tapped: Run) -> None:
    assert plain.functions()
    assert tapped.functions() == plain.functions()
    assert len(tapped.results) == len(plain.results)
    assert all(torch.equal(one, other) for one, other in zip(plain.results, tapped.results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_transformer_is_compiled_as_ever(dtype: torch.dtype, train: bool) -> None:
    model, inputs = transformer(dtype)
    tapped = Run(model, inputs, "exact", train)
    assert_unchanged(Run(model, inputs, None, train), tapped)
    assert_right(tapped, train, 1e-4 if dtype is torch.float32 else 5e-2)
    assert_accounted(tapped)
    assert tapped.share() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_dynamic_shapes(train: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Block(), [torch.randn(2, 16, 64)]
    tapped = Run(model, inputs, "exact", train, dynamic=True)
    assert_unchanged(Run(model, inputs, None, train, dynamic=True), tapped)
    assert_right(tapped, train)
    assert tapped.share() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_in_place_operations_views_and_several_outputs(train: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Mixed(), [torch.randint(0, 50, (2, 8))]
    tapped = Run(model, inputs, "exact", train)
    assert_unchanged(Run(model, inputs, None, train), tapped)
    assert_right(tapped, train)
    assert_accounted(tapped)


@pytest.mark.slow
def test_convolutions() -> None:
    torch.manual_seed(0)
    model, inputs = Convolutional().eval(), [torch.randn(2, 3, 16, 16)]
    tapped = Run(model, inputs, "exact")
    assert_unchanged(Run(model, inputs, None), tapped)
    assert_right(tapped)


@torch.library.custom_op("msprobe_graph_test::scale_into", mutates_args=("out",))
def scale_into(out: torch.Tensor, x: torch.Tensor, by: float) -> None:
    out.copy_(x * by)


def test_an_operator_that_writes_its_argument() -> None:
    class Writing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x)
            torch.ops.msprobe_graph_test.scale_into(out, x.sin(), 3.0)
            return out.cos() @ out

    run = Run(Writing(), [torch.randn(8, 8)], "exact")
    written = next(at for at, node in enumerate(run.nodes) if "scale_into" in str(node.target))
    torch.testing.assert_close(run.received.values[value_id(written, 1)], run.args[0].sin() * 3)
    empty = next(at for at, node in enumerate(run.nodes) if node.target is torch.empty_like)
    assert 2 * empty not in run.received.values


def test_the_report_tells_what_was_done() -> None:
    run = Run(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), [torch.randn(4, 8)], "exact")
    (report,), (note,) = run.exact.reports, run.received.notes
    assert report.graph == note["graph"] == "inference"
    assert set(report.tapped) == set(run.received.values)
    assert set(report.missing.values()) <= REASONS.keys()
    assert {int(id): reason for id, reason in note["missing"].items()} == report.missing
    added = [name for name in report.after if name not in report.before]
    assert [name for name in report.after if name in report.before] == report.before
    calls = [line for code in run.code for line in code.splitlines() if "msprobe_graph_tap([" in line]
    assert len(added) == len(calls)
    assert (note["nodes_before"], note["nodes_after"]) == (len(report.before), len(report.after))


def test_the_user_s_pass_runs_and_without_its_uuid_the_caches_are_bypassed() -> None:
    wanted = {0: Wanted(0, (1,), torch.float32)}
    assert ExactPass(wanted, "one").uuid() == ExactPass(wanted, "one").uuid() != ExactPass(wanted, "two").uuid()
    seen = []

    def theirs(nodes: list[object]) -> list[object]:
        seen.append(len(nodes))
        return nodes

    ours = ExactPass({}, "one", theirs)
    assert ours.uuid() is None
    assert ours([1, 2]) == [1, 2]
    assert seen == [2]


WARM = """
import torch
from torch import nn
from inserted import Run
torch.manual_seed(0)
run = Run(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), [torch.ones(4, 8)], "exact", patches={})
values = [(id, value.sum().item()) for id, value in sorted(run.received.values.items())]
print(len(run.exact.reports), [note["graph"] for note in run.received.notes], values)
"""


@pytest.mark.slow
def test_with_warm_caches_the_taps_come_without_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    runs = [
        subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        for _ in range(2)
    ]
    compiled, cached = (run.split(" ", 1) for run in runs)
    assert (compiled[0], cached[0]) == ("1", "0")
    assert "inference" in cached[1]
    assert compiled[1] == cached[1]
