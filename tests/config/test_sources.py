"""load_settings: defaults, arguments and files."""

import json
from pathlib import Path

import pytest
import yaml

from msprobe_graph.config import OperatorChanges, load_settings
from msprobe_graph.config.settings import MAPPING, ConfigFile, TaskBlock

from .conftest import ALL, error, load, written

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
    assert settings.graph_copy_bytes is None


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
