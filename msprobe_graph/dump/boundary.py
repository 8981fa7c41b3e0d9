"""Capture never breaks the model it watches: the one place where its failures are caught, in taps and in the writer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from .records import Hole

log = logging.getLogger("msprobe_graph")

T = TypeVar("T")


class Boundary:
    """Runs taps. What one of them raises becomes a hole in `holes`, is logged with its traceback the first time, and
    goes no further."""

    def __init__(self) -> None:
        self.holes: list[Hole] = []
        self.failures = 0
        """How many taps have failed since the capture began."""

    def attempt(self, site: str, tap: Callable[..., T], *args: Any) -> T | None:
        """What `tap` returns, or None when it failed."""
        try:
            return tap(*args)
        except Exception as error:
            self.holes.append(Hole(site, f"capture failed: {type(error).__name__}: {error}"))
            if self.failures == 0:
                log.error(
                    "capture of %s failed; the model goes on, and the manifest lists what is missing",
                    site,
                    exc_info=error,
                )
            self.failures += 1
            return None
