"""vLLM's plugin (entry point ``vllm.general_plugins``): captures each scheduler step of every worker, when asked to.

Asked for by ``--additional-config '{"dump_config_path": "config.json"}'``, by ``'{"dump_config": {...}}'``, or by the
environment variable MSPROBE_GRAPH_CONFIG. vLLM loads every plugin in each of its processes, so this module imports
nothing of ours: the rest comes with the first worker that is to capture. Tested with vLLM 0.32.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

CONFIG_VARIABLE = "MSPROBE_GRAPH_CONFIG"
"""Environment variable that names the config file; what --additional-config says goes before it."""
REPLACE_VARIABLE = "MSPROBE_GRAPH_AS_MSPROBE"
"""Environment variable that, set to 1, has vllm-ascend capture with ours even where msProbe is installed."""
CONFIG_PATH_KEY = "dump_config_path"
CONFIG_KEY = "dump_config"

log = logging.getLogger("vllm.msprobe_graph")  # below "vllm", so that it comes out with vLLM's own messages


def register() -> None:
    """Let each worker that this process makes ask whether it is to capture. May be called again."""
    from vllm.v1.worker.worker_base import WorkerBase

    original = WorkerBase.__init__
    if hasattr(original, "asks_for_capture"):
        return

    @functools.wraps(original)
    def __init__(worker: Any, *args: Any, **kwargs: Any) -> None:
        original(worker, *args, **kwargs)
        attach(worker)

    __init__.asks_for_capture = True  # type: ignore[attr-defined]
    WorkerBase.__init__ = __init__


def attach(worker: Any) -> None:
    """Capture the steps of `worker`, if that is asked for. Raises ConfigError, which ends vLLM's start, for a wrong
    config."""
    config = requested(worker.vllm_config.additional_config)
    if config is None:
        return
    from vllm.platforms import current_platform

    if current_platform.device_type == "npu":
        _serve_vllm_ascend(worker)
        return
    from .worker import WorkerCapture

    WorkerCapture(worker, config)


def _serve_vllm_ascend(worker: Any) -> None:
    """vllm-ascend captures by itself, if additional_config says so: it needs a debugger to import and, with graphs,
    taps in what is compiled."""
    from vllm.config import CUDAGraphMode

    from msprobe_graph.dump.boundary import Boundary
    from msprobe_graph.dump.folder import RUN_VARIABLE
    from msprobe_graph.integrations.msprobe import install_as_msprobe

    vllm_config = worker.vllm_config
    given = vllm_config.additional_config
    asked = isinstance(given, Mapping) and bool({CONFIG_PATH_KEY, CONFIG_KEY} & given.keys())
    if not asked:
        log.warning(
            "%s is set, but vllm-ascend is asked to capture with --additional-config '{\"%s\": ...}' only",
            CONFIG_VARIABLE,
            CONFIG_PATH_KEY,
        )
    os.environ.setdefault(RUN_VARIABLE, run_name(vllm_config))  # vllm-ascend's calls can't tell it
    if install_as_msprobe(replace=os.environ.get(REPLACE_VARIABLE) == "1"):
        log.info("vllm-ascend captures the steps of this worker by msprobe_graph")
        if asked and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            Boundary().attempt("what vllm-ascend compiles and replays", _follow_graphs, worker)
    else:
        log.info("vllm-ascend captures the steps of this worker by msProbe; %s=1 changes that", REPLACE_VARIABLE)


def _follow_graphs(worker: Any) -> None:
    from .ascend import AscendGraphs

    AscendGraphs(worker)


def run_name(vllm_config: Any) -> str:
    """A name for the run that all of its workers know, data-parallel ones (``<instance>_dp1``) included."""
    instance: str = vllm_config.instance_id.partition("_dp")[0]
    return f"vllm-{instance}"


def requested(additional_config: Any) -> str | dict[str, Any] | None:
    """The config, or the path of its file, that this vLLM was started with; None when it was not asked to capture."""
    given = additional_config if isinstance(additional_config, Mapping) else {}
    path, config = given.get(CONFIG_PATH_KEY), given.get(CONFIG_KEY)
    if path is None and config is None:
        return os.environ.get(CONFIG_VARIABLE) or None
    if path is not None and config is not None:
        raise _wrong(f"has both {CONFIG_PATH_KEY} and {CONFIG_KEY}; give one of them")
    if path is not None:
        if not isinstance(path, str) or not path:
            raise _wrong(f"has {CONFIG_PATH_KEY} {path!r}; it must be the path of a config file")
        return path
    if not isinstance(config, dict):
        raise _wrong(f"has {CONFIG_KEY} {config!r}; it must be an object that holds what a config file would")
    return config


def _wrong(what: str) -> Exception:
    from msprobe_graph.config import ConfigError

    return ConfigError(f"vLLM's additional_config {what}")
