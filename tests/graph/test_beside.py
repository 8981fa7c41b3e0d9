"""Where dynamo says that a variable of a frame comes from."""

from __future__ import annotations

import pytest
import torch

from msprobe_graph.graph._compat import Code, running_frame
from msprobe_graph.graph.beside import Beside, follow, steps_of
from msprobe_graph.graph.plan import Value

MASK = torch.ones(2, 3)
LIKE_MASK = Value((None, 3), torch.float32, False)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("L['mask']", MASK),
        ("L['kwargs']['masks'][0]", MASK),
        ("L['model'].weight", MASK),
        ("L['model']._parameters['weight']", None),
        ("L['kwargs']['other']", None),
        ("L['kwargs']['masks'][1]", None),
        ("L['model']['of']", None),
        ("L['gone']", None),
    ],
)
def test_a_variable_is_found(expression: str, found: torch.Tensor | None) -> None:
    model = torch.nn.Module()
    model.weight = MASK
    steps = steps_of(expression)
    assert steps is not None
    assert follow(steps, {"mask": MASK, "kwargs": {"masks": [MASK]}, "model": model}) is found


@pytest.mark.parametrize("expression", ["", "G['mask']", "L['x'].size()[0]", "___from_numpy(L['x'])"])
def test_there_is_more_to_it(expression: str) -> None:
    assert steps_of(expression) is None


@pytest.mark.parametrize("value", [LIKE_MASK, Value((2, 4), torch.float32, False), Value((2, 3), torch.int64, False)])
def test_what_a_frame_has_is_taken_if_it_is_like_what_was_traced(value: Value) -> None:
    def caller(mask: torch.Tensor) -> list[torch.Tensor | None]:
        return Beside(Code.of(caller.__code__), {4: [("[]", "mask")]}).now({4: value})

    assert caller(MASK) == [MASK if value is LIKE_MASK else None]


def test_a_frame_that_does_not_run_has_nothing() -> None:
    code = Code("elsewhere.py", 1, "forward")
    assert running_frame(code) is None
    assert Beside(code, {4: [("[]", "mask")]}).now({4: LIKE_MASK}) == [None]
