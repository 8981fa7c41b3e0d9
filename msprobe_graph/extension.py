"""Where installing the package has put its compiled code. All of it is optional."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def shared_library(folder: Path, name: str) -> Path | None:
    """The file of the shared library of that name in `folder`; None if it was not compiled."""
    paths = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
