"""From a config file, or a mapping, to checked `Settings`. Everything wrong with it is found here, at set-up."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml

from .matching import entry_matcher
from .settings import (
    LEFT_ALONE,
    MAPPING,
    NUMBER_MAX,
    OTHER_TASKS,
    ConfigError,
    ConfigFile,
    Level,
    OperatorChanges,
    Settings,
    Task,
    TaskBlock,
    Trigger,
    field_doc,
)

_Form = TypeVar("_Form", bound=msgspec.Struct)

_OPERATOR = re.compile(r"(?!Module\.)[^.]+\..+\.\d+\.(forward|backward)")
_MODULE = re.compile(r"Module\..+\.(forward|backward)\.\d+")
_SCOPE_NAMES: dict[Level, tuple[re.Pattern[str], ...]] = {
    "L0": (_MODULE,),
    "L1": (_OPERATOR,),
    "L2": (_OPERATOR,),
    "mix": (_OPERATOR, _MODULE),
    "debug": (_OPERATOR, _MODULE),
}
_UNITS = {"": 1, **{prefix: 1000**i for i, prefix in enumerate("kmgtp", 1)}}
_UNITS.update({f"{prefix}i": 1024**i for i, prefix in enumerate("kmgtp", 1)})
_SHOWN = 100  # characters of a wrong value that an error quotes


def load_settings(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    task: str | None = None,
    dump_path: str | os.PathLike[str] | None = None,
    level: str | None = None,
    step: Sequence[int | str] | None = None,
    rank: Sequence[int | str] | None = None,
) -> Settings:
    """The settings in a .json, .yaml or .yml file, or in a mapping of the same form.

    The keyword arguments are PrecisionDebugger's and take the place of what the source says; None is not given.
    In the source null is the same as leaving the key out, but for risk_level, where msProbe takes it as ALL.
    Raises ConfigError.
    """
    if isinstance(source, Mapping):
        path, given = MAPPING, dict(source)
    else:
        path = str(Path(source).absolute())
        given = read_mapping(path)
    if "risk_level" in given and given["risk_level"] is None:
        given["risk_level"] = "ALL"
    if isinstance(dump_path, os.PathLike):
        dump_path = os.fspath(dump_path)
    named = {"task": task, "dump_path": dump_path, "level": level, "step": step, "rank": rank}
    arguments = {key: value for key, value in named.items() if value is not None}
    given |= arguments
    where = f"{path} with the arguments {', '.join(arguments)}" if arguments else path

    if given.get("task") in OTHER_TASKS:
        raise _wrong(ConfigFile, where, "task", given["task"], "a task of msProbe that this package does not capture")
    top = _checked(ConfigFile, given, where, others=(*get_args(Task), *LEFT_ALONE))
    block_given = given.get(top.task)
    if not isinstance(block_given, Mapping | None):
        raise ConfigError(
            f"{where}: {top.task} is {_show(block_given)}, but it must be an object that holds any of "
            f"{', '.join(TaskBlock.__struct_fields__)}"
        )
    block = _checked(TaskBlock, block_given or {}, where, inside=top.task)

    return Settings(
        source=path,
        task=top.task,
        dump_path=_dump_path(top.dump_path, where),
        rank=_numbers(top.rank, where, "rank"),
        step=_numbers(top.step, where, "step"),
        level=top.level,
        async_dump=top.async_dump,
        dump_enable=top.dump_enable,
        extra_info=top.extra_info,
        precision=top.precision,
        risk_level=top.risk_level,
        custom_op_namespaces=top.custom_op_namespaces,
        operators=_operators(top.operators, where),
        max_bytes=_bytes(top.max_bytes, where, "max_bytes"),
        graph_copy_bytes=_bytes(top.graph_copy_bytes, where, "graph_copy_bytes"),
        max_steps=top.max_steps,
        keep_last=top.keep_last,
        flush_on=_flush_on(top, block, where),
        flush_sites=_flush_sites(top, where),
        scope=_scope(block.scope, top, where),
        list=_names(TaskBlock, block.list, where, f"{top.task}.list"),
        tensor_list=_names(TaskBlock, block.tensor_list, where, f"{top.task}.tensor_list"),
        data_mode=_data_mode(block.data_mode, where, f"{top.task}.data_mode"),
        summary_mode=block.summary_mode,
        slice=block.slice,
        request_id=block.request_id or None,
    )


def read_mapping(path: str) -> dict[str, Any]:
    """What a .json, .yaml or .yml file holds, unchecked but for being a mapping at the top. Raises ConfigError."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: the name of a config file must end in .json, .yaml or .yml, not in {_show(suffix)}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: the config file cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: a config file must be UTF-8 text, but byte {error.start} is not") from None
    try:
        content = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{at}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config file must hold an object of keys and values, not {_show(content)}")
    return content


def _checked(
    form: type[_Form], given: Mapping[str, Any], where: str, inside: str = "", others: Sequence[str] = ()
) -> _Form:
    """`given` as `form`, key by key, so that an error can name the key. `others` are keys that pass unlooked at."""
    fields = {field.name: field for field in msgspec.structs.fields(form)}
    values = {}
    for key, value in given.items():
        if key not in fields and key not in others:
            allowed = [*fields, *others]
            close = difflib.get_close_matches(str(key), allowed, n=1)
            meant = f", did you mean {close[0]}?" if close else ""
            holder = inside or "the top level"
            raise ConfigError(f"{where}: unknown key {_show(key)} in {holder}{meant} (allowed: {', '.join(allowed)})")
        if key in fields and value is not None:
            try:
                values[key] = msgspec.convert(value, fields[key].type)
            except msgspec.ValidationError:
                raise _wrong(form, where, f"{inside}.{key}" if inside else key, value) from None
    for field in fields.values():
        if field.required and field.name not in values:
            raise ConfigError(f"{where}: {field.name} is missing; it must be {_values(form, field.name)}")
    return form(**values)


