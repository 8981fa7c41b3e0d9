"""load_settings: values, defaults, ranges, and one clear sentence for everything that is wrong."""

import json
import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from msprobe_graph.config import ConfigError, OperatorChanges, load_settings
from msprobe_graph.config.settings import LEFT_ALONE, MAPPING, NUMBER_MAX, OTHER_TASKS, ConfigFile, TaskBlock

ALL = frozenset({"forward", "backward", "input", "output"})


def load(**given):
    return load_settings({"dump_path": "dump", **given})


def block(**given):
    return load(statistics=given)


def error(source, **arguments):
    with pytest.raises(ConfigError) as caught:
        load_settings(source, **arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def written(folder, text, name="config.json"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Defaults


def test_defaults_are_msprobes():
    settings = load()
    assert settings.source == MAPPING
    assert settings.task == "statistics"
    assert settings.level == "L1"
    assert settings.rank == settings.step == frozenset()
    assert (settings.async_dump, settings.extra_info, settings.dump_enable) == (False, True, None)
    assert (settings.precision, settings.risk_level, settings.summary_mode) == ("low", "FOCUS", "statistics")
    assert (settings.custom_op_namespaces, settings.scope, settings.request_id) == (None, None, None)
    assert settings.list == settings.tensor_list == settings.slice == ()
    assert settings.data_mode == ALL


def test_defaults_of_our_own_settings():
    settings = load()
    assert (settings.operators, settings.max_bytes, settings.max_steps) == (OperatorChanges(), None, None)


def test_null_is_the_same_as_left_out_but_for_risk_level():
    nulls = {name: None for name in ConfigFile.__struct_fields__ if name not in ("dump_path", "risk_level")}
    assert load(**nulls, statistics=dict.fromkeys(TaskBlock.__struct_fields__)) == load()
    assert load(statistics=None) == load()
    assert load(risk_level=None).risk_level == "ALL"


def test_msprobes_own_example():
    example_config = {
        "task": "statistics",
        "dump_path": "./dump_path",
        "rank": [],
        "step": [],
        "level": "L1",
        "extra_info": True,
        "async_dump": False,
        "statistics": {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"},
        "tensor": {"scope": [], "list": [], "data_mode": ["all"]},
        "acc_check": {"white_list": [], "black_list": [], "error_data_path": "./"},
    }
    assert load_settings(example_config) == load_settings({"dump_path": "./dump_path"})


# Values


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


@pytest.mark.parametrize("text", [0, -1, True, 1.5, "", "GiB", "10GiBs", "-1MB", "1e9", "0.5B", "0", [1]])
def test_wrong_max_bytes(text):
    assert f"max_bytes is {json.dumps(text)}; it must be a number of bytes" in error(
        {"dump_path": "x", "max_bytes": text}
    )


def test_operators():
    assert load(operators={"add": {"tensor": ["item"]}, "remove": ["Tensor.to"]}).operators == OperatorChanges(
        add={"tensor": ("item",)}, remove=("Tensor.to",)
    )
    assert load(operators={"only": ["Functional.*"]}).operators.only == ("Functional.*",)


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


# Errors


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


# Arguments


def test_arguments_take_the_place_of_the_file(tmp_path):
    path = written(tmp_path, json.dumps({"dump_path": "x", "task": "acc_check", "level": "l0", "step": [1]}))
    settings = load_settings(path, task="tensor", level="mix", step=["2-3"], rank=[7], dump_path=tmp_path / "dump")
    assert (settings.task, settings.level, settings.step, settings.rank) == ("tensor", "mix", {2, 3}, {7})
    assert settings.dump_path == str(tmp_path / "dump")
    assert settings.source == str(path)


def test_arguments_are_checked():
    assert error({"dump_path": "x"}, level="L9", rank=[1]).startswith(
        f'{MAPPING} with the arguments level, rank: level is "L9"; it must be one of'
    )
    assert "step is" in error({"dump_path": "x"}, step=["6-4"])
    assert "task is" in error({"dump_path": "x"}, task="structure")
    assert "dump_path is 3; it must be" in error({}, dump_path=3)


def test_the_mapping_given_is_not_changed():
    given_ = {"dump_path": "x", "risk_level": None}
    load_settings(given_, task="tensor")
    assert given_ == {"dump_path": "x", "risk_level": None}


# Files


@pytest.mark.parametrize("name", ["c.json", "c.JSON", "c.yaml", "c.yml"])
def test_json_and_yaml_say_the_same(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = {"dump_path": "x", "step": [0, "4-6"], "dump_enable": True, "statistics": {"slice": [{"end": 3}]}}
    write = json.dumps if name.lower().endswith("json") else yaml.safe_dump
    settings = load_settings(written(tmp_path, write(config), name).name)
    assert settings.source == str(tmp_path / name)
    assert (settings.step, settings.dump_enable, settings.slice[0].end) == ({0, 4, 5, 6}, True, 3)


def test_yaml_as_people_write_it(tmp_path):
    text = "dump_path: x  # here\nstep: [0, 4-6]\nmax_bytes: 10GiB\nstatistics:\n  data_mode: [input]\n"
    settings = load_settings(written(tmp_path, text, "c.yaml"))
    assert (settings.step, settings.max_bytes) == ({0, 4, 5, 6}, 10 * 2**30)


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert load_settings(written(tmp_path, '\ufeff{"dump_path": "x"}')).task == "statistics"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "c.json",
            '{"task": "tensor",\n  "level" "L1"}',
            "not valid JSON at line 2, column 11: Expecting ':' delimiter",
        ),
        ("c.json", "", "not valid JSON at line 1, column 1"),
        ("c.json", "[1]", "must hold an object of keys and values, not [1]"),
        ("c.yaml", "task: tensor\nlevel: [L1\nrank: []", "not valid YAML at line 3, column 5"),
        ("c.yaml", "a: 1\n\tb: 2", "not valid YAML at line 2, column 1"),
        ("c.yaml", "a: \x00", "not valid YAML"),
        ("c.yaml", "", "must hold an object of keys and values, not null"),
        ("c.yaml", "1: {2020-01-01: 3}", "unknown key 1"),
        ("c.yaml", "level: 2020-01-01", "level is datetime.date(2020, 1, 1)"),
        ("c.toml", "", 'must end in .json, .yaml or .yml, not in ".toml"'),
        ("config", "", 'must end in .json, .yaml or .yml, not in ""'),
    ],
)
def test_files_that_do_not_read(tmp_path, name, text, problem):
    path = written(tmp_path, text, name)
    sentence = error(path)
    assert sentence.startswith(f"{path}: ")
    assert problem in sentence


def test_missing_and_unreadable_files(tmp_path):
    missing = tmp_path / "no.json"
    assert error(missing) == f"{missing}: the config file cannot be read (No such file or directory)"
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert error(str(folder)) == f"{folder}: the config file cannot be read (Is a directory)"
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"dump_path": "\xe9"}')
    assert error(latin) == f"{latin}: a config file must be UTF-8 text, but byte 15 is not"


def test_a_relative_path_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error("no.json").startswith(str(tmp_path / "no.json"))
    assert error(Path("no.json")).startswith(str(tmp_path / "no.json"))
