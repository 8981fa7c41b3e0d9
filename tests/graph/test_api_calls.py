"""What the nodes of dynamo's graph say of a call."""

from __future__ import annotations

from msprobe_graph.graph.api_calls import frames


def test_a_stack_trace_is_read_innermost_first() -> None:
    trace = '  File "/a.py", line 3, in outer\n    inner(x)\n  File "/b.py", line 5, in inner\n    x + 1\n'
    assert [(frame.path, frame.line, frame.function) for frame in frames(trace)] == [
        ("/b.py", 5, "inner"),
        ("/a.py", 3, "outer"),
    ]
    assert frames(None) == ()
