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
from typing import Any

import msgspec
import torch

from .encode import SameAgain
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
        provenance = self._provenance
        fields = {
            "schema_version": SCHEMA_VERSION,
            "status": "finished" if step.finished else "unfinished",
            "step": step.number,
            "mode": "graph" if step.graphs else "eager",
            **{name: getattr(provenance, name) for name in ("process", "run", "device", "package")},
            "torch": str(torch.__version__),
            "model": provenance.model,
            "config": provenance.config,
            "entries": sum(len(block.entries) for block in step.blocks) + len(step.entries),
            "sharding": provenance.sharding,
            "sites": {"expected": step.expected, "captured": step.captured},
            "holes": step.holes,
            "requests": step.requests,
            "graphs": list(step.graphs.values()),
            "flushed": step.flushed,
        }
        lines = (b' "%b": %b' % (name.encode(), self._fields[name].encode(value)) for name, value in fields.items())
        return b"{\n%b\n}\n" % b",\n".join(lines)
