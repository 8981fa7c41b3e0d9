"""The code that Inductor generates, function by function. Private Inductor; tested with torch 2.13."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch._inductor.graph import GraphLowering

UNCACHED = {"force_disable_caches": True}
"""Inductor's options under which it generates code at each compilation."""
PINNED = {"deterministic": True}
"""Inductor's options under which two compilations generate the same kernels: nothing is tuned by timing."""


class Function(NamedTuple):
    """A generated kernel."""

    name: str
    source: str


_KERNEL = re.compile(r"^(\w+) = async_compile\.\w+\((.*?)^(?:''', *[^\n]*|''')\)$", re.DOTALL | re.MULTILINE)


@contextmanager
def generated_code() -> Iterator[list[str]]:
    """A context that gathers the programs that Inductor generates in it, as Python source."""
    programs: list[str] = []
    before = GraphLowering.save_output_code
    GraphLowering.save_output_code = programs.append
    try:
        yield programs
    finally:
        GraphLowering.save_output_code = before


def functions_of(programs: list[str]) -> list[Function]:
    """The kernels in generated programs: everything that computes but the calls of library functions."""
    return [Function(*match) for program in programs for match in _KERNEL.findall(program)]
