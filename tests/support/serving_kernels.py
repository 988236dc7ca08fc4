"""Stand-ins for the kernels of vLLM's backends for CUDA, in plain torch, with the signatures of vLLM 0.32's.

With them, vLLM on a CPU runs its own backends for FlashAttention and FlashInfer: only what a GPU computes is replaced.
FlashInfer's signatures are those of 0.7.0.post1, which vLLM 0.32 asks for.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .flash_stand_ins import logits_of


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **options: Any) -> Tensor:
    """Of one sequence: q [t h d], k and v [s g d]. Writes the output [t h d]; the LSE [t h] in nats."""
    logits = logits_of(q.float(), k.float(), **options)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1).float()
    out.copy_(torch.einsum("hts,shd->thd", logits.softmax(-1), values))
    return logits.logsumexp(-1).T


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k: Any = None, q_v=None,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table: Any = None, return_softmax_lse=False, out: Any = None,
    scheduler_metadata=None, q_descale=None, k_descale=None, v_descale=None, num_splits=0, output_scale=None,
    fa_version=2, s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, mask_mod=None,
    block_sparse_tensors=None, aux_tensors=None, aux_tensor_leading_dims=None, dynamic_causal=None,
):  # fmt: skip
    """That of vLLM, for pages [pages size g d]. The LSE is [h n]."""
    assert all(x is None for x in (q_v, alibi_slopes, s_aux, mask_mod, dynamic_causal))
    assert not any(x is None for x in (block_table, seqused_k, out))
    window = (-1, -1) if window_size is None else tuple(window_size)
    parts = []
    for (a, b), row, s in zip(pairwise(cu_seqlens_q.tolist()), block_table, seqused_k.tolist(), strict=True):
        pages = row.long()
        keys, values = (x[pages].flatten(0, 1)[:s] for x in (k, v))
        parts.append(
            attend(q[a:b], keys, values, out[a:b], scale=softmax_scale, causal=causal, window=window, softcap=softcap)
        )
    return (out, torch.cat(parts).T.contiguous()) if return_softmax_lse else out


class Wrapper:
    """What the two wrappers of FlashInfer have in common: `plan` says where the keys are, `run` attends."""

    is_cuda_graph_enabled = False

    def __init__(self, float_workspace_buffer, kv_layout="NHD", **options):
        self._is_heads_first = kv_layout == "HND"

    def _plan(self, starts, indptr, indices, last_page_len, page_size, causal, sm_scale, window_left, logits_soft_cap):
        self._starts, self._causal, self._sm_scale, self._window_left = starts, causal, sm_scale, window_left
        self._logits_soft_cap = logits_soft_cap or 0.0
        self._pages = [indices[a:b].long() for a, b in pairwise(indptr.tolist())]
        self._lengths = [
            (len(pages) - 1) * page_size + last for pages, last in zip(self._pages, last_page_len.tolist(), strict=True)
        ]

    def _run(self, q, paged_kv_cache, out, return_lse):
        k, v = (x.transpose(1, 2) if self._is_heads_first else x for x in paged_kv_cache)
        options = {"scale": self._sm_scale, "causal": self._causal, "softcap": self._logits_soft_cap}
        options |= {"window": (self._window_left, -1)}
        parts = []
        for (a, b), pages, s in zip(pairwise(self._starts), self._pages, self._lengths, strict=True):
            keys, values = (x[pages].flatten(0, 1)[:s] for x in (k, v))
            parts.append(attend(q[a:b], keys, values, out[a:b], **options))
        return (out, torch.cat(parts) / math.log(2)) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type=None,
        non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
        max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
        max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        pages = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size
        # The pages of prompts do not begin at 0 if requests that decode stand before them.
        self._plan(qo_indptr.tolist(), *pages, causal, sm_scale, window_left, logits_soft_cap)

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None, uses_spcompress=None,
    ):  # fmt: skip
        return self._run(q, paged_kv_cache, out, return_lse)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        *deprecated_positional_args, **kwargs,
    ):  # fmt: skip
        more = [kwargs[name] for name in ("sm_scale", "window_left", "logits_soft_cap")]
        self._plan(list(range(len(indptr))), indptr, indices, last_page_len, page_size, True, *more)

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None, skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):  # fmt: skip
        return self._run(q, paged_kv_cache, out, return_lse)


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    return (kv_indptr[1:] - kv_indptr[:-1] - 1).clamp(min=0) * page_size + kv_last_page_len


def _write_keys(impl, layer, key, value, kv_cache, slot_mapping):
    """What `do_kv_cache_update` of both backends does by a kernel: pages are [pages g size 2*d]."""
    slots, size = slot_mapping.long(), kv_cache.shape[2]
    both = torch.cat([key, value], -1)[: len(slots)]
    kv_cache[slots // size, :, slots % size] = both


def _copy_page_indices(page_indices, block_table, block_table_stride, cu_num_blocks, **_):
    for row, (a, b) in enumerate(pairwise(cu_num_blocks.tolist())):
        page_indices[a:b] = block_table[row, : b - a]


def _use(patch: pytest.MonkeyPatch, backend: str) -> None:
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import registry

    patch.setattr(selector, "_cached_get_attn_backend", selector._cached_get_attn_backend.__wrapped__)
    # On a CPU, vLLM takes no other backend than this.
    path = f"vllm.v1.attention.backends.{backend}"
    patch.setitem(registry._ATTN_OVERRIDES, registry.AttentionBackendEnum.CPU_ATTN, path)


def use_flash(patch: pytest.MonkeyPatch, version: int = 3) -> None:
    """Let vLLM on a CPU attend with its backend for FlashAttention."""
    from vllm.v1.attention.backends import flash_attn

    patch.setattr(flash_attn, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    patch.setattr(flash_attn, "get_scheduler_metadata", lambda **_: None, raising=False)
    patch.setattr(flash_attn, "get_flash_attn_version", lambda **_: version)
    patch.setattr(flash_attn.FlashAttentionImpl, "do_kv_cache_update", _write_keys)
    _use(patch, "flash_attn.FlashAttentionBackend")


def use_flashinfer(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM on a CPU attend with its backend for FlashInfer."""
    import vllm._custom_ops  # it asks whether the package is there, and would use other kernels of it

    made: dict[str, dict[str, Any]] = {
        "flashinfer": {
            "BatchAttentionWithAttentionSinkWrapper": type("Sink", (), {}),
            "BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper,
            "BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper,
            "BatchPrefillWithRaggedKVCacheWrapper": type("Ragged", (), {}),
            "get_seq_lens": get_seq_lens,
            "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": None,
        },
        "flashinfer.decode": {"fast_decode_plan": None, "trtllm_batch_decode_with_kv_cache": None},
        "flashinfer.prefill": {"trtllm_batch_context_with_kv_cache": None},
        "flashinfer.utils": {"FP4Tensor": None},
    }
    assert vllm._custom_ops is not None
    for name, members in made.items():
        module = ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
    from vllm.v1.attention.backends import flashinfer

    patch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1024")
    patch.setattr(flashinfer, "_copy_page_indices_kernel", _Launched())
    patch.setattr(flashinfer.FlashInferImpl, "do_kv_cache_update", _write_keys)
    _use(patch, "flashinfer.FlashInferBackend")


class _Launched:
    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return _copy_page_indices
