"""Dynamo's expressions for where something comes from."""

from __future__ import annotations

import pytest

from msprobe_graph.graph.sources import anchors, split_expression


@pytest.mark.parametrize(
    ("expression", "parts"),
    [
        ("L['self']", ("L['self']", "")),
        ("L['self']._modules['layers']._modules['0']", ("L['self']", "layers.0")),
        ("L['self'].layers.0", ("L['self']", "layers.0")),
        ("L['self']._modules['fc']._parameters['weight']", ("L['self']", "fc.weight")),
        ("L['fn']._modules['0']._buffers['mean']", ("L['fn']", "0.mean")),
        ("G['model'].layers", ("G['model']", "layers")),
        ("something else", ("something else", "")),
    ],
)
def test_expressions_are_split(expression: str, parts: tuple[str, str]) -> None:
    assert split_expression(expression) == parts


def test_anchors_are_parameters_and_buffers() -> None:
    sources = ["L['x']", "L['self']._modules['fc']._parameters['weight']", "L['m']._buffers['mean']", "L['self'].scale"]
    assert anchors(sources) == {"L['self']": [(1, "fc.weight")], "L['m']": [(2, "mean")]}
