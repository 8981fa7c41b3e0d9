"""load_settings: what the values mean, and which steps, ranks, scopes and sizes are refused."""

import json
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from msprobe_graph.config import OperatorChanges, load_settings
from msprobe_graph.config.settings import NUMBER_MAX

from .conftest import ALL, error, load


def block(**given):
    return load(statistics=given)


def test_dump_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_settings({"dump_path": "a/../b"}).dump_path == str(tmp_path / "b")
    assert load_settings({"dump_path": "~/dump"}).dump_path == str(tmp_path / "home" / "dump")


def test_the_block_read_is_the_tasks():
    blocks = {"statistics": {"list": ["a"]}, "tensor": {"list": ["b"], "summary_mode": "md5"}}
    assert load(**blocks).list == ("a",)
    assert load(task="tensor", **blocks).list == ("b",)
    assert load(task="tensor", **blocks).summary_mode == "md5"


@pytest.mark.parametrize(
    ("modes", "expanded"),
    [
        (["all"], ALL),
        ([], ALL),
        (["input"], {"forward", "backward", "input"}),
        (["forward"], {"forward", "input", "output"}),
        (["forward", "input"], {"forward", "input"}),
        (["backward", "input", "output"], {"backward", "input", "output"}),
        (["forward", "backward", "input", "output"], ALL),
    ],
)
def test_data_mode_is_expanded(modes, expanded):
    assert block(data_mode=modes).data_mode == expanded


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1, 1),
        (10**12, 10**12),
        ("10GiB", 10 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 KiB", 1536),
        ("0.1TB", 10**11),
        ("2k", 2000),
        ("7", 7),
        (" 7B ", 7),
        ("1.23456789012345678PB", 1234567890123456),
    ],
)
def test_max_bytes(text, count):
    assert load(max_bytes=text).max_bytes == count
    assert load(graph_copy_bytes=text).graph_copy_bytes == count


@pytest.mark.parametrize("text", [0, -1, True, 1.5, "", "GiB", "10GiBs", "-1MB", "1e9", "0.5B", "0", [1]])
def test_wrong_max_bytes(text):
    for key in ("max_bytes", "graph_copy_bytes"):
        assert f": {key} is {json.dumps(text)}; it must be a number of bytes" in error({"dump_path": "x", key: text})


def test_operators():
    assert load(operators={"add": {"tensor": ["item"]}, "remove": ["Tensor.to"]}).operators == OperatorChanges(
        add={"tensor": ("item",)}, remove=("Tensor.to",)
    )
    assert load(operators={"only": ["Functional.*"]}).operators.only == ("Functional.*",)


@pytest.mark.parametrize(
    ("given", "flush_on"),
    [
        ({}, ()),
        ({"keep_last": 3}, ("nan", "inf")),
        ({"keep_last": 3, "flush_on": None}, ("nan", "inf")),
        ({"keep_last": 3, "flush_on": ["rpc", "nan"]}, ("rpc", "nan")),
        ({"keep_last": 3, "flush_on": ["request"], "statistics": {"request_id": "r"}}, ("request",)),
    ],
)
def test_flush_on(given, flush_on):
    settings = load(**given)
    assert (settings.keep_last, settings.flush_on) == (given.get("keep_last"), flush_on)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"flush_on": ["nan"]}, 'flush_on is ["nan"], but keep_last is not given'),
        ({"flush_sites": ["relu"]}, 'flush_sites is ["relu"], but keep_last is not given'),
        (
            {"keep_last": 3, "flush_on": ["rpc"], "flush_sites": ["relu"]},
            'flush_sites is ["relu"], but flush_on has neither "nan" nor "inf"',
        ),
        (
            {"keep_last": 3, "flush_sites": ["name-regex(()"]},
            'flush_sites is "name-regex(()", an invalid expression',
        ),
        (
            {"keep_last": 3, "flush_on": ["nan", "request"]},
            'flush_on is ["nan", "request"], but statistics.request_id is not given',
        ),
        (
            {"keep_last": 3, "task": "tensor", "tensor": {"summary_mode": "xor"}},
            'flush_on is ["nan", "inf"], but tensor.summary_mode xor knows neither',
        ),
    ],
)
def test_what_the_ring_needs(given, why):
    sentence = error({"dump_path": "x", **given})
    assert f": {why}" in sentence
    assert "; it must be a list of" in sentence


