"""Stand-ins for torch's CUDA attention kernels, with their signatures, that work as the kernels are documented to.

A backward uses its `out` for delta alone, an LSE has padded rows, a row without keys gives finite nonsense; and what a
kernel would take wrongly without a word is an assertion here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

KINDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    scores = q.double() @ k.double().mT * scale
    if is_causal:
        assert q.shape[2] == k.shape[2], "the kernels align a causal mask each in its own way"
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        assert mask.shape == scores.shape
        scores = scores + mask.double()
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    # A row without keys gives finite nonsense, as the kernels' do.
    return weights.nan_to_num(0.25), lse.masked_fill(lse == -math.inf, 3.0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights, lse = _softmax(q, k, mask, scale, is_causal)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (weights @ v.double()).to(q.dtype), lse.to(wide)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    weights, _ = _softmax(q, keys, mask, scale, is_causal)
    grad = grad.double()
    delta = (grad * out.double()).sum(-1, keepdim=True)
    of_scores = weights * (grad @ values.double().mT - delta) * scale
    of_k, of_v = ((x.mT @ y.double()).unflatten(1, (-1, groups)).sum(2) for x, y in ((of_scores, q), (weights, grad)))
    return (of_scores @ keys.double()).to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype)


def _beside(q: Any, k: Any) -> tuple[Any, ...]:
    """What flash and cuDNN give besides output and LSE: lengths, the random state, the mask of a dropout."""
    return None, None, q.shape[2], k.shape[2], torch.ones(2), torch.ones(1), None


def _steps(x: Tensor) -> list[int]:
    """Strides, of axes that have any."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


def _flash(
    q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, debug: bool = False, *, scale: float
) -> Any:
    assert (dropout, debug) == (0.0, False)
    return *_forward(q, k, v, None, scale, is_causal), *_beside(q, k)


def _flash_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int,
    dropout: float, is_causal: bool, seed: Any, offset: Any, *, scale: float,
) -> Any:  # fmt: skip
    assert (cum_q, cum_k, max_q, max_k, dropout) == (None, None, q.shape[2], k.shape[2], 0.0)
    assert (len(seed), len(offset)) == (2, 1)
    return _backward(grad, q, k, v, out, None, scale, is_causal)


def _efficient(
    q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout: float = 0.0, is_causal: bool = False, *, scale: float
) -> Any:
    assert with_lse
    assert q.shape[1] == k.shape[1]
    out, lse = _forward(q, k, v, bias, scale, is_causal)
    padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), math.nan)
    padded[:, :, : lse.shape[2]] = lse
    return out, padded, torch.ones(()), torch.ones(())


def _efficient_backward(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, seed: Any, offset: Any, dropout: float,
    wanted: Any, is_causal: bool = False, *, scale: float,
) -> Any:  # fmt: skip
    assert lse.shape[2] % 32 == 0, "as it came"
    assert (wanted, seed.shape, offset.shape) == ([True, True, True, False], (), ())
    return *_backward(grad, q, k, v, out, bias, scale, is_causal), None


def _cudnn(
    q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout: float = 0.0, is_causal: bool = False,
    debug: bool = False, *, scale: float,
) -> Any:  # fmt: skip
    assert with_lse
    assert bias is None or q.shape[1] == k.shape[1]
    out, lse = _forward(q, k, v, bias, scale, is_causal)
    return torch.empty_like(q).copy_(out), lse[..., None], *_beside(q, k)


def _cudnn_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, seed: Any, offset: Any, bias: Any, cum_q: Any, cum_k: Any,
    max_q: int, max_k: int, dropout: float, is_causal: bool, *, scale: float,
) -> Any:  # fmt: skip
    assert lse.shape == (*q.shape[:3], 1)
    assert (cum_q, cum_k, max_q, max_k, len(seed), len(offset)) == (None, None, q.shape[2], k.shape[2], 2, 1)
    # A plan is kept by q, k, v and the dropout; the other strides are taken to be those it was made with.
    assert _steps(grad) == _steps(torch.empty(q.transpose(1, 2).shape).transpose(1, 2))
    assert _steps(out) == _steps(torch.empty_like(q))
    assert math.copysign(1, dropout) == -1, "plans of others"
    return _backward(grad, q, k, v, out, bias, scale, is_causal)


def aten() -> dict[str, Any]:
    """The stand-ins by the names of the operators they stand in for."""
    both = {"flash": (_flash, _flash_backward), "efficient": (_efficient, _efficient_backward)}
    both["cudnn"] = (_cudnn, _cudnn_backward)
    found = {}
    for name, (forward, backward) in both.items():
        found[f"_scaled_dot_product_{name}_attention"] = forward
        found[f"_scaled_dot_product_{name}_attention_backward"] = backward
    return found


@contextmanager
def registered() -> Iterator[dict[str, Any]]:
    """The stand-ins as the operators' kernels for CPU tensors, and torch's choice among them: that of "kind"."""
    chosen: dict[str, Any] = {"kind": "flash", "asked": 0}

    def choice(*args: Any, **kwargs: Any) -> int:
        chosen["asked"] += 1
        return KINDS[chosen["kind"]].value

    library = torch.library.Library("aten", "IMPL")
    override = {"allow_override": True} if "allow_override" in torch.library.Library.impl.__code__.co_varnames else {}
    for name, kernel in aten().items():
        library.impl(name, kernel, "CPU")
    library.impl("_fused_sdp_choice", choice, "CPU", **override)
    try:
        yield chosen
    finally:
        library._destroy()
