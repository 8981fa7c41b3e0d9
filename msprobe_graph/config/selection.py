"""Which entries a configuration asks for: scope, list, data_mode, tensor_list and risk_level, applied to entry names.

The rules are msProbe's. ``scope`` is a pair of full entry names, from and to, both included. ``list`` matches
substrings (or a regular expression, ``name-regex(...)``); at level mix a module whose name matches opens a window over
all that runs inside it. Where neither is given, ``risk_level`` decides which API calls are left out.
"""

from __future__ import annotations

from collections.abc import Callable

from .matching import entry_matcher
from .settings import Settings

_RISKS = {"ALL": {"core", "focus", "low"}, "FOCUS": {"core", "focus"}, "CORE": {"core"}}


class Selection:
    """The windows of one capture. `risk` gives "core", "focus" or "low" for an API name such as "Tensor.view".

    Asked once for each call, in execution order, because scope is a window in time.
    """

    def __init__(self, settings: Settings, risk: Callable[[str], str]) -> None:
        self.inputs = "input" in settings.data_mode
        self.outputs = "output" in settings.data_mode
        self.forward = "forward" in settings.data_mode
        self.backward = "backward" in settings.data_mode
        self._first: str | None = None
        self._last: str | None = None
        if settings.scope is not None:
            self._first, self._last = settings.scope
        self._listed = bool(settings.list)
        self._matched = entry_matcher(settings.list)
        self._save_all = settings.task == "tensor"
        self._save_some = bool(settings.tensor_list)
        self._saved = entry_matcher(settings.tensor_list)
        self._mix = settings.level == "mix"
        self._risks = _RISKS[settings.risk_level]
        self._risk = risk
        self._wanted_apis: dict[str, bool] = {}
        self.everything = self._first is None and not self._listed
        """Whether each call is wanted whatever went before it."""
        self.reset()

    def reset(self) -> None:
        """At the start of a step: all windows are closed."""
        self._in_scope = False
        self._open: set[str] = set()

    def enter(self, entry: str) -> None:
        """A module call begins."""
        if self.everything:
            return
        if entry == self._first:
            self._in_scope = True
        if self._mix and self._matched(entry):
            self._open.add(entry)

    def leave(self, entry: str) -> None:
        """A module call has ended."""
        if self.everything:
            return
        if entry == self._last:
            self._in_scope = False
        self._open.discard(entry)

    def wants_module(self, entry: str) -> bool:
        return self.everything or self._selected(entry)

    def may_want_module(self, prefix: str) -> bool:
        """Whether some call of the module named `prefix` (``Module.{path}.{Class}``) would be wanted, scope aside."""
        return self._first is None and (not self._listed or self._matched(f"{prefix}.forward.0"))

    def may_want_api(self, api: str) -> bool:
        """Whether some call of `api`, an entry's name without call number and direction, would be wanted."""
        if not self.everything:
            return True
        wanted = self._wanted_apis.get(api)
        if wanted is None:
            wanted = self._wanted_apis[api] = self._risk(api) in self._risks
        return wanted

    def wants_api(self, entry: str) -> bool:
        """To be asked for each call of an API that may be wanted, in order."""
        if self.everything:
            return True
        if entry == self._first:
            self._in_scope = True
        selected = self._selected(entry)
        if entry == self._last:
            self._in_scope = False
        return selected

    @property
    def saves_any(self) -> bool:
        """Whether tensors of any entry may be saved."""
        return self._save_all or self._save_some

    def saves(self, entry: str) -> bool:
        """Whether the tensors of `entry` are saved as files too."""
        return self._save_all or (self._save_some and self._saved(entry))

    def _selected(self, entry: str) -> bool:
        if self._first is not None and not self._in_scope:
            return False
        return not self._listed or bool(self._open) or self._matched(entry)
