"""One architecture, eager against compiled: what sweep.py starts, in a process of its own for each.

Its model runs eagerly; compiled by Inductor as it is, twice; compiled with our backend and captured; eagerly and
captured. What came of it is written as a Report.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from agreement import Agreement, agreement
from architectures import Inputs, build
from torch import Tensor, nn
from torch._dynamo.utils import counters


@dataclasses.dataclass
class Report:
    """Of one architecture."""

    name: str
    error: str | None = None
    """Why it ended early."""
    deterministic: bool = True
    """Whether two untapped programs give the same bits."""
    untapped_error: float = 0.0
    """The largest difference of the untapped program's outputs from eager's, relative to the largest magnitude."""
    graphs: int = 0
    breaks: dict[str, int] = dataclasses.field(default_factory=dict)
    """The untapped program's graph breaks, by reason."""
    first_compile: float = 0.0
    untapped_compile: float = 0.0
    """CPU seconds, those of the C++ compiler with them: at the first time, and at the second, when all C++ functions
    are compiled."""
    captured_compile: float = 0.0
    captured_graphs: int = 0
    captured_breaks: dict[str, int] = dataclasses.field(default_factory=dict)
    equal: bool = True
    """Whether the captured program gives the bits of the untapped one."""
    agreement: Agreement | None = None
    """None where nothing was captured."""

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Report:
        return msgspec.convert(json.loads(file.read_text()), cls)


class Run(NamedTuple):
    """One call of a program that is compiled by it."""

    output: list[Tensor]
    seconds: float
    graphs: int
    breaks: dict[str, int]


class Examination:
    """Of one architecture at one dtype: each run has a model of its own, because a capture leaves its hooks on it."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._name = name
        self._dtype = dtype

    def untapped(self, report: Report) -> Run:
        """Without us."""
        model, inputs = self._fresh()
        eager = list(tensors(model(**inputs)))
        model, inputs = self._fresh()
        first = self._compiled(torch.compile(model), inputs)
        model, inputs = self._fresh()
        again = self._compiled(torch.compile(model), inputs)
        report.deterministic = bit_equal(first.output, again.output)
        report.untapped_error = max(map(difference, again.output, eager), default=0.0)
        report.graphs, report.breaks = again.graphs, again.breaks
        report.first_compile, report.untapped_compile = first.seconds, again.seconds
        return again

    def captured(self, report: Report, fidelity: str, untapped: Run) -> None:
        """With us, against the untapped run and eager's dump."""
        import msprobe_graph
        from msprobe_graph.dump import reader

        settings = {"task": "statistics", "level": "mix", "risk_level": "ALL"}
        backend = {"fidelity": fidelity, "inner": "inductor"}
        with tempfile.TemporaryDirectory() as folder:
            model, inputs = self._fresh()
            compiled = torch.compile(model, backend=msprobe_graph.msprobe_backend, options=backend)
            with msprobe_graph.PrecisionDebugger(settings, dump_path=f"{folder}/compiled").start(compiled):
                run = self._compiled(compiled, inputs)
            model, inputs = self._fresh()
            with msprobe_graph.PrecisionDebugger(settings, dump_path=f"{folder}/eager").start(model):
                model(**inputs)
            msprobe_graph.flush()
            dumps = [reader.read(reader.steps(f"{folder}/{each}")[0]) for each in ("eager", "compiled")]
        report.equal = bit_equal(run.output, untapped.output)
        report.captured_compile = run.seconds
        report.captured_graphs, report.captured_breaks = run.graphs, run.breaks
        report.agreement = agreement(*dumps)

    def _fresh(self) -> tuple[nn.Module, Inputs]:
        torch._dynamo.reset()
        counters.clear()
        return build(self._name, self._dtype)

    def _compiled(self, program: Callable[..., Any], inputs: Inputs) -> Run:
        begin = cpu_seconds()
        output = program(**inputs)
        seconds = cpu_seconds() - begin
        breaks = {reason.partition("\n")[0]: count for reason, count in counters["graph_break"].items()}
        return Run(list(tensors(output)), seconds, counters["stats"]["unique_graphs"], breaks)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of what a model returned, those in a key-value cache included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif type(value).__module__.startswith("transformers."):
        yield from tensors(vars(value))


def bit_equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))
        for one, other in zip(ones, others, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, relative to the second one's largest magnitude."""
    if torch.equal(one, other):
        return 0.0
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / other.abs().max())


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pin_compiler() -> None:
    """Have each compile done anew, and in this process, where its time is seen."""
    # force_disable_caches would compile the same C++ functions again and again, too.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.compile_threads = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("report", type=Path, help="the file to write")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--fidelity", help="left out: only what torch does without us")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pin_compiler()
    report = Report(options.name)
    examination = Examination(options.name, getattr(torch, options.dtype))
    try:
        with torch.no_grad():
            untapped = examination.untapped(report)
            if options.fidelity:
                examination.captured(report, options.fidelity, untapped)
    except Exception as error:
        report.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise
    finally:
        report.save(options.report)


if __name__ == "__main__":
    main()
