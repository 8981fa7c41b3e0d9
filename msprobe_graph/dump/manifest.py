"""manifest.json: what a step should have captured, what it did capture, and the reason for each hole.

::

    {"schema_version": 1, "status": "finished", "step": 0, "process": "rank0", "mode": "eager", "device": "cpu",
     "package": "0.1.0", "torch": "2.13.0+cpu", "model": "Qwen2ForCausalLM", "config": {"task": "statistics", ...},
     "entries": 212, "sharding": {}, "sites": {"expected": 40, "captured": 38},
     "holes": [{"site": "Module.model.layers.ModuleList", "reason": "its forward did not run in this step"}, ...],
     "requests": [{"request": "cmpl-1", "begin": 0, "end": 12, "phase": "prefill", "positions": [0, 12]}],
     "graphs": []}

Where compiled graphs ran, "mode" is "graph" and "graphs" tells of each what compiled it and, if this process has
compiled it, the scheduler's nodes before and after the taps came in::

    {"inner": "inductor", "fidelity": "exact", "calls": 40, "compiled": [{"pass": "inference", "tapped": 31,
     "nodes_before": ["op0_op1", "op2", ...], "nodes_after": ["op0_op1", "op2", "tap", ...]}]}
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import msgspec
import torch

from .encode import SameAgain, tree
from .folder import SCHEMA_VERSION
from .records import Step


class Provenance(msgspec.Struct):
    """What is the same for all steps of one capture."""

    process: str
    """``rank<R>`` or ``proc<PID>``."""
    device: str
    package: str
    model: str | None
    task: str
    level: str
    config: dict[str, Any]
    run: str
    sharding: dict[str, Any] = {}
    """Which sites hold a part of their value only, where somebody has told."""


class Manifests:
    """Encodes the manifest of one step after the other; a field that is as before is not encoded again."""

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self._fields: defaultdict[str, SameAgain] = defaultdict(SameAgain)

    def encode(self, step: Step) -> bytes:
        return self.frame(step).filled(step)

    def frame(self, step: Step) -> Frame:
        """That of the step and of all that differ from it in nothing but what a frame is filled with."""
        provenance = self._provenance
        fields = {
            "schema_version": SCHEMA_VERSION,
            "status": "finished" if step.finished else "unfinished",
            "step": None,
            "mode": "graph" if step.graphs else "eager",
            **{name: getattr(provenance, name) for name in ("process", "run", "device", "package")},
            "torch": str(torch.__version__),
            "model": provenance.model,
            "config": provenance.config,
            "entries": sum(len(block.entries) for block in step.blocks) + len(step.entries),
            "sharding": provenance.sharding,
            "sites": {"expected": step.expected, "captured": step.captured},
            "holes": step.holes,
            "requests": None,
            "graphs": list(step.graphs.values()),
            "flushed": step.flushed,
        }
        lines = [b' "%b": %b' % (name.encode(), self._fields[name].encode(value)) for name, value in fields.items()]
        number, requests = list(fields).index("step"), list(fields).index("requests")
        begin, between, end = (
            b",\n".join(piece) for piece in (lines[:number], lines[number + 1 : requests], lines[requests + 1 :])
        )
        return Frame(b'{\n%b,\n "step": ' % begin, b',\n%b,\n "requests": ' % between, b",\n%b\n}\n" % end)


class Frame(NamedTuple):
    """A manifest but for the step's number and, behind `between`, its requests."""

    begin: bytes
    between: bytes
    end: bytes

    def filled(self, step: Step) -> bytes:
        return b"%b%d%b%b%b" % (self.begin, step.number, self.between, tree(step.requests), self.end)
