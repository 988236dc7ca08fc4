"""The LSE of transformers' flash attention function. Its arguments say which tokens attend to which."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention

from ..errors import UnsupportedModelError
from ..ops import with_sinks
from ..ops.sequences import Sequences, sequences_lse

# With these arguments the function updates a paged cache itself, so it attends to more keys than it gets.
_PAGED = ("block_table", "k_cache", "v_cache", "cache")
# Arguments that transformers drops without a word if the kernel has none of these.
_KERNELS_WORDS = {
    "sliding_window": ("window_size",),
    "softcap": ("softcap",),
    "s_aux": ("s_aux", "learnable_sink"),
}


def flash_lse(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
    """The LSE [b h t] of one call of `transformers.integrations.flash_attention.flash_attention_forward`.

    With a `target_dtype` among the options, of the function that it calls.

    It is -inf at a query that is padding, where the function returns 0.

    Raises:
        UnsupportedModelError: the logits are not known; see `why_not`.
    """
    if problem := why_not(module, query, key, mask, options):
        raise UnsupportedModelError(f"the LSE of {type(module).__name__} can't be computed: {problem}")
    dtype = options["target_dtype"] if "target_dtype" in options else flash_attention.get_target_dtype(query, module)
    if dtype is not None and query.dtype == torch.float32:  # a model in half precision: the function casts them
        query, key = query.to(dtype), key.to(dtype)
    b, h, t, d = query.shape
    s, window = key.shape[2], options.get("sliding_window")
    asked = options.get("is_causal")
    causal = bool(module.is_causal if asked is None else asked)
    # The windows of the kernels do not count the token's own key.
    before = window - 1 if window is not None and s > window else None
    scale, softcap = options.get("scaling"), options.get("softcap")
    scale = d**-0.5 if scale is None else scale
    q, k = rearrange(query, "b h t d -> b t h d"), rearrange(key, "b g s d -> b s g d")
    if mask is not None:
        real_k, real_q = _real(mask, t, s)
        starts_q, starts_k = (F.pad(x.sum(1).cumsum(0), (1, 0)).int() for x in (real_q, real_k))
        sequences = Sequences(starts_q, starts_k, t, real_k.shape[1], causal, before)
        found = sequences_lse(q[real_q], k[:, : real_k.shape[1]][real_k], sequences, scale, softcap)
        empty = torch.full((b, t, h), -torch.inf, dtype=found.dtype, device=found.device)
        lse = empty.index_put((real_q.nonzero()[:, 0], real_q.nonzero()[:, 1]), rearrange(found, "h n -> n h"))
    else:
        starts = _starts(b, t, s, query.device, options)
        lse = rows_lse(q, k, Sequences(*starts, is_causal=causal, window=before), scale, softcap).transpose(1, 2)
    return with_sinks(rearrange(lse, "b t h -> b h t"), options.get("s_aux"))


def rows_lse(q: Tensor, k: Tensor, sequences: Sequences, scale: float, softcap: float | None) -> Tensor:
    """The LSE [b h t] of q [b t h d] and k [b s g d], whose rows are one after another in the sequences."""
    lse = sequences_lse(q.flatten(0, 1), k.flatten(0, 1), sequences, scale, softcap)
    return rearrange(lse, "h (b t) -> b h t", b=q.shape[0])


def each_row(b: int, t: int, s: int, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Starts and greatest lengths where each sample is one sequence."""
    each = torch.arange(b + 1, dtype=torch.int32, device=device)
    return each * t, each * s, t, s


def why_not(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> str | None:
    """Why the logits of a call are not known, or None."""
    if found := [name for name in _PAGED if options.get(name) is not None]:
        return f"its flash attention works on a paged cache ({', '.join(found)})"
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        return "its flash attention was given a mask that is not [batch, keys]"
    if flash_attention._use_top_left_mask and query.shape[2] != key.shape[2]:
        return "the flash-attn package is older than 2.1, which aligns causal masks differently; update it"
    supports = getattr(flash._process_flash_kwargs_fn, "keywords", {}).get("supports_mapping")
    if supports is not None:
        window = options.get("sliding_window")
        asked = {"sliding_window": window is not None and key.shape[2] > window}
        asked |= {name: options.get(name) is not None for name in ("softcap", "s_aux")}
        for name, words in _KERNELS_WORDS.items():
            if asked[name] and not any(supports.get(word) for word in words):
                return f"the flash kernel in use does not support {name}, so it drops the {name} of this attention"
    return None


def _real(mask: Tensor, t: int, s: int) -> tuple[Tensor, Tensor]:
    """Which keys and queries are not padding. A static cache has more keys than the mask; these are not read."""
    real_k = mask[:, :s].bool()
    if t == real_k.shape[1]:
        return real_k, real_k
    if t == 1:
        return real_k, torch.ones_like(real_k[:, :1])
    return real_k, real_k[:, -t:]


def _starts(b: int, t: int, s: int, device: torch.device, options: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
    """Starts and greatest lengths of the sequences: as given, or from position ids, or one sequence a sample."""
    given = [options.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
    if all(x is not None for x in given):
        starts_q, starts_k, longest_q, longest_k = given
        return starts_q, starts_k, int(longest_q), int(longest_k)  # pyright: ignore[reportReturnType, reportArgumentType]
    positions = options.get("position_ids")
    if flash._is_packed_sequence(positions, b):
        (starts_q, starts_k), (longest_q, longest_k) = flash.prepare_fa_kwargs_from_position_ids(positions)
        return starts_q, starts_k, int(longest_q), int(longest_k)
    return each_row(b, t, s, device)
