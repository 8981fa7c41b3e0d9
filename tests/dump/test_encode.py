"""What dump.json says of tensors and of every other argument, and that it is JSON."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msprobe_graph.dump.encode import complete, document, lines, number, refuse, share
from msprobe_graph.dump.records import Replayed, Statistics, Step, TensorRecord

from .conftest import NewWriter, Strict, Written

MSPROBES_FIELDS = ["type", "dtype", "shape", "Max", "Min", "Mean", "Norm", "requires_grad"]
COUNTS = ["nan_count", "posinf_count", "neginf_count"]


def test_key_order_of_an_entry_and_of_a_tensor(written: Written) -> None:
    entry = written({"input_args": [torch.ones(2, 3)], "input_kwargs": {}, "output": [torch.ones(2)]})
    assert list(entry) == ["input_args", "input_kwargs", "output", "site"]
    assert entry["site"] == {"module": "layers.0", "number": 2}
    assert list(entry["input_args"][0]) == [*MSPROBES_FIELDS, *COUNTS]


def test_checksum_and_file_name_follow_requires_grad(written: Written) -> None:
    record = written({"output": [torch.ones(2)]}, save=True, statistics={"summary_mode": "md5"})["output"][0]
    assert list(record) == [*MSPROBES_FIELDS, "md5", "data_name", *COUNTS]
    assert record["data_name"] == "Torch.call.0.forward.output.0.pt"
    assert len(record["md5"]) == 8


def test_head_of_dump_json(new_writer: NewWriter, strict: Strict) -> None:
    writer = new_writer()
    writer.submit(Step(0, finished=True))
    writer.flush()
    dump = strict(writer.files.folder(0) / "dump.json")
    assert dump == {"task": "statistics", "level": "mix", "framework": "pytorch", "dump_data_dir": None, "data": {}}
    assert list(dump) == ["task", "level", "framework", "dump_data_dir", "data"]


def test_statistics_are_those_of_the_values(written: Written) -> None:
    values = torch.randn(7, 5, dtype=torch.float64) * 100
    record = written({"output": [values.float()]})["output"][0]
    exact = values.float().double()
    assert record["shape"] == [7, 5]
    assert record["dtype"] == "torch.float32"
    assert record["Max"] == exact.max().item()
    assert record["Min"] == exact.min().item()
    assert record["Mean"] == pytest.approx(exact.mean().item(), rel=1e-6)
    assert record["Norm"] == pytest.approx(exact.norm().item(), rel=1e-6)


def test_nan_is_a_string_and_infinities_are_numbers(new_writer: NewWriter, written: Written, tmp_path: Path) -> None:
    tensors = [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [math.nan, math.inf, -math.inf, 2.0, -4.0]]
    nan, posinf, neginf, all_three = written({"output": [torch.tensor(values) for values in tensors]})["output"]
    assert [nan[key] for key in ("Max", "Min", "Mean", "Norm")] == ["nan"] * 4
    assert (posinf["Max"], posinf["Min"], posinf["Norm"]) == (math.inf, 1.0, math.inf)
    assert (neginf["Max"], neginf["Min"], neginf["Mean"], neginf["Norm"]) == (1.0, -math.inf, -math.inf, math.inf)
    assert [all_three[count] for count in COUNTS] == [1, 1, 1]
    assert (all_three["finite_Max"], all_three["finite_Min"], all_three["finite_Mean"]) == (2.0, -4.0, -1.0)
    assert all_three["finite_Norm"] == pytest.approx(math.sqrt(20))
    (file,) = tmp_path.glob("dump0/step0/rank0/dump.json")
    text = file.read_text()
    assert '"Max":1e999' in text
    assert '"Min":-1e999' in text
    assert "Infinity" not in text
    assert "NaN" not in text


def test_finite_statistics_only_where_others_are_not_finite(written: Written) -> None:
    assert not [key for key in written({"output": [torch.ones(3)]})["output"][0] if key.startswith("finite")]


class Colour(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    SMALL = 1


class Word(str):
    pass


PLAIN = [
    (None, None),
    (True, {"type": "bool", "value": True}),
    (3, {"type": "int", "value": 3}),
    (2**80, {"type": "int", "value": 2**80}),
    (0.5, {"type": "float", "value": 0.5}),
    (math.nan, {"type": "float", "value": "nan"}),
    (math.inf, {"type": "float", "value": math.inf}),
    (-math.inf, {"type": "float", "value": -math.inf}),
    ('q"uo\nte', {"type": "str", "value": 'q"uo\nte'}),
    ("\ud800 a lone surrogate", {"type": "str", "value": "? a lone surrogate"}),
    (slice(0, 2), {"type": "slice", "value": [0, 2, None]}),
    (slice(None, torch.tensor(2), 3), {"type": "slice", "value": [None, None, 3]}),
    (torch.float16, {"type": "torch.dtype", "value": "torch.float16"}),
    (torch.device("cpu"), {"type": "torch.device", "value": "cpu"}),
    (torch.Size([1, 2]), {"type": "torch.Size", "value": [1, 2]}),
    (torch.strided, {"type": "torch.layout", "value": "torch.strided"}),
    (torch.channels_last, {"type": "torch.memory_format", "format": "channels_last"}),
    (..., {"type": "ellipsis", "value": "..."}),
    (1 + 2j, {"type": "complex", "value": "(1+2j)"}),
    ([1, [None, "a"]], [{"type": "int", "value": 1}, [None, {"type": "str", "value": "a"}]]),
    ((1,), [{"type": "int", "value": 1}]),
    ({"a": 1, 2: None}, {"a": {"type": "int", "value": 1}, "2": None}),
    (np.float64("nan"), {"type": "float64", "value": "nan"}),
    (np.int64(3), {"type": "int64", "value": None}),
    (Size.SMALL, {"type": "Size", "value": 1}),
    (Word("w"), {"type": "Word", "value": "w"}),
    (Colour.RED, {"type": "Colour", "value": None}),
    (np.ones(2), {"type": "ndarray", "value": None}),
    (object(), {"type": "object", "value": None}),
]


@pytest.mark.parametrize(
    ("value", "expected"), PLAIN, ids=[f"{type(value).__name__}{i}" for i, (value, _) in enumerate(PLAIN)]
)
def test_every_kind_of_argument(written: Written, value: Any, expected: Any) -> None:
    assert written({"input_args": [value]})["input_args"][0] == expected


def test_nests_keep_their_names(written: Written) -> None:
    Pair = collections.namedtuple("Pair", "first second")

    @dataclasses.dataclass
    class Box:
        tensor: torch.Tensor
        deep: dict[str, list[int]]

    pair, box = written({"output": [Pair(torch.ones(1), 2), Box(torch.zeros(1), {"a": [1]})]})["output"]
    assert pair["first"]["Max"] == 1
    assert pair["second"] == {"type": "int", "value": 2}
    assert box["tensor"]["Max"] == 0
    assert box["deep"] == {"a": [{"type": "int", "value": 1}]}


def test_what_holds_itself_ends(written: Written) -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert "list" in json.dumps(written({"input_args": [loop]}))


def test_a_tensor_without_values_says_why(written: Written) -> None:
    sparse, meta = written({"output": [torch.eye(2).to_sparse(), torch.empty(2, device="meta")]})["output"]
    for record in (sparse, meta):
        assert record["type"] == "torch.Tensor"
        assert record["Max"] is None
    assert "sparse" in sparse["reason"]
    assert "meta" in meta["reason"]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(_values)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_always_json(written: Written, value: Any) -> None:
    written({"input_args": [value]})


@given(st.floats())
def test_numbers_come_back(value: float) -> None:
    text = b"".join(map(bytes, document({}, [lines([("entry", number(value))])])))
    back = json.loads(text)["data"]["entry"]
    assert back == ("nan" if math.isnan(value) else value)


def test_what_a_replay_is_recorded_in_again_keeps_nothing_of_the_last_time() -> None:
    def new() -> TensorRecord:
        return TensorRecord("torch.Tensor", "torch.float32", None, None, None, None, None, False)

    def shared(measured: TensorRecord, other: TensorRecord) -> TensorRecord:
        share(measured, other)
        return other

    inf, once = math.inf, Replayed((2,), 1)
    infinite = Statistics(inf, 1.0, inf, inf, 0, 1, 0, 1.0, 1.0, 1.0, 1.0, replayed=once)
    finite = Statistics(2.0, 1.0, 1.5, math.sqrt(5), replayed=Replayed((2, 1), 1))
    steps = [infinite, None, finite, infinite, finite, None]
    again, again_shared = new(), new()
    for found in steps:
        first = new()
        for record in (again, first):
            if found is None:
                refuse(record, "not replayed")
            else:
                complete(record, found)
        assert again == first
        assert shared(again, again_shared) == shared(first, new())
