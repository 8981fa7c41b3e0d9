"""Which torch calls are captured, and under which name.

What is known about torch's functions is in operators.yaml beside this file; here is only how it is applied. A function
is listed by name and found again by identity, as the object that a TorchFunctionMode is handed; an operator of
torch.ops is named by a rule of its namespace.

    >>> table = OperatorTable()
    >>> table.name(torch.nn.functional.linear), table.name(torch.Tensor.__mul__), table.name(torch.ops.vllm.all_gather)
    ('Functional.linear', 'Tensor.mul', 'vllm.all_gather')
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.resources import files
from pkgutil import resolve_name
from typing import Any, Literal, TypeAlias

import msgspec
import torch
import yaml
from torch._ops import OpOverload, OpOverloadPacket

from .settings import OperatorChanges

Risk = Literal["core", "focus", "low"]
Operator: TypeAlias = OpOverload | OpOverloadPacket


class _Category(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Functions found as attributes of `root`."""

    root: str
    prefix: str
    names: tuple[str, ...]


class _Namespace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"excepted": "except"}):
    """Operators of one namespace of torch.ops: all but `excepted`, or only those in `renamed`."""

    prefix: str
    excepted: frozenset[str] = frozenset()
    renamed: dict[str, str] | None = None


class _Risks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names without their prefix, or "Prefix.*"; what is in neither is "focus"."""

    core: frozenset[str]
    low: frozenset[str]


class _OperatorList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """operators.yaml, typed."""

    categories: dict[str, _Category]
    namespaces: dict[str, _Namespace]
    ignored_namespaces: frozenset[str]
    fold: dict[str, str]
    positional: dict[str, tuple[str, ...]]
    risk: _Risks


@functools.cache
def _operator_list() -> _OperatorList:
    text = files(__package__).joinpath("operators.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    return msgspec.convert(yaml.load(text, loader), _OperatorList)


class OperatorTable:
    """The operator list of this torch, with a config's changes.

    `changes.add` names functions by category, or operators by namespace (``{"tensor": ["item"], "aten": ["detach"]}``);
    `remove` and `only` hold names as they stand in a dump ("Tensor.mul"; any spelling of it will do), or patterns
    ("Tensor.*", "vllm.*"). `namespaces` limits the custom operators to these namespaces of torch.ops; None: no limit.
    Raises ValueError, one sentence, for a name or category that does not exist.
    """

    def __init__(self, changes: OperatorChanges | None = None, namespaces: Iterable[str] | None = None) -> None:
        self._list = _operator_list()
        self._fold = dict(self._list.fold)
        self._names: dict[object, str | None] = {}
        self._added: set[str] = set()
        self._namespaces = None if namespaces is None else frozenset(namespaces)
        self._removed: tuple[str, ...] = ()
        self._only: tuple[str, ...] | None = None
        for category in self._list.categories.values():
            self._list_functions(category, category.names)
        if changes is not None:
            self._apply(changes)

    def name(self, func: object) -> str | None:
        """The name under which a call of `func` is captured, or None if it is not.

        `func` is what arrives at ``__torch_function__`` or ``__torch_dispatch__``: a function, method descriptor, slot
        wrapper, getter (``torch.Tensor.T.__get__``), OpOverloadPacket or OpOverload. The calls inside one that is not
        captured may be.
        """
        if func in self._names:
            return self._names[func]
        if isinstance(func, Operator):
            name = self._names[func] = self._operator_name(func)
            return name
        return None

    def aten_name(self, overload: OpOverload) -> str | None:
        """The name of an operator at level L2, "Aten.addmm" for aten.addmm.default, or None."""
        return self.name(overload)

    def fold(self, name: str) -> str:
        """Our name for any spelling of an API, such as msProbe's: "Tensor.mul" for "Tensor.__rmul__"."""
        return self._fold.get(name, name)

    def as_written(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call to record, where callers write them.

        A Python function may ask the mode with arguments by keyword that it was itself given by position, as
        F.layer_norm does with its weight. The call itself can be made with either.
        """
        order = self._list.positional.get(name)
        if order is None:
            return args, kwargs
        kwargs = dict(kwargs)
        for parameter in order:
            if parameter not in kwargs:
                break
            args += (kwargs.pop(parameter),)
        return args, kwargs

    def risk(self, name: str) -> Risk:
        """How prone to numerical error a captured API is; "low" are those that only move or convert data."""
        prefix, _, api = self.fold(name).partition(".")
        risks = self._list.risk
        if api in risks.core or f"{prefix}.*" in risks.core:
            return "core"
        return "low" if api in risks.low else "focus"

    def _list_functions(self, category: _Category, names: Iterable[str]) -> list[str]:
        """Lists those of `names` that this torch has; answers with those it lacks."""
        root = resolve_name(category.root)
        lacking = []
        for attribute in names:
            func = getattr(root, attribute, None)
            if func is None:
                lacking.append(attribute)
                continue
            if not callable(func):  # a property: what arrives is its getter
                func = func.__get__
            name = f"{category.prefix}.{attribute}"
            canonical = self._names.setdefault(func, self.fold(name))
            if canonical is not None and canonical != name:
                self._fold[name] = canonical
        return lacking

    def _operator_name(self, operator: Operator) -> str | None:
        namespace, name = str(operator).split(".")[:2]
        rule = self._list.namespaces.get(namespace)
        if f"{namespace}.{name}" in self._added:
            captured = f"{rule.prefix if rule else namespace}.{name}"
        elif rule is not None:
            if name in rule.excepted or (rule.renamed is not None and name not in rule.renamed):
                return None
            captured = f"{rule.prefix}.{rule.renamed[name] if rule.renamed is not None else name}"
        elif self._captured_whole(namespace):
            captured = f"{namespace}.{name}"
        else:
            return None
        return captured if self._wanted(captured) else None

    def _captured_whole(self, namespace: str) -> bool:
        if self._namespaces is not None:
            return namespace in self._namespaces
        return namespace not in self._list.ignored_namespaces

    def _wanted(self, name: str) -> bool:
        if self._only is not None:
            return any(fnmatchcase(name, pattern) for pattern in self._only)
        return not any(fnmatchcase(name, pattern) for pattern in self._removed)

    def _apply(self, changes: OperatorChanges) -> None:
        for category, names in changes.add.items():
            self._add(category, names)
        self._removed = tuple(self._known(name, "remove") for name in changes.remove)
        self._only = None if changes.only is None else tuple(self._known(name, "only") for name in changes.only)
        self._names = {func: name for func, name in self._names.items() if name is not None and self._wanted(name)}

    def _add(self, category: str, names: Iterable[str]) -> None:
        categories = self._list.categories
        namespaces = {*self._list.namespaces, *self._list.ignored_namespaces}
        if category in categories:
            root = categories[category].root
            lacking = self._list_functions(categories[category], names)
        elif category in namespaces:
            root = f"torch.ops.{category}"
            lacking = [name for name in names if not hasattr(getattr(torch.ops, category), name)]
            self._added.update(f"{category}.{name}" for name in names)
        else:
            raise ValueError(
                f"operators.add has the category {category!r}, but a category is one of {', '.join(categories)}, or a "
                f"namespace of torch.ops of which not all is captured, such as aten"
                f"{_suggestion(category, [*categories, *namespaces])}"
            )
        if lacking:
            raise ValueError(
                f"operators.add.{category} names {lacking[0]!r}, which {root} does not have"
                f"{_suggestion(lacking[0], dir(resolve_name(root)))}"
            )

    def _known(self, name: str, key: str) -> str:
        """`name`, folded: something listed, a pattern that matches something listed, or an operator of torch.ops.

        Of the latter only aten's can be checked: the others are known once what registers them has been imported.
        """
        functions = {category.prefix for category in self._list.categories.values()}
        rules = {rule.prefix: rule.renamed or {} for rule in self._list.namespaces.values()}
        listed = {name for name in self._names.values() if name is not None}
        listed.update(f"{prefix}.{api}" for prefix, renamed in rules.items() for api in renamed.values())
        folded = self.fold(name)
        if any(fnmatchcase(one, folded) for one in listed):
            return folded
        prefix, dot, api = folded.partition(".")
        if prefix == self._list.namespaces["aten"].prefix:
            known = "*" in api or hasattr(torch.ops.aten, api)
        elif prefix in functions:
            known = False
        else:
            known = prefix in rules or not difflib.get_close_matches(prefix.title(), {*functions, *rules}, cutoff=0.75)
        if dot and known:
            return folded
        suggestion = _suggestion(folded, listed) if dot else _suggestion(f"Tensor.{name}", listed)
        raise ValueError(f"operators.{key} names {name!r}, which is not in the operator list{suggestion}")


def _suggestion(wrong: str, right: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, right, n=1, cutoff=0.8)
    return f"; did you mean {close[0]!r}?" if close else ""
