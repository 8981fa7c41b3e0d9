"""The import name ``msprobe.pytorch``, by which vllm-ascend and SGLang know their debugger.

Both import it only when they are asked to capture, and are installed without msProbe as a rule. SGLang loads
`install_as_msprobe` as a plugin (entry point ``sglang.srt.plugins``), vLLM's plugin calls it on Ascend.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import LazyLoader, find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "msprobe"
PART = "msprobe.pytorch"

_FILE = Path(__file__).with_name("pytorch.py")


def install_as_msprobe(replace: bool = False) -> bool:
    """Have ``from msprobe.pytorch import PrecisionDebugger, AclGraphDumper, acl_save, seed_all`` give ours, in this
    process.

    Where msProbe is installed its name is left to it, unless `replace` says otherwise; what was imported from it
    already stays what it is. Nothing of ours is loaded before the first of these names is asked for. Returns whether
    the name is ours now. May be called again.
    """
    if is_installed():
        return True
    if not replace and (NAME in sys.modules or find_spec(NAME) is not None):
        return False
    package = ModuleType(NAME, "msprobe_graph, under msProbe's name.")
    package.__spec__ = ModuleSpec(NAME, None, origin=str(_FILE), is_package=True)
    package.__path__ = []
    sys.modules[NAME] = package
    sys.modules[PART] = _lazily_loaded()
    vars(package)["pytorch"] = sys.modules[PART]
    return True


def is_installed() -> bool:
    """Whether the name is ours in this process."""
    spec = getattr(sys.modules.get(NAME), "__spec__", None)
    return spec is not None and spec.origin == str(_FILE)


def _lazily_loaded() -> ModuleType:
    spec = spec_from_file_location(PART, _FILE, loader=LazyLoader(SourceFileLoader(PART, str(_FILE))))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