@pytest.mark.parametrize(
    ("level", "names"),
    [
        ("L0", ["Module.layers.0.mlp.MLP.forward.0", "Module.head.Linear.backward.12"]),
        ("L1", ["Functional.linear.0.forward", "Tensor.add.3.backward"]),
        ("L1", ["_C_ascend.rms_norm.0.forward", "vllm.unified_attention.1.forward"]),
        ("L2", ["Aten.addmm.0.forward", "Aten.mm.1.forward"]),
        ("mix", ["Module.head.Linear.forward.0", "Functional.linear.0.forward"]),
    ],
)
def test_scope(level, names):
    assert load(level=level, statistics={"scope": names}).scope == tuple(names)


@pytest.mark.parametrize(
    ("level", "names", "culprit"),
    [
        ("L0", ["Functional.linear.0.forward", "Module.head.Linear.forward.0"], "Functional.linear.0.forward"),
        ("L1", ["Functional.linear.0.forward", "Module.head.Linear.forward.0"], "Module.head.Linear.forward.0"),
        ("L1", ["Functional.linear.0.forward", "Functional.linear"], '"Functional.linear" is no full name'),
        ("L1", ["Module.head.0.forward", "Tensor.add.3.backward"], "Module.head.0.forward"),
        ("mix", ["linear", "Tensor.add.3.backward"], '"linear" is no full name of level mix'),
        ("L1", ["Functional.linear.0.forward"], "exactly two"),
        ("L1", ["Functional.linear.0.forward"] * 3, "exactly two"),
    ],
)
def test_wrong_scope(level, names, culprit):
    sentence = error({"dump_path": "x", "level": level, "statistics": {"scope": names}})
    assert culprit in sentence
    assert "statistics.scope is" in sentence


# Steps and ranks

intervals = st.tuples(st.integers(0, NUMBER_MAX - 50), st.integers(0, 50)).map(lambda it: (it[0], it[0] + it[1]))
space = st.sampled_from(["", " "])


@st.composite
def written_numbers(draw):
    """A list as a user may write it, and the numbers that it means."""
    elements, numbers = [], set()
    for first, last in draw(st.lists(intervals, max_size=6)):
        if first == last and draw(st.booleans()):
            elements.append(draw(st.sampled_from([first, str(first)])))
        else:
            elements.append(f"{draw(space)}{first}{draw(space)}-{draw(space)}{last}{draw(space)}")
        numbers.update(range(first, last + 1))
    return elements, numbers


@given(steps=written_numbers(), ranks=written_numbers())
@example(steps=([1, "3", "4-6"], {1, 3, 4, 5, 6}), ranks=([0, f"{NUMBER_MAX}"], {0, NUMBER_MAX}))
def test_steps_and_ranks(steps, ranks):
    settings = load(step=steps[0], rank=ranks[0])
    assert (settings.step, settings.rank) == (steps[1], ranks[1])


@given(numbers=st.sets(st.integers(0, NUMBER_MAX), max_size=20))
def test_numbers_round_trip(numbers):
    assert load(step=sorted(load(step=list(numbers)).step)).step == numbers


wrong_element = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=NUMBER_MAX + 1, max_value=2**63),
    st.integers(min_value=NUMBER_MAX + 1).map(str),
    st.integers(min_value=NUMBER_MAX + 1, max_value=2**70).map(lambda last: f"0-{last}"),
    st.tuples(st.integers(1, NUMBER_MAX), st.integers(1, 100)).map(lambda it: f"{it[0]}-{max(0, it[0] - it[1])}"),
    st.booleans(),
    st.floats(),
    st.text(string.ascii_letters + "-,:. ", max_size=8),
    st.just("1-2-3"),
    st.just([1]),
)


@given(element=wrong_element, key=st.sampled_from(["step", "rank"]))
def test_wrong_steps_and_ranks(element, key):
    sentence = error({"dump_path": "x", key: [0, element]})
    assert f"{key} is " in sentence
    assert "a list of numbers from 0 to 1000000" in sentence
