"""The oracle: a slow second implementation of shifts from the formulae, with which the library is compared.

It shares no code with the library. It computes attention in plain torch, and wraps the `forward` of a module to edit
its output or its first argument.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from . import by_name
from .calls import Softmax, lse_of
from .computed import Computed

# Arguments that change the logits and that this attention does not support.
_UNKNOWN = ("indices", "block_indices")


@dataclass(frozen=True)
class Seen:
    """One call of the attention interface, or of torch's SDPA outside it (`own`).

    Attributes:
        query, key, value: [b h t d], [b g s d], [b g s e].
        lse: Log-sum-exp of the logits [b h t], -inf in a row that attends to no key. None if the model's own attention
            ran.
        out: The result of attention [b t h e], before an edit.
        plain: Whether attention was computed here.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    lse: Tensor | None
    out: Tensor
    plain: bool
    own: bool = False


@dataclass(frozen=True)
class Reading:
    """How an attention implementation interprets its arguments.

    Attributes:
        causal: Without a mask it is causal, if the module says so and there are several queries.
        extras: It applies softcaps and sinks.
    """

    causal: bool
    extras: bool


READINGS = (Reading(True, False), Reading(False, True), Reading(True, True), Reading(False, False))

Edit = Callable[[Tensor, Seen | None], Tensor]
"""Gives the new value of a site from the old value and, at `attn_heads`, from the attention call."""

Place = tuple[nn.Module, str]
"""A module and one of its sites."""


