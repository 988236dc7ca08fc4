"""Attention with its log-sum-exp (LSE), and shifts that use it, as pure tensor functions.

`b` batch, `h` attention heads, `g` key/value heads (g divides h), `t` query positions, `s` key positions, `d` head_dim,
`e` value head_dim. Masks are None, bool (True = attend) or additive, broadcastable to [b h t s]. `is_causal` is
aligned at the upper left, as in torch. Parameters are fp32. The computation is in fp32 (fp64 for fp64 inputs), and the
result has the dtype of the input. Autocast has no effect on a call.

`backend` is "auto" or one of these names. "auto" chooses a backend. A named backend never falls back to another one.

| backend | what |
|---|---|
| cpu | torch's flash kernel, with one pass before and one after |
| cuda | torch's flash, memory-efficient or cuDNN kernel, with one kernel launch before and one after |
| flex | FlexAttention, on CUDA; "auto" never chooses it |
| sdpa | any device: torch's attention, and the LSE computed separately in chunks |
| reference | the specification: eager, with the whole score matrix |

cpu and cuda are one call in C++ (`native`), or plain torch if there is no compiler (`plain`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BackendUnavailableError, ShapeError
from . import _reference, native, plain
from ._backends import Backend, follows_sdpa, module_for, resolve_backend
from ._checks import check_attention, check_shift
from ._masks import Mask, causal_mask, normalised
from ._precision import full_precision
from ._reference import gate
from .native import build_native

__all__ = [
    "Backend",
    "attention_lse",
    "attention_with_lse",
    "build_native",
    "follows_sdpa",
    "gate",
    "gated_shift",
    "norm_preserving_add",
    "resolve_backend",
    "shifted_attention",
]


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool
) -> tuple[Mask, float, bool]:
    """Check the arguments, and bring mask, scale and is_causal into the form of the backends."""
    scale = check_attention(q, k, v, mask, scale, is_causal)
    if is_causal and scale < 0:
        # torch's kernels multiply -inf by the scale, so a negative scale gives NaN.
        return causal_mask(q.shape[2], k.shape[2], q.device), scale, False
    return normalised(mask, q.dtype), scale, is_causal


def attention_with_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Mask = None,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h t"]]:
    """Scaled-dot-product attention and the log-sum-exp of its logits.

    Args:
        mask: Not together with `is_causal`.
        scale: Factor on q . k; None means d ** -0.5.

    Returns:
        The output before the output projection, in the dtype of q, and the LSE in nats, in fp32 (fp64 for fp64). The
        LSE is -inf in a row that attends to no key.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit each other, or both `mask` and `is_causal` are given.
        ValueError: the scale is 0 or not finite.
        UnknownNameError, BackendUnavailableError: see `resolve_backend`.

    Differentiable in q, k and v through both results. A mask gets a gradient only with backend "reference".
    """
    if (backend == "auto" or backend == q.device.type) and (ops := native.ops_for(q)):
        found = ops.attention_with_lse(q, k, v, mask, scale, is_causal, native.NOBODY)
        if found is not None:
            return found
    mask, scale, is_causal = _arguments(q, k, v, mask, scale, is_causal)
    module = module_for(q, k, v, mask, backend)
    with full_precision(q):
        return module.attention_with_lse(q, k, v, mask, scale, is_causal)


def attention_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    mask: Mask = None,
    scale: float | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h t"]:
    """Only the LSE of `attention_with_lse`, for an attention that is computed elsewhere.

    Args:
        softcap: Logits become softcap * tanh(logits / softcap) before the mask. Only for backends "sdpa" and
            "reference".
        sinks: One additional logit for each attention head, in every row that attends to a key.

    Makes no [t s] tensor, except with backend "reference" and, on a CPU, "flex". Differentiable in q, k and the sinks.

    Raises:
        ShapeError, ValueError, UnknownNameError, BackendUnavailableError: as `attention_with_lse`. Also if there is not
            one sink for each attention head, if the softcap is not positive, or if the backend does not support it.
    """
    if sinks is not None and (q.ndim != 4 or tuple(sinks.shape) != (q.shape[1],) or sinks.device != q.device):
        raise ShapeError(
            f"sinks should be [{q.shape[1]}] on {q.device}, one per attention head; given {list(sinks.shape)} on "
            f"{sinks.device}"
        )
    if softcap is None:
        # A kernel needs values. The keys are used, and the output is not.
        if (backend == "auto" or backend == q.device.type) and (ops := native.ops_for(q)):
            found = ops.attention_with_lse(q, k, k.detach(), mask, scale, is_causal, native.NOBODY)
            if found is not None:
                return with_sinks(found[1], sinks)
    elif not softcap > 0 or math.isinf(softcap):
        raise ValueError(f"softcap should be positive and finite, found {softcap}")
    elif backend not in ("auto", "sdpa", "reference"):
        raise BackendUnavailableError(
            f"backend {backend!r} was asked for and can't run this call: only 'sdpa' and 'reference' support a softcap"
        )
    elif backend == "auto":
        backend = "sdpa"
    mask, scale, is_causal = _arguments(q, k, k, mask, scale, is_causal)
    module = module_for(q, k, k, mask, backend)
    with full_precision(q):
        capped = {} if softcap is None else {"softcap": softcap}
        return with_sinks(module.attention_lse(q, k, mask, scale, is_causal, **capped), sinks)


def with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return lse
    return torch.logaddexp(lse, sinks.to(lse.dtype)[:, None]).masked_fill(lse == -torch.inf, -torch.inf)


def gated_shift(
    attn_out: Float[Tensor, "b t h e"],
    query: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    vector: Float[Tensor, "*b h e"],
    gate_weight: Float[Tensor, "*b h d"],
    gate_bias: Float[Tensor, "*b h"],
) -> Float[Tensor, "b t h e"]:
    """Shift the output of each attention head towards the output that demonstrations would give.

    out = attn_out + mu * vector,   mu = sigmoid(query . gate_weight + gate_bias - lse),   mu = 0 where lse is -inf

    Args:
        attn_out: Attention output before the output projection. The result has its dtype.
        query: After RoPE and q/k norm, unscaled.
        lse: Log-sum-exp of the attention logits (scaled, masked), in nats.
        vector, gate_weight, gate_bias: For all samples, or for each sample its own ([b h e], [b h d] and [b h]).

    Raises:
        ShapeError: the shapes or devices of the arguments do not fit each other.

    Computed in fp32. Differentiable in every argument.
    Source: Jiang et al., CVPR 2025, arXiv:2504.08851, section 3.2.
    """
    if vector.ndim == 3 and vector.shape[:2] == gate_weight.shape[:2] == gate_bias.shape == query.shape[:2]:
        return _of_samples(attn_out, query, lse, vector, gate_weight, gate_bias)
    if ops := native.ops_for(query):
        out = ops.gated_shift(attn_out, query, lse, vector, gate_weight, gate_bias)
        if out is not None:
            return out
    check_shift(query, attn_out.shape, vector, gate_weight, gate_bias, lse)
    with full_precision(query):
        return _reference.gated_shift(attn_out, query, lse, vector, gate_weight, gate_bias)


def _of_samples(attn_out: Tensor, query: Tensor, lse: Tensor, *parameters: Tensor) -> Tensor:
    """`gated_shift` where each sample has its own parameters: as one sample that has the attention heads of all."""
    # Not einops: this also runs for each decoded token.
    b, h, t, d = query.shape
    heads = attn_out.transpose(1, 2).reshape(1, b * h, t, -1).transpose(1, 2)
    folded = [x.flatten(0, 1) for x in parameters]
    out = gated_shift(heads, query.reshape(1, b * h, t, d), lse.reshape(1, b * h, t), *folded)
    return out.transpose(1, 2).reshape(b, h, t, -1).transpose(1, 2)


def shifted_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    vector: Float[Tensor, "h e"],
    gate_weight: Float[Tensor, "h d"],
    gate_bias: Float[Tensor, " h"],
    mask: Mask = None,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b t h e"]:
    """Attention and `gated_shift` in one call, with one backward for both if the backend has it.

    Raises:
        ShapeError, UnknownNameError, BackendUnavailableError: as `attention_with_lse` and `gated_shift`.

    Differentiable in every tensor except the mask. This includes the gradient through the LSE into q and k.
    Source: Jiang et al., CVPR 2025, arXiv:2504.08851, section 3.2.
    """
    if (backend == "auto" or backend == q.device.type) and (ops := native.ops_for(q)):
        out = ops.shifted_attention(q, k, v, vector, gate_weight, gate_bias, mask, scale, is_causal, native.NOBODY)
        if out is not None:
            return out
    mask, scale, is_causal = _arguments(q, k, v, mask, scale, is_causal)
    b, h, t, _ = q.shape
    check_shift(q, (b, t, h, v.shape[-1]), vector, gate_weight, gate_bias)
    module = module_for(q, k, v, mask, backend, vector, gate_weight, gate_bias)
    if module in (plain.cpu, plain.cuda) and native.traced():
        return torch.ops.mimic_core.shifted_attention(q, k, v, vector, gate_weight, gate_bias, mask, scale, is_causal)
    with full_precision(q):
        if fused := getattr(module, "shifted_attention", None):
            return fused(q, k, v, vector, gate_weight, gate_bias, mask, scale, is_causal)
        out, lse = module.attention_with_lse(q, k, v, mask, scale, is_causal)
        return _reference.gated_shift(out, q, lse, vector, gate_weight, gate_bias)


def virtual_context(
    attn_out: Float[Tensor, "b t h e"],
    query: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    keys: Float[Tensor, "*b h n d"],
    values: Float[Tensor, "*b h n e"],
    weight: Float[Tensor, "*b 1"],
    scale: float,
) -> Float[Tensor, "b t h e"]:
    """Attention that is done, as if its context had some more keys and values: see `VirtualKVHead`. Not public."""
    if keys.ndim == 3 and (ops := native.ops_for(query)):
        out = ops.virtual_context(attn_out, query, lse, keys, values, weight, scale)
        if out is not None:
            return out
    with full_precision(query):
        return _reference.virtual_context(attn_out, query, lse, keys, values, weight, scale)


def norm_preserving_add(
    x: Float[Tensor, "... c"], vector: Float[Tensor, "*b c"], scale: Float[Tensor, "*b"] | float
) -> Float[Tensor, "... c"]:
    """Add a vector, then scale the sum to the norm of x: (x + scale * vector) * |x| / |x + scale * vector|.

    A vector [b c] and a scale [b] have one for each sample, which is the first axis of x.

    A sum of exactly zero stays zero. Norms are over the last axis, without an epsilon.

    Raises:
        ShapeError: the vector does not have the length of x's last axis, or the samples differ in number.

    Computed in fp32, with the result in the dtype of x. Differentiable in every argument.
    Source: Peng et al., NeurIPS 2024, arXiv:2406.13185.
    """
    if ops := native.ops_for(x):
        out = ops.norm_preserving_add(x, vector, scale)
        if out is not None:
            return out
    own = x.shape[:1] if vector.ndim == 2 and x.ndim > 1 else ()
    if vector.shape != (*own, *x.shape[-1:]) or (isinstance(scale, Tensor) and scale.shape not in ((), own)):
        of_scale = f", scale {list(scale.shape)}" if isinstance(scale, Tensor) else ""
        raise ShapeError(
            f"vector should be [{x.shape[-1]}], or one for each sample of x {list(x.shape)}, and the scale [] or the "
            f"same; given vector {list(vector.shape)}{of_scale}"
        )
    with full_precision(x):
        return _reference.norm_preserving_add(x, vector, scale)
