"""What dynamo finds in our module hooks, if it comes upon them: nothing.

The hooks are kept out of its way (`unhooked`), but ``torch._dynamo.reset()`` forgets about that. The only file of this
package that dynamo may trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .modules import ModuleTap


@torch.compiler.substitute_in_graph(ModuleTap.enter)
def enter(self: ModuleTap, module: nn.Module, args: Any, kwargs: Any = None) -> None:
    return None


@torch.compiler.substitute_in_graph(ModuleTap.leave)
def leave(self: ModuleTap, module: nn.Module, args: Any, output: Any) -> None:
    return None
