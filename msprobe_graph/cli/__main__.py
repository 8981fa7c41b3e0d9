"""``python -m msprobe_graph.cli``: the same as msprobe-graph."""

import sys

from . import main

sys.exit(main())
