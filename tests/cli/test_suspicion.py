"""Which tensors are marked, and why: on dumps written as msProbe writes them, and as we do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from msprobe_graph.analysis.suspicion import suspicions
from msprobe_graph.dump.reader import read

from .conftest import forward, tensor, write_step

NAN = {"Max": math.nan, "Min": math.nan, "Mean": math.nan, "Norm": math.nan}
INF = {"Max": math.inf, "Mean": math.inf, "Norm": math.inf}
MASK = {"Max": 0.0, "Min": -math.inf, "Mean": -math.inf, "Norm": math.inf}
NULL = {"Max": None, "Min": None, "Mean": None, "Norm": None}


def marks(folder: Path) -> dict[str, str]:
    """What is said of each suspicious tensor, by ``entry position``; origins end in ``!``."""
    return {
        f"{tensor.entry.rsplit('.', 2)[0]} {tensor.position}": suspicion.reason + "!" * suspicion.origin
        for tensor, suspicion in suspicions(read(folder))
        if suspicion
    }


def marks_of(folder: Path, *calls: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, str]:
    """Of a dump of calls a, b, c ... with one input and one output each."""
    data = {f"Torch.{name}.0.forward": forward(*call) for name, call in zip("abcdef", calls, strict=False)}
    return marks(write_step(folder / "step0" / "rank0", data))


def test_words_of_msprobe_are_read(tmp_path: Path) -> None:
    folder = write_step(tmp_path / "step0" / "rank0", {"Torch.a.0.forward": forward(tensor(), tensor(**NAN))})
    assert '"Max": NaN' in (folder / "dump.json").read_text()
    assert marks(folder) == {"Torch.a output.0": "makes the first NaN!"}


def test_origin_and_what_follows(tmp_path: Path) -> None:
    assert marks_of(tmp_path, (tensor(), tensor(**NAN)), (tensor(**NAN), tensor(**NAN)), (tensor(), tensor(**NAN))) == {
        "Torch.a output.0": "makes the first NaN!",
        "Torch.b input_args.0": "NaN",
        "Torch.b output.0": "NaN",
        "Torch.c output.0": "NaN, not in its input",
    }


def test_a_mask_does_not_hide_the_first_nan(tmp_path: Path) -> None:
    assert marks_of(tmp_path, (tensor(), tensor(**MASK)), (tensor(**MASK), tensor(**NAN))) == {
        "Torch.a output.0": "makes the first Inf!",
        "Torch.b input_args.0": "Inf",
        "Torch.b output.0": "makes the first NaN!",
    }


def test_nan_that_comes_with_the_input_has_no_origin(tmp_path: Path) -> None:
    """Nor has the Inf that a call makes of it."""
    assert marks_of(tmp_path, (tensor(**NAN), tensor(**INF))) == {
        "Torch.a input_args.0": "NaN",
        "Torch.a output.0": "Inf",
    }


def test_parameters_are_inputs(tmp_path: Path) -> None:
    entry = {**forward(tensor(), tensor(**NAN)), "parameters": {"weight": tensor(**NAN)}}
    folder = write_step(tmp_path / "step0" / "rank0", {"Module.a.Linear.forward.0": entry})
    assert sorted(marks(folder).values()) == ["NaN", "NaN"]


def test_gradients(tmp_path: Path) -> None:
    data = {
        "Torch.sqrt.0.backward": {"input": [tensor(), None], "output": [tensor(**INF), None]},
        "Module.a.Linear.parameters_grad.0": {"weight": [tensor(**INF)]},
    }
    assert list(marks(write_step(tmp_path / "step0" / "rank0", data)).values()) == [
        "makes the first Inf!",
        "Inf, not in its input",
    ]


def test_zero_outputs(tmp_path: Path) -> None:
    zero = {"Max": 0.0, "Min": -0.0, "Mean": 0.0, "Norm": 0.0}
    integers = tensor(4, dtype="torch.int64", **{**zero, "Max": 0, "Min": 0})
    assert marks_of(
        tmp_path, (tensor(**zero), tensor(**zero)), (tensor(), tensor(1, **zero)), (tensor(), integers)
    ) == {"Torch.a output.0": "all zero"}


@pytest.mark.parametrize(
    ("dtype", "value", "marked"),
    [
        ("float16", 60000.0, True),
        ("float16", 30000.0, False),
        ("bfloat16", 60000.0, False),
        ("bfloat16", -3e38, True),
        ("float32", 3e38, False),
        ("float8_e4m3fn", 448.0, False),
    ],
)
def test_near_the_largest_value(tmp_path: Path, dtype: str, value: float, marked: bool) -> None:
    edge = tensor(dtype=f"torch.{dtype}", Max=max(value, 0.0), Min=min(value, 0.0), Norm=math.inf)
    expected = {"Torch.a output.0": f"near the largest {dtype}"} if marked else {}
    assert marks_of(tmp_path, (tensor(), edge)) == expected


def test_null_is_nan_only_where_msprobe_measures(tmp_path: Path) -> None:
    """Its graph mode writes NaN as null; its eager mode so writes what it can't measure."""
    assert marks_of(
        tmp_path,
        (tensor(0, 3, **NULL), tensor(0, 3, **NULL)),
        (tensor(dtype="torch.float8_e4m3fn", **NULL), tensor(md5="00c0ffee", **NULL)),
        (tensor(), tensor(**NULL)),
    ) == {"Torch.c output.0": "makes the first NaN!"}


def test_counts_are_believed(tmp_path: Path) -> None:
    """As in our dumps, where NaN is written as a string."""
    counts = {"nan_count": 0, "posinf_count": 0, "neginf_count": 0}
    spelled = {"Max": "nan", "Min": "nan", "Mean": "nan", "Norm": "nan"}
    call = (tensor(**counts), tensor(**spelled, **{**counts, "nan_count": 1, "posinf_count": 2}))
    assert marks_of(tmp_path, call) == {"Torch.a output.0": "makes the first NaN and Inf!"}
    assert "NaN" not in json.dumps(spelled)
