"""Captures what a PyTorch model computes while it runs, so that two runs can be compared.

::

    from msprobe_graph import PrecisionDebugger, seed_all

    seed_all(1234)
    debugger = PrecisionDebugger("config.json")
    with debugger.start(model):
        model(batch)
"""

from msprobe_graph.debugger.precision_debugger import PrecisionDebugger
from msprobe_graph.debugger.seeds import seed_all
from msprobe_graph.debugger.sessions import flush
from msprobe_graph.version import __version__

__all__ = ["PrecisionDebugger", "__version__", "flush", "seed_all"]
