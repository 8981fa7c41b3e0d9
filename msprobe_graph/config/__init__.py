"""What a capture is told to do: settings from config.json or YAML, checked at once, and the operator list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .load import load_settings
from .matching import entry_matcher
from .settings import ConfigError, OperatorChanges, Settings, Slice
from .watch import ConfigWatch

if TYPE_CHECKING:
    from .operators import OperatorTable

__all__ = [
    "ConfigError",
    "ConfigWatch",
    "OperatorChanges",
    "OperatorTable",
    "Settings",
    "Slice",
    "entry_matcher",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    """OperatorTable when it is first asked for: it imports torch, which reading settings does not need."""
    if name == "OperatorTable":
        from .operators import OperatorTable

        return OperatorTable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
