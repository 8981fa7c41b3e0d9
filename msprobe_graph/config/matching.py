"""What the elements of `list` and `tensor_list` mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def entry_matcher(elements: Iterable[str]) -> Callable[[str], bool]:
    """A function that tells whether an entry name is meant by any of these elements of `list` or `tensor_list`.

    An element is a part of the name, or `name-regex(...)`, whose expression must match the whole name (as
    MindSpore, where msProbe has this spelling from, does it). No elements mean no entry: that an empty `list`
    captures everything is for the caller to know. Raises re.error for an invalid expression.

        >>> wanted = entry_matcher(["linear", "name-regex(Tensor[.]mul[.].*)"])
        >>> wanted("Functional.linear.0.forward"), wanted("Tensor.mul.3.backward"), wanted("Tensor.add.0.forward")
        (True, True, False)
    """
    parts: tuple[str, ...] = ()
    expressions: tuple[re.Pattern[str], ...] = ()
    for element in elements:
        if element.startswith("name-regex(") and element.endswith(")"):
            expressions += (re.compile(element[len("name-regex(") : -1]),)
        else:
            parts += (element,)

    def wanted(name: str) -> bool:
        return any(part in name for part in parts) or any(regex.fullmatch(name) for regex in expressions)

    return wanted
