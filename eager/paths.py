"""Where in the watched models a module or a parameter stands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_WRAPPER = "_orig_mod"
"""The name under which a torch.compile wrapper holds its module; it is in no path of ours."""


class Paths:
    """Qualified names of the modules of the watched models, and of their parameters and buffers."""

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._first: dict[str, str] = {}
        """By each path of a module that is reached by several: the first one, which its entries bear."""
        self._names: dict[int, list[str]] = {}
        """By the id of a parameter or buffer, which lives as long as its module."""

    def add(self, models: Mapping[str, nn.Module]) -> None:
        """Models by the prefix of their modules' names."""
        for prefix, model in models.items():
            first: dict[nn.Module, str] = {}
            for name, module in model.named_modules(remove_duplicate=False):
                path = bare(f"{prefix}.{name}")
                self._first[path] = first.setdefault(module, path)
                self._modules[path] = module
                for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        self._names.setdefault(id(tensor), []).append(f"{path}.{key}" if path else key)

    def clear(self) -> None:
        self._modules.clear()
        self._first.clear()
        self._names.clear()

    def module(self, path: str | None) -> nn.Module | None:
        """The module of that qualified name."""
        return None if path is None else self._modules.get(path)

    def lacks(self, path: str | None) -> bool:
        """Whether no module of that qualified name is watched, though others are."""
        return bool(self._modules) and path not in self._modules

    def first(self, path: str) -> str:
        """The path that a module's entries bear, for one of its paths."""
        return self._first.get(path, path)

    def prefix(self, tensor: torch.Tensor, path: str, running: str | None) -> str | None:
        """The module in which `tensor`, a parameter or buffer, is found under `path`; None if in none.

        running: the path of the module whose forward runs, which it is if there are several.
        """
        names = self._names.get(id(tensor), ())
        found = {name[: -len(path)].rstrip(".") for name in names if name == path or name.endswith(f".{path}")}
        if len(found) == 1:
            return found.pop()
        return running if running in found else None


def bare(path: str) -> str:
    """`path` without the wrappers of torch.compile."""
    return ".".join(part for part in path.split(".") if part not in ("", _WRAPPER))
