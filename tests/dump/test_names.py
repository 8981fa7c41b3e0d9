"""Entry names: made and taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msprobe_graph.dump.names import EntryName, api_entry, module_entry, parse

word = st.text("abXY_z09", min_size=1, max_size=6).filter(str.isidentifier)
# A part of a module's path may be a number, or a word that a name itself uses.
part = word | st.integers(0, 99).map(str) | st.sampled_from(["forward", "backward", "parameters_grad", "Module"])
path = st.lists(part, max_size=4).map(".".join)
api = st.tuples(word.filter(lambda prefix: prefix != "Module"), st.lists(word, min_size=1, max_size=2)).map(
    lambda names: ".".join([names[0], *names[1]])
)
calls = st.integers(0, 10**6)


@given(path, word, st.sampled_from(["forward", "backward", "parameters_grad"]), calls)
def test_module_names_round_trip(path: str, cls: str, direction: str, call: int) -> None:
    entry = module_entry(path, cls, direction, call)  # type: ignore[arg-type]
    assert parse(entry) == EntryName("module", path, cls, direction, call)  # type: ignore[arg-type]


@given(api, st.sampled_from(["forward", "backward"]), calls)
def test_api_names_round_trip(api: str, direction: str, call: int) -> None:
    entry = api_entry(api, call, direction)  # type: ignore[arg-type]
    assert parse(entry) == EntryName("api", api, None, direction, call)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("Functional.linear.0.forward", ("api", "Functional.linear", None, "forward", 0)),
        ("vllm.unified_attention.12.forward", ("api", "vllm.unified_attention", None, "forward", 12)),
        ("Module.layers.0.mlp.MLP.forward.0", ("module", "layers.0.mlp", "MLP", "forward", 0)),
        ("Module.Model.backward.3", ("module", "", "Model", "backward", 3)),
        ("Module.0.head.Linear.parameters_grad.1", ("module", "0.head", "Linear", "parameters_grad", 1)),
    ],
)
def test_names_as_msprobe_writes_them(entry: str, parts: tuple[object, ...]) -> None:
    assert parse(entry) == parts


@pytest.mark.parametrize(
    "wrong", ["", "linear", "Functional.linear.forward.0", "Functional.linear.0.sideways", "Module.fc.Linear.forward"]
)
def test_what_is_no_entry_name_is_refused_in_one_sentence(wrong: str) -> None:
    with pytest.raises(ValueError, match="is no entry name: expected") as raised:
        parse(wrong)
    assert repr(wrong) in str(raised.value)
