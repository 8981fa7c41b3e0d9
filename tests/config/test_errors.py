"""load_settings: one clear sentence for everything that is wrong, and the keys that are left alone."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msprobe_graph.config.settings import LEFT_ALONE, MAPPING, OTHER_TASKS, ConfigFile, TaskBlock

from .conftest import error, load, written

# Wrong values


def test_the_error_names_file_key_value_and_what_is_allowed(tmp_path):
    path = written(tmp_path, '{"dump_path": "x", "level": "l1"}')
    assert error(path) == f'{path}: level is "l1"; it must be one of "L0", "L1", "L2", "mix", "debug"'


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dump_path", 3),
        ("dump_path", ""),
        ("level", "L3"),
        ("level", 0),
        ("rank", 3),
        ("step", "4-6"),
        ("async_dump", "true"),
        ("async_dump", 1),
        ("dump_enable", "yes"),
        ("extra_info", 0),
        ("precision", "medium"),
        ("risk_level", "LOW"),
        ("risk_level", "focus"),
        ("custom_op_namespaces", "vllm"),
        ("custom_op_namespaces", [1]),
        ("max_steps", 0),
        ("keep_last", 0),
        ("keep_last", True),
        ("flush_on", []),
        ("flush_on", ["nan", "oom"]),
        ("flush_on", ["nan"]),
        ("flush_sites", ["relu"]),
        ("max_steps", 2.5),
        ("operators", ["linear"]),
        ("operators", {"only": []}),
        ("operators", {"only": ["a"], "remove": ["b"]}),
        ("operators", {"adds": {}}),
        ("operators", {"add": ["linear"]}),
        ("operators", {"remove": "linear"}),
    ],
)
def test_a_wrong_value(key, value):
    sentence = error({"dump_path": "x", key: value})
    assert sentence.startswith(f"{MAPPING}: {key} is ")
    assert "; it must be " in sentence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scope", "Functional.linear.0.forward"),
        ("list", "linear"),
        ("list", [1]),
        ("list", [""]),
        ("list", ["name-regex(()"]),
        ("tensor_list", ["ok", "name-regex([)"]),
        ("data_mode", "all"),
        ("data_mode", ["all", "input"]),
        ("data_mode", ["inputs"]),
        ("summary_mode", "sha1"),
        ("slice", {"dim": 0}),
        ("slice", [{"dim": -1}]),
        ("slice", [{"size": -1}]),
        ("slice", [{"dim": 0, "stop": 3}]),
        ("slice", [{"begin": True}]),
        ("request_id", 7),
    ],
)
@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_a_wrong_value_in_the_block(task, key, value):
    sentence = error({"dump_path": "x", "task": task, task: {key: value}})
    assert sentence.startswith(f"{MAPPING}: {task}.{key} is ")
    assert "; it must be " in sentence


def test_a_long_value_is_cut():
    assert len(error({"dump_path": "x", "list": ["a" * 10**6]})) < 1000
    assert len(error({"dump_path": "x", "level": "a" * 10**6})) < 1000


def test_missing_dump_path():
    assert error({}) == (
        f"{MAPPING}: dump_path is missing; it must be the path of a directory that exists or can be made"
    )


def test_dump_path_that_cannot_be_made(tmp_path):
    path = written(tmp_path, "")
    assert f"but {path} is a file" in error({"dump_path": f"{path}/below"})
    assert "no usable path" in error({"dump_path": "a" * 5000})
    assert "no usable path" in error({"dump_path": "a\0b"})
    assert "no usable path" in error({"dump_path": "~no-such-user/dump"})
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert f"but {tmp_path} may not be written to" in error({"dump_path": f"{tmp_path}/below"})


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_other_tasks_are_named_as_such(task):
    sentence = error({"dump_path": "x", "task": task})
    assert f'task is "{task}", a task of msProbe' in sentence
    assert '"statistics", "tensor"' in sentence


def test_a_wrong_task():
    assert 'task is "dump"; it must be one of "statistics", "tensor"' in error({"dump_path": "x", "task": "dump"})


def test_the_block_must_be_an_object():
    assert "tensor is [], but it must be an object" in error({"dump_path": "x", "task": "tensor", "tensor": []})


# Unknown keys and what is left alone


def test_unknown_key_with_a_suggestion():
    assert 'unknown key "levl" in the top level, did you mean level?' in error({"dump_path": "x", "levl": "L1"})
    assert 'unknown key "lst" in statistics, did you mean list?' in error({"dump_path": "x", "statistics": {"lst": []}})
    assert "unknown key 3 in the top level (allowed: task, " in error({"dump_path": "x", 3: 4})


@given(key=st.text(max_size=12), inside=st.booleans())
def test_any_unknown_key_is_an_error(key, inside):
    known = TaskBlock.__struct_fields__ if inside else (*ConfigFile.__struct_fields__, "statistics", "tensor")
    if key in known or (not inside and key in LEFT_ALONE):
        return
    given_ = {"dump_path": "x", "statistics": {key: 1}} if inside else {"dump_path": "x", key: 1}
    assert f"unknown key {json.dumps(key, ensure_ascii=False)} in " in error(given_)


@pytest.mark.parametrize("other", LEFT_ALONE)
def test_other_blocks_are_left_alone(other):
    assert load(**{other: {"anything": [1]}}) == load()


def test_the_other_tasks_block_is_left_alone():
    assert load(tensor={"file_format": "npy"}) == load()
    assert load(task="tensor", statistics={"device": "host"}).task == "tensor"
