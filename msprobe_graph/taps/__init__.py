"""What runs at a tap: a tensor's statistics and checksums."""

from msprobe_graph.dump.records import Statistics

from .checksum import crc32, xor_checksum
from .native import fingerprint
from .rows import Rows
from .unmeasurable import Unmeasurable

__all__ = ["Rows", "Statistics", "Unmeasurable", "crc32", "fingerprint", "xor_checksum"]
