"""The entry point of the plugin. vLLM calls `register` in each of its processes."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import BackendUnavailableError, MimicError
from . import places, requests
from .hooks import around
from .running import ADD
from .sources import sources_of

# What the plugin puts its hooks into is not vLLM's public interface, so it can differ in any minor version.
SUPPORTED = (0, 32)
RANGE = "vllm>=0.32,<0.33"


def register() -> None:
    """Put the hooks into vLLM. They do nothing in an engine that serves no stacks. A second call does nothing."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if not is_supported(vllm.__version__):
        around(EngineArgs, "create_engine_config", _refuse_version)
        return
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    around(InputProcessor, "__init__", requests.begin)
    around(InputProcessor, "process_inputs", requests.process)
    around(kv_cache_utils, "generate_block_hash_extra_keys", places.mark)
    around(WorkerWrapperBase, "initialize_from_config", _serve)
    setattr(WorkerWrapperBase, ADD, _add)


def is_supported(version: str) -> bool:
    """Whether the plugin is made for a version of vLLM."""
    return version.split(".")[:2] == [str(part) for part in SUPPORTED]


def _refuse_version(inner: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Any:
    import vllm

    config = inner(args, *more, **kwargs)
    if sources_of(config) is not None:
        raise BackendUnavailableError(
            f"this version of mimic_core serves stacks with {RANGE}; found vllm {vllm.__version__}: install a version "
            f"in that range"
        )
    return config


def _serve(inner: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Load the stacks when the model and its key cache are there."""
    result = inner(worker, *args, **kwargs)
    sources = sources_of(worker.vllm_config)
    if sources is not None:
        from .worker import Served

        worker.mimic_core_served = Served(worker.vllm_config, worker.worker.model_runner)
        for name, source in sources.items():
            worker.mimic_core_served.add(name, *source[:2])
    return result


def _add(worker: Any, name: str, folder: str, digest: str) -> str | None:
    try:
        worker.mimic_core_served.add(name, folder, digest)
    except MimicError as error:
        return str(error)
    return None
