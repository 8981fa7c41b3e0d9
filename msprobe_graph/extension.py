"""Where installing the package has put its compiled code. All of it is optional."""

import ctypes
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


def shared_library(folder: Path, name: str) -> Path | None:
    """The file of the shared library of that name in `folder`; None if it was not compiled."""
    paths = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def compiled_function(
    folder: Path, library: str, name: str, result: Any, *arguments: Any, locked: bool = False
) -> Callable[..., int] | None:
    """The C function `name` of a library in `folder`, of these ctypes. It runs without the interpreter's lock, unless
    that is to stay `locked`, for what takes no longer than to get it back. None if the library was not compiled, or
    can't be loaded."""
    path = shared_library(folder, library)
    if path is None:
        return None
    try:
        found = getattr((ctypes.PyDLL if locked else ctypes.CDLL)(str(path)), name)
    except (OSError, AttributeError):
        return None
    found.restype, found.argtypes = result, arguments
    return found  # type: ignore[no-any-return]
