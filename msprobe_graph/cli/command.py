"""What the commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command adds its parser."""


class Outcome(NamedTuple):
    """What a command has to say."""

    lines: Iterable[str]
    """To print; DumpError may come while they are made."""
    code: int = 0
    """The exit code."""
