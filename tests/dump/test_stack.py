"""stack.json: entries grouped by the call stack they came from."""

from __future__ import annotations

from pathlib import Path

from msprobe_graph.dump.records import Entry, Frame
from msprobe_graph.dump.stack import grouped


def test_entries_are_grouped_by_stack_in_order(tmp_path: Path) -> None:
    source = tmp_path / "model.py"
    source.write_text("def forward(x):\n    return x + 1\n")
    first = (Frame(str(source), 2, "forward"), Frame("<string>", 7, "<module>"))
    second = (Frame(str(source), 1, "other"),)
    entries = [
        Entry("a", {}, stack=first),
        Entry("b", {}, stack=second),
        Entry("without", {}),
        Entry("c", {}, stack=first),
    ]
    assert grouped(entries) == {
        "0": (
            ["a", "c"],
            [f"File {source}, line 2, in forward, \n return x + 1", "File <string>, line 7, in <module>, \n "],
        ),
        "1": (["b"], [f"File {source}, line 1, in other, \n def forward(x):"]),
    }
