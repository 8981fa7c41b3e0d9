"""The command msprobe-graph. The only room that prints.

::

    msprobe-graph show DUMP [--step N] [--rank R] [--entry SUBSTRING] [--suspicious]
    msprobe-graph compare A B [--step N] [--rank R] [--tolerance T] [--all]
    msprobe-graph verify FILE.py:FUNCTION [--level L] [--fidelity F] [--inner NAME] [--output FILE]

Exit codes: 0; 1 where two dumps part or taps change a program; 2 with one sentence on stderr for arguments that can't
be used, a wrong path among them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.reader import DumpError
from msprobe_graph.version import __version__

from .compare import compare_dumps
from .show import show
from .verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code.

    SystemExit(2) where argparse refuses them, SystemExit(0) after --help and --version.
    """
    options = _parser().parse_args(arguments)
    code = 0
    try:
        if options.command == "show":
            lines = show(options.dump, options.step, options.rank, options.entry, options.suspicious)
        elif options.command == "verify":
            backend_options = {"fidelity": options.fidelity, "inner": options.inner}
            judged = verify(options.target, options.level, backend_options, options.output)
            lines, code = iter(judged.lines), int(not judged.same)
        else:
            found = compare_dumps(options.a, options.b, options.step, options.rank, options.tolerance, options.all)
            lines, code = iter(found.lines), int(found.part)
        for line in lines:
            print(line)
        sys.stdout.flush()
    except (ConfigError, DumpError) as error:
        print(f"msprobe-graph: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msprobe-graph", description="Looks at dumps of msprobe_graph and of msProbe."
    )
    parser.add_argument("--version", action="version", version=f"msprobe-graph {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    show_parser = commands.add_parser(
        "show",
        help="print a step as a table",
        description="Prints a step as a table, a row for each tensor. Suspicious ones are marked with ! and a reason; "
        "!! marks the call that makes the first NaN or Inf. In a terminal, names are shortened to fit and long tables "
        "cut; piped, all is printed.",
    )
    show_parser.add_argument("dump", type=Path, metavar="DUMP", help="a dump_path, or a step or process folder in it")
    show_parser.add_argument("--step", type=int, metavar="N", help="the step (default: the first one captured)")
    show_parser.add_argument("--rank", type=int, metavar="R", help="the rank (default: the first one)")
    show_parser.add_argument("--entry", metavar="SUBSTRING", help="only entries whose name contains this")
    show_parser.add_argument("--suspicious", action="store_true", help="only what is suspicious")

    compare_parser = commands.add_parser(
        "compare",
        help="find where two dumps part",
        description="Compares two dumps of one program, entry by entry, and names the first whose inputs agree and "
        "whose output does not. Exit code 1 where they part, 0 where they agree. Two tensors are as far apart as the "
        "worst of their Max, Min, Mean and Norm: |b - a| / max(Norm / sqrt(number of values), |a|, |b|).",
    )
    compare_parser.add_argument("a", type=Path, metavar="A", help="a dump_path, or a step or process folder in it")
    compare_parser.add_argument("b", type=Path, metavar="B", help="the other; the table is in its order")
    compare_parser.add_argument("--step", type=int, metavar="N", help="only this step (default: all)")
    compare_parser.add_argument("--rank", type=int, metavar="R", help="only this rank (default: all)")
    compare_parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="how far apart still agrees (default: by the coarsest dtype in the dumps, float32 1e-4, bfloat16 and "
        "float16 2e-2)",
    )
    compare_parser.add_argument("--all", action="store_true", help="all entries that part, not only the first ones")

    verify_parser = commands.add_parser(
        "verify",
        help="check whether taps change a compiled model",
        description="Compiles a model with taps and without, calls each, and compares results, gradients and generated "
        "functions. Exit code 1 where they differ. FUNCTION takes nothing and returns (model, args) or (model, args, "
        "kwargs); gradients are compared if the model is in training mode.",
    )
    verify_parser.add_argument("target", metavar="FILE.py:FUNCTION", help="what builds the model and its inputs")
    verify_parser.add_argument("--level", choices=["L0", "L1", "mix"], default="mix", help="(default: mix)")
    verify_parser.add_argument("--fidelity", choices=["exact", "full"], default="exact", help="(default: exact)")
    verify_parser.add_argument("--inner", default="inductor", metavar="NAME", help="what compiles (default: inductor)")
    verify_parser.add_argument("--output", type=Path, metavar="FILE", help="write the verdicts there too, as JSON")
    return parser
