"""dump_enable of a running process: switched on and off by editing the config file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from .load import read_mapping
from .settings import MAPPING, ConfigError, Settings

INTERVAL = 1.0  # seconds between two looks at the file, at least

_log = logging.getLogger("msprobe_graph")


class ConfigWatch:
    """Knows whether dump_enable is true now. One per process that captures; `enabled()` is cheap enough for each step.

    The file is looked at with one stat() every INTERVAL seconds at most, and read again only when its
    modification time, size or inode (an editor that replaces it) changed; of what it then says only dump_enable
    counts. Whatever is wrong with the file, half-written, gone, no boolean there, the last value holds and a
    warning is logged, one until the file is good again. A file that no longer has dump_enable keeps the last value
    too, as in msProbe. Settings without dump_enable, or from a mapping, never touch the disk.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds and never goes back."""
        self._path = settings.source
        self._watched = settings.dump_enable is not None and settings.source != MAPPING
        self._enabled = settings.dump_enable is not False
        self._clock = clock
        self._next_look = float("-inf")
        self._seen: tuple[int, int, int] | None = None
        self._warned = False

    def enabled(self) -> bool:
        """Whether to capture now."""
        if self._watched and (now := self._clock()) >= self._next_look:
            self._next_look = now + INTERVAL
            self._look()
        return self._enabled

    def _look(self) -> None:
        try:
            status = Path(self._path).stat()
        except OSError as error:
            self._warn(f"{self._path}: the config file cannot be looked at ({error.strerror})")
            return
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return
        try:
            value = read_mapping(self._path).get("dump_enable")
        except ConfigError as error:  # perhaps half-written: read again at the next look, changed or not
            self._warn(str(error))
            return
        self._seen = seen
        if not isinstance(value, bool | None):
            self._warn(f"{self._path}: dump_enable is {value!r}; it must be true or false")
            return
        self._warned = False
        if value is not None and value != self._enabled:
            self._enabled = value
            _log.info("%s: dump_enable is now %s", self._path, "true" if value else "false")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s; capture stays %s", problem, "on" if self._enabled else "off")
