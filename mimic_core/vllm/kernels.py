"""vLLM's kernels for CUDA are asked for the LSE while a layer with a stack attends. vLLM itself does not ask them.

FlashAttention returns it as [h n], in nats; FlashInfer as [n h], to base 2, for requests that decode and for prompts by
one call each.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchStateError
from .hooks import around

# For each call of a kernel, the part of the output that it wrote, and its LSE [n h] in nats.
Kept = list[tuple[Tensor, Tensor]]
_KEPT: ContextVar[Kept | None] = ContextVar("mimic_core_kept", default=None)
# The name under which the metadata of FlashInfer keeps those that it was made of: it has no pages itself.
COMMON = "mimic_core_common"
_CPU = "CPUAttentionBackendImpl"


_NONE: AbstractContextManager[None] = nullcontext()


def keeping(impl: Any) -> AbstractContextManager[Kept | None]:
    """Keep the LSE of the kernels that run inside. None: the CPU's kernel has none to give."""
    return _NONE if type(impl).__name__ == _CPU else _keeping()


@contextmanager
def _keeping() -> Iterator[Kept]:
    kept: Kept = []
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def joined(kept: Kept, query: Tensor) -> Tensor:
    """The LSE [n h] of all tokens of a call, in nats.

    Raises:
        PatchStateError: the kernels did not return that of each token.
    """
    parts = [lse for _, lse in sorted(kept, key=lambda part: part[0].data_ptr())]
    found = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else query.new_empty(0)
    if found.shape != query.shape[:2]:
        raise PatchStateError(
            f"vLLM's kernels returned an LSE of the shape {tuple(found.shape)} for queries of the shape "
            f"{tuple(query.shape)}, by {len(parts)} calls: serve heads without a gate, such as LIVE"
        )
    return found


def ask(impl: Any) -> str | None:
    """Let the kernels of a layer's backend be asked. Return why they can't be and what to do, or None."""
    name = type(impl).__name__
    if name == "FlashAttentionImpl":
        from vllm.v1.attention.backends.flash_attn import FA4DenseAttentionKernel, FlashAttentionImpl

        if type(impl) is FlashAttentionImpl:
            around(FA4DenseAttentionKernel, "__call__", _flash)  # of all versions, not of the fourth alone
            return None
    if name == "FlashInferImpl":
        from vllm.v1.attention.backends import flashinfer

        if impl.supports_xqa_or_trtllm_gen_decode:
            return "whose kernels of TensorRT-LLM return none: pass attention_config={'use_trtllm_attention': False}"
        if type(impl) is flashinfer.FlashInferImpl:
            around(flashinfer.BatchPrefillWithPagedKVCacheWrapper, "run", _flashinfer)
            around(flashinfer.BatchDecodeWithPagedKVCacheWrapper, "run", _flashinfer)
            around(flashinfer.FlashInferMetadataBuilder, "build", _build)
            return None
    return "which returns none: pass attention_backend='FLASH_ATTN' if this is a GPU"


def _flash(inner: Callable[..., Any], kernel: Any, **kwargs: Any) -> Any:
    kept = _KEPT.get()
    if kept is None:
        return inner(kernel, **kwargs)
    out, lse = inner(kernel, **kwargs, return_softmax_lse=True)
    kept.append((kwargs["out"], lse.T))
    return out


def _flashinfer(inner: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    kept = _KEPT.get()
    if kept is None:
        return inner(wrapper, *args, **kwargs)
    out, lse = inner(wrapper, *args, **kwargs, return_lse=True)
    kept.append((kwargs["out"], lse * math.log(2)))
    return out


def _build(inner: Callable[..., Any], builder: Any, *args: Any, **kwargs: Any) -> Any:
    made = inner(builder, *args, **kwargs)
    setattr(made, COMMON, kwargs["common_attn_metadata"] if "common_attn_metadata" in kwargs else args[1])
    return made
