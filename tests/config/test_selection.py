"""Which entries a configuration asks for."""

from __future__ import annotations

from typing import Any

import pytest

from msprobe_graph.config import load_settings
from msprobe_graph.config.selection import Selection

RISKS = {"Functional.linear": "core", "Tensor.add": "focus", "Tensor.view": "low"}


def selection(level: str = "L1", task: str = "statistics", risk_level: str = "ALL", **block: Any) -> Selection:
    settings = load_settings({"dump_path": "d", "level": level, "task": task, "risk_level": risk_level, task: block})
    return Selection(settings, RISKS.__getitem__)  # type: ignore[arg-type]


def api(entry: str) -> str:
    return entry.rsplit(".", 2)[0]


def run(selected: Selection, calls: list[Any]) -> list[str]:
    """The entries wanted of a program: an operator is a string, a module a pair of its name and what it calls."""
    wanted = []
    for call in calls:
        if isinstance(call, str):
            if selected.may_want_api(api(call)) and selected.wants_api(call):
                wanted.append(call)
            continue
        entry, inside = call
        selected.enter(entry)
        keep = selected.wants_module(entry)
        wanted += run(selected, inside)
        selected.leave(entry)
        if keep:
            wanted.append(entry)
    return wanted


LINEAR, ADD, VIEW = "Functional.linear.{}.forward", "Tensor.add.{}.forward", "Tensor.view.{}.forward"
OPERATORS = [name.format(call) for call in range(2) for name in (LINEAR, ADD, VIEW)]
FIRST, SECOND = "Module.first.Linear.forward.0", "Module.second.Linear.forward.0"
MODULES = [("Module.Model.forward.0", [(FIRST, OPERATORS[:3]), (SECOND, OPERATORS[3:])])]


def test_all_by_default() -> None:
    selected = selection()
    assert run(selected, OPERATORS) == OPERATORS
    assert (selected.inputs, selected.outputs, selected.forward, selected.backward) == (True, True, True, True)
    assert not selected.saves(OPERATORS[0])
    assert selection(task="tensor").saves(OPERATORS[0])


@pytest.mark.parametrize(
    ("risk_level", "expected"),
    [("ALL", {"linear", "add", "view"}), ("FOCUS", {"linear", "add"}), ("CORE", {"linear"})],
)
def test_risk_level(risk_level: str, expected: set[str]) -> None:
    assert {name.split(".")[1] for name in run(selection(risk_level=risk_level), OPERATORS)} == expected


@pytest.mark.parametrize("block", [{"list": ["view"]}, {"scope": ["Tensor.view.0.forward", "Tensor.view.0.forward"]}])
def test_what_is_asked_for_by_name_is_not_left_out_for_its_risk(block: dict[str, Any]) -> None:
    assert "Tensor.view.0.forward" in run(selection(risk_level="CORE", **block), OPERATORS)


def test_scope_of_operators_is_from_to_and_includes_both() -> None:
    selected = selection(scope=["Tensor.add.0.forward", "Functional.linear.1.forward"])
    assert run(selected, OPERATORS) == OPERATORS[1:4]
    assert run(selected, OPERATORS) == OPERATORS[1:4]  # the window opens again in the next step
    selected.reset()
    assert run(selected, OPERATORS) == OPERATORS[1:4]


def test_scope_of_modules() -> None:
    expected = [SECOND]
    assert run(selection("L0", scope=[SECOND, SECOND]), [(m, []) for m in (FIRST, SECOND, FIRST)]) == expected


def test_scope_from_one_module_to_another_at_mix() -> None:
    expected = [*OPERATORS[:3], FIRST]
    assert run(selection("mix", scope=[FIRST, FIRST]), MODULES) == expected
    assert run(selection("mix", scope=[FIRST, OPERATORS[3]]), MODULES) == [*expected, OPERATORS[3], SECOND]


def test_an_open_scope_is_closed_by_the_next_step() -> None:
    selected = selection(scope=["Tensor.add.0.forward", "Tensor.never.0.forward"])
    assert run(selected, OPERATORS) == OPERATORS[1:]
    selected.reset()
    assert run(selected, OPERATORS[:1]) == []


def test_list_is_a_part_of_the_name_or_an_expression() -> None:
    assert run(selection(list=["add.0", "view"]), OPERATORS) == [OPERATORS[1], OPERATORS[2], OPERATORS[5]]
    assert run(selection(list=["name-regex(.*[.]1[.]forward)"]), OPERATORS) == OPERATORS[3:]
    assert run(selection(list=["nothing"]), OPERATORS) == []


def test_a_module_in_list_opens_a_window_at_mix() -> None:
    assert run(selection("mix", list=["second"]), MODULES) == [*OPERATORS[3:], SECOND]
    assert run(selection("mix", list=["second", "view.0"]), MODULES) == [OPERATORS[2], *OPERATORS[3:], SECOND]


def test_list_within_scope() -> None:
    selected = selection(scope=["Tensor.add.0.forward", "Functional.linear.1.forward"], list=["linear", "view"])
    assert run(selected, OPERATORS) == [OPERATORS[2], OPERATORS[3]]


def test_a_nested_window_closes_with_the_module_that_opened_it() -> None:
    inner = ("Module.second.fc.Linear.forward.0", OPERATORS[:1])
    calls = [(SECOND, [inner, OPERATORS[1]]), OPERATORS[2]]
    assert run(selection("mix", list=["second"]), calls) == [OPERATORS[0], inner[0], OPERATORS[1], SECOND]


@pytest.mark.parametrize(
    ("data_mode", "expected"),
    [
        (["all"], (True, True, True, True)),
        ([], (True, True, True, True)),
        (["forward"], (True, True, True, False)),
        (["backward", "output"], (False, True, False, True)),
        (["input"], (True, False, True, True)),
    ],
)
def test_data_mode(data_mode: list[str], expected: tuple[bool, ...]) -> None:
    selected = selection(data_mode=data_mode)
    assert (selected.inputs, selected.outputs, selected.forward, selected.backward) == expected


def test_tensor_list() -> None:
    selected = selection(tensor_list=["linear", "name-regex(Tensor[.]add[.]1.*)"])
    assert [name for name in OPERATORS if selected.saves(name)] == [OPERATORS[0], OPERATORS[3], OPERATORS[4]]


def test_which_modules_may_be_wanted() -> None:
    assert selection("L0").may_want_module("Module.first.Linear")
    assert selection("L0", list=["first"]).may_want_module("Module.first.Linear")
    assert not selection("L0", list=["first"]).may_want_module("Module.second.Linear")
    assert not selection("L0", scope=[FIRST, SECOND]).may_want_module("Module.first.Linear")  # a window in time
