"""The written form of the settings and what matches entry names."""

import pickle
import re

import msgspec
import pytest

from msprobe_graph.config import OperatorChanges, Slice, entry_matcher, load_settings
from msprobe_graph.config.settings import ConfigFile, Settings, TaskBlock, field_doc


def test_every_written_field_is_documented_and_reaches_the_settings():
    written = [field for form in (ConfigFile, TaskBlock) for field in msgspec.structs.fields(form)]
    for field in written:
        doc = field_doc(field)
        assert doc.description, field.name
        assert doc.extra is not None
        assert doc.extra["values"], field.name
        if not field.required and field.default is None:
            assert doc.extra["default"], f"{field.name}: a default of null must be put in words"
    assert {field.name for field in written} | {"source"} == set(Settings.__struct_fields__)


def test_settings_are_frozen_and_travel_to_other_processes():
    settings = load_settings({"dump_path": "x", "step": ["4-6"], "statistics": {"slice": [{"end": 2}]}})
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.slice == (Slice(dim=0, begin=0, end=2, size=None),)
    with pytest.raises(AttributeError):
        settings.level = "L0"  # type: ignore[misc]


def test_operator_changes_default_to_none():
    assert OperatorChanges() == OperatorChanges(add={}, remove=(), only=None)


@pytest.mark.parametrize(
    ("elements", "name", "wanted"),
    [
        (["linear"], "Functional.linear.0.forward", True),
        (["Functional.linear.0.forward"], "Functional.linear.0.forward", True),
        (["relu"], "Functional.linear.0.forward", False),
        (["relu", "linear"], "Functional.linear.0.forward", True),
        (["a.b"], "a-b", False),
        (["name-regex(Tensor[.].+)"], "Tensor.mul.0.forward", True),
        (["name-regex(Tensor)"], "Tensor.mul.0.forward", False),
        (["name-regex((?i)tensor.*)", "relu"], "Tensor.mul.0.forward", True),
        (["name-regex((a)\\1)", "name-regex((b)\\1)"], "bb", True),
        (["name-regex(open"], "name-regex(open", True),
        ([], "Tensor.mul.0.forward", False),
    ],
)
def test_entry_matcher(elements, name, wanted):
    assert entry_matcher(elements)(name) is wanted


def test_entry_matcher_refuses_an_invalid_expression():
    with pytest.raises(re.error):
        entry_matcher(["name-regex(()"])
