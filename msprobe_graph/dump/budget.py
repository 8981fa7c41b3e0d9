"""How many bytes a capture may take."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from .ring import free_memory


class Budget:
    """Counts bytes on disk, and bytes accepted for it or for a ring, against `limit`. For several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._kept = 0
        """Of these, bytes that a ring may give back."""
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        return self.taken - self._kept >= self.limit

    def take(self, size: int, kept: bool) -> bool:
        """Whether `size` bytes are to be had; then they are taken. Those that are `kept` may be given back, so when
        there is no room now there may be later; else there is none from now on."""
        with self._lock:
            if self.taken + size > self.limit:
                if not kept:
                    self.taken = self.limit
                return False
            self.taken += size
            if kept:
                self._kept += size
            return True

    def add(self, size: int) -> None:
        """Count bytes that are written in any case."""
        with self._lock:
            self.taken += size

    def spend(self, size: int) -> None:
        """Bytes that were kept go to the disk."""
        with self._lock:
            self._kept -= size

    def give_back(self, size: int) -> None:
        """Bytes that were kept are kept no longer."""
        with self._lock:
            self.taken -= size
            self._kept -= size

    def has(self, size: int) -> bool:
        return self.taken + size <= self.limit

    def could_have(self, size: int) -> bool:
        """Whether there would be room if all that is kept were given back."""
        return self.taken - self._kept + size <= self.limit


def spare_bytes(dump_path: Path, in_memory: bool) -> int:
    """What a dump may take when nobody says: four fifths of the free disk, of the free memory half."""
    on_disk = shutil.disk_usage(dump_path).free * 4 // 5
    memory = free_memory() if in_memory else None
    return on_disk if memory is None else min(on_disk, memory // 2)
