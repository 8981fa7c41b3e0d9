"""The command msprobe-graph. The only room that prints.

::

    msprobe-graph show DUMP [--step N] [--rank R] [--entry SUBSTRING] [--suspicious]
    msprobe-graph compare A B [--step N] [--rank R] [--tolerance T] [--all]
    msprobe-graph doctor [--npu]
    msprobe-graph verify FILE.py:FUNCTION [--level L] [--fidelity F] [--inner NAME] [--output FILE]

Exit codes: 0; 1 where two dumps part, taps change a program or a way of capturing fails; 2 with one sentence on stderr
for arguments that can't be used, a wrong path among them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.reader import DumpError
from msprobe_graph.version import __version__

from . import compare, doctor, show, verify
from .command import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code.

    SystemExit(2) where argparse refuses them, SystemExit(0) after --help and --version.
    """
    options = _parser().parse_args(arguments)
    try:
        outcome: Outcome = options.run(options)
        for line in outcome.lines:
            print(line)
        sys.stdout.flush()
    except (ConfigError, DumpError) as error:
        print(f"msprobe-graph: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msprobe-graph", description="Looks at dumps of msprobe_graph and of msProbe."
    )
    parser.add_argument("--version", action="version", version=f"msprobe-graph {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (show, compare, verify, doctor):
        command.add_parser(commands)
    return parser