class Oracle:
    """Inside the `with`, models run with edits, and the attention of the modules in `plain` is computed here.

    Args:
        edits: The edits by place. `query`, `key`, `value` and `attn_heads` belong to the module that calls the
            attention interface, the other sites to the module whose output or first argument they are.
        plain: The modules whose attention is computed here. Others use the model's own attention and have no LSE.

    Attributes:
        seen: The calls of the attention interface, in order.
    """

    def __init__(
        self, edits: Mapping[Place, Edit] | None = None, plain: Iterable[nn.Module] = (), reading: Reading = READINGS[0]
    ) -> None:
        self._edits = {(id(module), site): edit for (module, site), edit in (edits or {}).items()}
        kinds = dict.fromkeys(("attn_out", "mlp_out", "layer_out"), _edited)
        kinds |= dict.fromkeys(("layer_in", "mlp_hidden"), _fed)
        self._wraps = [(m, functools.partial(kinds[s], e)) for (m, s), e in (edits or {}).items() if s in kinds]
        self._plain = {id(module) for module in plain}
        self._reading = reading
        self._is_inside = self._is_busy = False
        self._computed = Computed(
            self._edit,
            self._computed_heads,
            functools.partial(self._busily, self._own_attention),
            lambda module: id(module) in self._plain,
            lambda: self._is_busy,
        )
        self._replaced = by_name.Replaced(functools.partial(self._busily, self._named))
        self.seen: list[Seen] = []

    def __enter__(self) -> Oracle:
        from transformers.modeling_utils import AttentionInterface

        self._interface = AttentionInterface
        self._below = below = AttentionInterface.get_interface
        attention = functools.partial(self._busily, self._attention)

        def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return functools.partial(attention, below(self, attn_implementation, default))

        AttentionInterface.get_interface = get_interface
        self._sdpa = functional.scaled_dot_product_attention

        def sdpa(*args: Any, **kwargs: Any) -> Tensor:
            return self._busily(self._own_attention, *args, **kwargs)

        sdpa.original = self._sdpa  # pyright: ignore[reportFunctionMemberAccess]
        functional.scaled_dot_product_attention = sdpa
        # torch's multi-head attention does not run under a mode if it knows of one.
        self._multi_head = multi_head = functional.multi_head_attention_forward
        blind = {**multi_head.__globals__, "has_torch_function": lambda tensors: False}
        functional.multi_head_attention_forward = FunctionType(
            multi_head.__code__, blind, multi_head.__name__, multi_head.__defaults__
        )
        # A module can have edits of several sites. Each one wraps the forward that is there.
        self._forwards: list[tuple[nn.Module, Any]] = []
        for module, wrap in self._wraps:
            self._forwards.append((module, vars(module).get("forward")))
            module.forward = functools.partial(wrap, module.forward)
        self._replaced.put()
        self._computed.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._computed.__exit__(None, None, None)
        self._replaced.restore()
        self._interface.get_interface = self._below
        functional.scaled_dot_product_attention = self._sdpa
        functional.multi_head_attention_forward = self._multi_head
        for module, forward in reversed(self._forwards):
            if forward is None:
                del module.forward
            else:
                module.forward = forward

    def _edit(self, module: nn.Module, site: str, value: Tensor, seen: Seen | None = None) -> Tensor:
        edit = self._edits.get((id(module), site))
        return value if edit is None else edit(value, seen)

    def _busily(self, attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attention of which no part is looked at."""
        before, self._is_busy = self._is_busy, True
        try:
            return attention(*args, **kwargs)
        finally:
            self._is_busy = before

    def _computed_heads(self, softmax: Softmax, value: Tensor, out: Tensor) -> Tensor:
        """The output of attention that a module computes by itself."""
        plain = id(softmax.module) in self._plain
        lse = lse_of(softmax) if plain else None
        seen = Seen(softmax.module, softmax.query, softmax.key, value, lse, out, plain, own=True)
        self.seen.append(seen)
        return self._edit(softmax.module, "attn_heads", out, seen)

    def _own_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Torch's SDPA. Outside the interface, it is the attention of the innermost module that runs."""
        more: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
        module = None if self._is_inside or query.ndim != 4 else _running()
        if module is None:
            return self._sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
        query = self._edit(module, "query", query)
        key = self._edit(module, "key", key)
        value = self._edit(module, "value", value)
        plain, lse = id(module) in self._plain, None
        if plain:
            mask = attn_mask
            if is_causal:  # aligned at the upper left, also for a single query
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            wide = None if mask is None else mask[(None,) * (4 - mask.ndim)]
            options = {"scaling": scale, "is_causal": False}
            out, lse = plain_attention(module, query, key, value, wide, options, self._reading)
        else:
            self._is_inside = True
            try:
                out = self._sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
            finally:
                self._is_inside = False
            out = out.transpose(1, 2)
        seen = Seen(module, query, key, value, lse, out, plain, own=True)
        self.seen.append(seen)
        return self._edit(module, "attn_heads", out, seen).transpose(1, 2)

    def _named(self, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function of a package. It is the attention of the innermost module that runs."""
        module, batch = (None, None) if self._is_inside else by_name.caller(1)
        if module is None:
            return function(*args, **kwargs)
        call = by_name.read(kind, function, args, kwargs, batch)
        given = zip(("query", "key", "value"), call[:3], strict=True)
        query, key, value = (self._edit(module, site, x) for site, x in given)
        plain, lse = id(module) in self._plain, None
        if plain:
            reading = Reading(causal=False, extras=True)
            out, lse = plain_attention(module, query, key, value, call.mask, call.options, reading)
        else:
            self._is_inside = True
            try:
                out = call.run(query, key, value)
            finally:
                self._is_inside = False
        seen = Seen(module, query, key, value, lse, out, plain, own=True)
        self.seen.append(seen)
        return call.back(self._edit(module, "attn_heads", out, seen))

    def _attention(
        self,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        query = self._edit(module, "query", query)
        key = self._edit(module, "key", key)
        value = self._edit(module, "value", value)
        plain = id(module) in self._plain and not args and all(kwargs.get(name) is None for name in _UNKNOWN)
        if plain:
            out, lse = plain_attention(module, query, key, value, attention_mask, kwargs, self._reading)
            rest: tuple[Any, ...] = (None,)
        else:
            self._is_inside = True
            try:
                out, *others = base(module, query, key, value, attention_mask, *args, **kwargs)
            finally:
                self._is_inside = False
            lse, rest = None, tuple(others)
        seen = Seen(module, query, key, value, lse, out, plain)
        self.seen.append(seen)
        return (self._edit(module, "attn_heads", out, seen), *rest)


def _running() -> nn.Module | None:
    """The innermost module whose call this code runs in, read from the stack."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        if isinstance(module, nn.Module):
            return module
        frame = frame.f_back
    return None


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: Mapping[str, Any],
    reading: Reading,
) -> tuple[Tensor, Tensor]:
    """Softmax attention [b t h e] in the query's dtype and the log-sum-exp of its logits [b h t], in fp64."""
    h, t = query.shape[1], query.shape[2]
    exact = torch.float32 if query.device.type == "mps" else torch.float64
    q = query.to(exact)
    k, v = (repeat(x.to(exact), "b g s d -> b (g n) s d", n=h // x.shape[1]) for x in (key, value))
    s = k.shape[2]
    scale = options.get("scaling")
    logits = einsum(q, k, "b h t d, b h s d -> b h t s") * (q.shape[-1] ** -0.5 if scale is None else scale)
    softcap = options.get("softcap") if reading.extras else None
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if (score_mod := options.get("score_mod")) is not None:
        sizes = (logits.shape[0], h, logits.shape[2], s)
        axes = [
            torch.arange(n, device=q.device).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)
        ]
        logits = score_mod(logits, *axes)
    attends, bias = _read_mask(module, query, s, mask, options, reading)
    if bias is not None:
        logits = logits + bias.to(exact)
    position_bias = options.get("position_bias")
    if position_bias is not None:
        logits = logits + position_bias[..., : logits.shape[3]].to(exact)
    logits = logits.masked_fill(~attends, -torch.inf)
    some = attends.any(-1)
    sinks = options.get("s_aux") if reading.extras else None
    if (of_tokens := options.get("sinks")) is not None and reading.extras:
        logits = torch.cat([logits, of_tokens.to(exact)], dim=-1)
    if sinks is not None:
        column = repeat(sinks.to(exact), "h -> b h t 1", b=logits.shape[0], t=t)
        logits = torch.cat([logits, column], dim=-1)
    # A row without keys would be 0/0. Its value is not used.
    safe = logits.masked_fill(~some[..., None], 0.0)
    weights = torch.softmax(safe, dim=-1)[..., :s]
    lse = torch.logsumexp(safe, dim=-1).masked_fill(~some, -torch.inf)
    return torch.einsum("bhts,bhse->bthe", weights, v).to(query.dtype).contiguous(), lse


def _read_mask(
    module: nn.Module, query: Tensor, s: int, mask: Any, options: Mapping[str, Any], reading: Reading
) -> tuple[Tensor, Tensor | None]:
    """Which keys each query attends to, [b h t s], and the bias of the logits."""
    b, h, t, _ = query.shape
    everything = torch.ones(b, h, t, s, dtype=torch.bool, device=query.device)
    if mask is None:
        says = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if says is None else says
        return (everything.tril() if reading.causal and causal and t > 1 else everything), None
    if not isinstance(mask, Tensor):  # flex attention's, a function of the indices
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, mask.shape[0], mask.shape[1], t, s, device=str(query.device))
    mask = mask[..., :s]
    if mask.dtype == torch.bool:
        return everything & mask, None
    # The lowest number of the dtype means -inf.
    barred = mask <= torch.finfo(mask.dtype).min / 2
    return everything & ~barred, mask.masked_fill(barred, 0.0)


def _fed(edit: Edit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The output of `forward` for an edited first argument."""
    if args:
        return forward(edit(args[0], None), *args[1:], **kwargs)
    name = next(name for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point())
    return forward(**{**kwargs, name: edit(kwargs[name], None)})


def _edited(edit: Edit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The edited output of `forward`. If it is a tuple, its first element is edited."""
    out = forward(*args, **kwargs)
    if not isinstance(out, tuple):
        return edit(out, None)
    parts = (edit(out[0], None), *out[1:])
    return type(out)(*parts) if hasattr(out, "_fields") else parts


def mimic_edit(vector: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None) -> Edit:
    """MimIC at `attn_heads`: out + sigmoid(q . w + b - LSE) * v, each attention head with its own [h e], [h d], [h].

    Without a gate, out + v.
    """

    def edit(out: Tensor, seen: Seen | None) -> Tensor:
        if gate_weight is None or gate_bias is None:
            return out + vector.to(out.dtype)
        assert seen is not None
        if seen.lse is None:
            raise ValueError("the oracle has no log-sum-exp of this attention")
        lse = seen.lse
        log_z1 = einsum(seen.query.to(lse.dtype), gate_weight.to(lse.dtype), "b h t d, h d -> b h t")
        log_z1 = log_z1 + gate_bias.to(lse.dtype)[:, None]
        attends = lse > -torch.inf
        mu = torch.sigmoid(log_z1 - lse.masked_fill(~attends, 0.0)) * attends
        return out + (rearrange(mu, "b h t -> b t h 1") * vector.to(lse.dtype)).to(out.dtype)

    return edit


def live_edit(vector: Tensor, scale: Tensor) -> Edit:
    """LIVE at an output site [b t c]: h + a v, scaled to the norm of h."""

    def edit(h: Tensor, seen: Seen | None) -> Tensor:
        moved = h + (scale * vector).to(h.dtype)
        return moved * (h.square().sum(-1, keepdim=True) / moved.square().sum(-1, keepdim=True)).sqrt()

    return edit
