"""stack.json: entries grouped by the call stack they came from."""

from __future__ import annotations

import json
from pathlib import Path

from msprobe_graph.dump.records import Entry, StackFrame
from msprobe_graph.dump.stack import Stacks


def test_entries_are_grouped_by_stack_in_order(tmp_path: Path) -> None:
    source = tmp_path / "model.py"
    source.write_text("def forward(x):\n    return x + 1\n")
    first = (StackFrame(str(source), 2, "forward"), StackFrame("<string>", 7, "<module>"))
    second = (StackFrame(str(source), 1, "other"),)
    entries = [
        Entry("a", {}, stack=first),
        Entry("b", {}, stack=second),
        Entry("without", {}),
        Entry("c", {}, stack=first),
    ]
    assert json.loads(Stacks().encode(entries)) == {
        "0": [
            ["a", "c"],
            [f"File {source}, line 2, in forward, \n return x + 1", "File <string>, line 7, in <module>, \n "],
        ],
        "1": [["b"], [f"File {source}, line 1, in other, \n def forward(x):"]],
    }


def test_a_step_with_other_stacks_or_names_is_encoded_anew() -> None:
    one, two = (StackFrame("<a>", 1, "f"),), (StackFrame("<a>", 2, "f"),)
    steps = [
        [Entry("a", {}, stack=one), Entry("b", {}, stack=one)],
        [Entry("a", {}, stack=(StackFrame("<a>", 1, "f"),)), Entry("b", {}, stack=two)],
        [Entry("a", {}, stack=one), Entry("c", {}, stack=two)],
        [Entry("a", {}, stack=one), Entry("c", {}, stack=(StackFrame("<a>", 2, "f"),))],
        [],
    ]
    stacks = Stacks()
    assert [stacks.encode(entries) for entries in steps] == [Stacks().encode(entries) for entries in steps]
    assert len({Stacks().encode(entries) for entries in steps}) == 4
