"""The JSON Schema and the page: made from the code, up to date, and of one mind with load_settings."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from msprobe_graph.config import ConfigError, load_settings
from msprobe_graph.config.schema import json_schema, tables

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")
VALIDATOR = Draft202012Validator(json_schema())

GOOD = [
    {},
    {"$schema": "config.schema.json", "acc_check": {"white_list": []}, "load": 3},
    {"task": None, "level": None, "rank": None, "risk_level": None, "statistics": None},
    {"rank": [0, "3", "4-6"], "step": [], "level": "mix", "risk_level": "ALL", "precision": "high"},
    {"operators": {"add": {"vllm": ["unified_attention"]}, "remove": ["dropout"]}},
    {"operators": {"only": ["linear"]}},
    {"max_bytes": 1, "max_steps": 1},
    {"graph_copy_bytes": "4GiB", "task": "tensor"},
    {"keep_last": 1},
    {"keep_last": 5, "flush_on": ["inf", "signal", "rpc"], "flush_sites": ["layers.0.", "name-regex(Tensor.+)"]},
    {"keep_last": 5, "flush_on": None, "flush_sites": []},
    {"keep_last": None, "flush_on": None, "flush_sites": []},
    {"keep_last": 2, "flush_on": ["request"], "statistics": {"request_id": "r", "summary_mode": "xor"}},
    {"max_bytes": "1.5 GiB", "dump_enable": False, "extra_info": False, "async_dump": True},
    {"custom_op_namespaces": [], "tensor": {"file_format": "npy"}},
    {"task": "tensor", "tensor": {"summary_mode": "md5"}, "statistics": 3},
    {"statistics": {"scope": [], "list": ["relu", "name-regex(Tensor.+)"], "tensor_list": [], "data_mode": []}},
    {"statistics": {"scope": ["Tensor.add.0.forward", "Functional.relu.2.forward"], "data_mode": ["all"]}},
    {"statistics": {"slice": [{"dim": 1, "begin": -2, "end": None, "size": 4}, {}], "request_id": "r"}},
    {"statistics": {"data_mode": ["forward", "backward", "input", "output"]}},
]
BAD = [
    {"dump_path": None},
    {"dump_path": ""},
    {"dump_path": 1},
    {"dump_pth": "x"},
    {"task": "acc_check"},
    {"level": "l1"},
    {"rank": 0},
    {"rank": [-1]},
    {"step": [1000001]},
    {"step": ["1-2-3"]},
    {"step": [True]},
    {"async_dump": 1},
    {"dump_enable": "on"},
    {"risk_level": "LOW"},
    {"custom_op_namespaces": [""]},
    {"operators": {"only": ["linear"], "remove": ["relu"]}},
    {"operators": {"only": []}},
    {"operators": {"added": {}}},
    {"max_bytes": 0},
    {"graph_copy_bytes": "2 Gi B"},
    {"max_bytes": "lots"},
    {"max_steps": 0},
    {"keep_last": 0},
    {"keep_last": "3"},
    {"keep_last": 3, "flush_on": []},
    {"keep_last": 3, "flush_on": "nan"},
    {"keep_last": 3, "flush_on": ["overflow"]},
    {"keep_last": 3, "flush_sites": [""]},
    {"flush_on": ["nan"]},
    {"keep_last": None, "flush_on": ["nan"]},
    {"flush_sites": ["relu"]},
    {"statistics": []},
    {"statistics": {"lists": []}},
    {"statistics": {"scope": ["Tensor.add.0.forward"]}},
    {"statistics": {"scope": ["Tensor.add.0.forward"] * 3}},
    {"statistics": {"data_mode": ["all", "input"]}},
    {"statistics": {"data_mode": "all"}},
    {"statistics": {"summary_mode": "sha"}},
    {"statistics": {"slice": [{"dim": -1}]}},
    {"statistics": {"slice": [{"step": 2}]}},
    {"statistics": {"request_id": 1}},
    {"task": "tensor", "tensor": {"file_format": "npy"}},
]


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("config", GOOD, ids=json.dumps)
def test_what_loads_validates(config):
    config = {"dump_path": "x", **config}
    load_settings(config)
    assert [error.message for error in VALIDATOR.iter_errors(config)] == []


@pytest.mark.parametrize("config", BAD, ids=json.dumps)
def test_what_does_not_load_does_not_validate(config):
    config = config if "dump_pth" in config else {"dump_path": "x", **config}
    with pytest.raises(ConfigError):
        load_settings(config)
    assert not VALIDATOR.is_valid(config)


def test_every_property_is_described():
    schema = json_schema()
    for form in (schema, *schema["$defs"].values()):
        for name, field in form["properties"].items():
            assert field.get("description") or any(one.get("description") for one in field["anyOf"]), name


def test_the_schema_in_docs_is_the_codes():
    stored = json.loads((DOCS / "config.schema.json").read_text(encoding="utf-8"))
    assert stored == json_schema(), "run python -m msprobe_graph.config.schema > docs/config.schema.json"


def test_the_page_holds_the_tables():
    assert tables() in PAGE, "put what python -m msprobe_graph.config.schema --table prints into docs/configuration.md"


@pytest.mark.parametrize(("language", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_the_pages_examples_load_and_validate(language, read):
    examples = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert examples
    for example in examples:
        load_settings(read(example))
        VALIDATOR.validate(read(example))


def test_the_pages_operators_exist():
    pytest.importorskip("torch")
    from msprobe_graph.config import OperatorTable

    for example in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        OperatorTable(load_settings(yaml.safe_load(example)).operators)


def run(*arguments):
    command = [sys.executable, "-m", "msprobe_graph.config.schema", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_commands_print_them():
    assert json.loads(run().stdout) == json_schema()
    table = run("--table")
    assert (table.stdout, table.stderr) == (tables(), "")
    wrong = run("--tables")
    assert wrong.returncode != 0
    assert "usage:" in wrong.stderr


def test_reading_settings_needs_no_torch():
    code = f"""
import sys, types
sys.modules["msprobe_graph"] = package = types.ModuleType("msprobe_graph")  # in place of what the package imports
package.__path__ = {[str(DOCS.parent / "msprobe_graph")]}
import msprobe_graph.config.schema
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_operator_table_is_exported():
    pytest.importorskip("torch")
    from msprobe_graph import config
    from msprobe_graph.config.operators import OperatorTable

    assert config.OperatorTable is OperatorTable
    with pytest.raises(AttributeError, match="OperatorTables"):
        config.OperatorTables  # noqa: B018
