"""The documentation of the config file that is made from the code.

Two commands print it, to be run again after a change of settings.py:

    python -m msprobe_graph.config.schema            the JSON Schema         (docs/config.schema.json)
    python -m msprobe_graph.config.schema --table    the tables of fields    (in docs/configuration.md)
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any, get_args

import msgspec

from .settings import LEFT_ALONE, ConfigFile, Task, TaskBlock, field_doc


def json_schema() -> dict[str, Any]:
    """A JSON Schema, draft 2020-12, of the config file.

    It is as strict as `load_settings`, but for what a schema can't say: that a range doesn't end before it begins,
    that a regular expression is valid, that the names in scope suit the level, and that dump_path can be made. Nor
    does it look whether the task's block suits flush_on.
    """
    _, components = msgspec.json.schema_components([ConfigFile, TaskBlock], ref_template="#/$defs/{name}")
    for component in components.values():
        component["description"] = inspect.cleandoc(component["description"])
    for form in (ConfigFile, TaskBlock):
        component = components[form.__name__]
        component["properties"] = {
            name: field if name in component["required"] else _nullable(field)
            for name, field in component["properties"].items()
        }
    top = components.pop("ConfigFile")
    top["properties"] |= {name: {"description": "Left alone."} for name in LEFT_ALONE}
    top["properties"] |= {task: {"description": f"Read at task {task}."} for task in get_args(Task)}
    block = {"anyOf": [{"$ref": "#/$defs/TaskBlock"}, {"type": "null"}]}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "title": "msprobe-graph config file",
        "description": "The settings of a capture. null is the same as leaving a key out, but at risk_level (ALL).",
        # Of the tasks' blocks only the one that the task reads is checked.
        "if": {"properties": {"task": {"const": "tensor"}}, "required": ["task"]},
        "then": {"properties": {"tensor": block}},
        "else": {"properties": {"statistics": block}},
        "allOf": [_only_with_keep_last("flush_on"), _only_with_keep_last("flush_sites")],
        "$defs": components,
    }
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))  # the defaults are tuples and structs
    return plain


def _only_with_keep_last(name: str) -> dict[str, Any]:
    given = {"properties": {name: {"type": "array", "minItems": 1}}, "required": [name]}
    return {"if": given, "then": {"properties": {"keep_last": {"type": "integer"}}, "required": ["keep_last"]}}


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may also be null, its description and default kept where editors look for them."""
    if {"type": "null"} in field.get("anyOf", ()):
        return field
    annotations: dict[str, Any] = {key: field.pop(key) for key in ("description", "default") if key in field}
    return {**annotations, "anyOf": [field, {"type": "null"}]}


def tables() -> str:
    """The fields as two Markdown tables: the top level, and the block named after the task."""
    return (
        f"### At the top level\n\n{_table(ConfigFile)}\n\n"
        f"### In the block named after the task (`statistics` or `tensor`)\n\n{_table(TaskBlock)}\n"
    )


def _table(form: type[msgspec.Struct]) -> str:
    rows = ["| Field | Values | Default | Meaning |", "| --- | --- | --- | --- |"]
    for field in msgspec.structs.fields(form):
        doc = field_doc(field)
        extra = doc.extra or {}
        default = extra["default"] or ("required" if field.required else f"`{json.dumps(field.default)}`")
        cells = (f"`{field.name}`", extra["values"], default, doc.description or "")
        rows.append("| " + " | ".join(cell.replace("|", r"\|").replace("<", r"\<") for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        sys.stdout.write(tables())
    elif not sys.argv[1:]:
        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    else:
        sys.exit("usage: python -m msprobe_graph.config.schema [--table]")