def _wrong(form: type[msgspec.Struct], where: str, key: str, value: object, why: str = "") -> ConfigError:
    """The error for a wrong value of `key` ("level", or "statistics.scope" in a block)."""
    reason = f", {why}" if why else ""
    return ConfigError(f"{where}: {key} is {_show(value)}{reason}; it must be {_values(form, key.split('.')[-1])}")


def _values(form: type[msgspec.Struct], name: str) -> str:
    """What the field's documentation says it may hold."""
    (field,) = (field for field in msgspec.structs.fields(form) if field.name == name)
    values: str = (field_doc(field).extra or {})["values"]
    return values


def _show(value: object) -> str:
    """A value as it would stand in a JSON file, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:  # YAML and Python have values that JSON lacks
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _numbers(written: tuple[int | str, ...], where: str, key: str) -> frozenset[int]:
    """Ranks or steps, ranges written out."""
    numbers: set[int] = set()
    for element in written:
        first, _, last = str(element).partition("-")
        begin, end = int(first), int(last or first)
        if begin > end:
            raise _wrong(ConfigFile, where, key, element, "a range that ends before it begins")
        if end > NUMBER_MAX:
            raise _wrong(ConfigFile, where, key, element, "too large")
        numbers.update(range(begin, end + 1))
    return frozenset(numbers)


def _bytes(written: int | str | None, where: str, key: str) -> int | None:
    if not isinstance(written, str):
        return written
    text = written.strip()
    unit = text.lstrip("0123456789. ")
    value = int(Decimal(text.removesuffix(unit)) * _UNITS[unit.removesuffix("B").lower()])
    if value < 1:
        raise _wrong(ConfigFile, where, key, written)
    return value


def _dump_path(written: str, where: str) -> str:
    """Absolute, and a directory or a place where one can be made."""
    try:
        path = Path(written).expanduser().resolve()
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
    except (OSError, ValueError, RuntimeError) as error:  # no access, a name too long, a NUL in it, no such user's home
        raise _wrong(ConfigFile, where, "dump_path", written, f"which is no usable path ({error})") from None
    if not existing.is_dir():
        raise _wrong(ConfigFile, where, "dump_path", written, f"but {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _wrong(ConfigFile, where, "dump_path", written, f"but {existing} may not be written to")
    return str(path)


def _operators(changes: OperatorChanges, where: str) -> OperatorChanges:
    if changes.only is not None and (changes.add or changes.remove):
        written = msgspec.to_builtins(changes)
        raise _wrong(ConfigFile, where, "operators", written, 'where "only" does not stand alone')
    return changes


def _scope(written: tuple[str, ...], top: ConfigFile, where: str) -> tuple[str, str] | None:
    if not written:
        return None
    key = f"{top.task}.scope"
    if len(written) != 2:
        raise _wrong(TaskBlock, where, key, written)
    for name in written:
        if not any(pattern.fullmatch(name) for pattern in _SCOPE_NAMES[top.level]):
            raise _wrong(TaskBlock, where, key, written, f"where {_show(name)} is no full name of level {top.level}")
    return written[0], written[1]


def _names(form: type[msgspec.Struct], written: tuple[str, ...], where: str, key: str) -> tuple[str, ...]:
    for element in written:
        try:
            entry_matcher([element])
        except re.error as error:
            raise _wrong(form, where, key, element, f"an invalid expression ({error})") from None
    return written


def _flush_on(top: ConfigFile, block: TaskBlock, where: str) -> tuple[Trigger, ...]:
    if top.keep_last is None:
        if top.flush_on is not None:
            raise _wrong(ConfigFile, where, "flush_on", top.flush_on, "but keep_last is not given")
        return ()
    flush_on = top.flush_on or ("nan", "inf")
    if "request" in flush_on and not block.request_id:
        raise _wrong(ConfigFile, where, "flush_on", flush_on, f"but {top.task}.request_id is not given")
    if block.summary_mode == "xor" and not {"nan", "inf"}.isdisjoint(flush_on):
        raise _wrong(ConfigFile, where, "flush_on", flush_on, f"but {top.task}.summary_mode xor knows neither")
    return flush_on


def _flush_sites(top: ConfigFile, where: str) -> tuple[str, ...]:
    if top.flush_sites:
        if top.keep_last is None:
            raise _wrong(ConfigFile, where, "flush_sites", top.flush_sites, "but keep_last is not given")
        if top.flush_on is not None and {"nan", "inf"}.isdisjoint(top.flush_on):
            raise _wrong(ConfigFile, where, "flush_sites", top.flush_sites, 'but flush_on has neither "nan" nor "inf"')
    return _names(ConfigFile, top.flush_sites, where, "flush_sites")


def _data_mode(written: tuple[str, ...], where: str, key: str) -> frozenset[str]:
    """Expanded as msProbe does it: where no direction is named both are meant, and so with the sides."""
    modes = frozenset(written)
    if "all" in modes and len(written) > 1:
        raise _wrong(TaskBlock, where, key, written, 'where "all" does not stand alone')
    directions, sides = frozenset({"forward", "backward"}), frozenset({"input", "output"})
    return (modes & directions or directions) | (modes & sides or sides)
