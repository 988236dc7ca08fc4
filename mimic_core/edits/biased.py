"""Attention functions that take a bias or a function of the logits: xformers' and torch's flex_attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.sequences import Sequences
from .flash import each_row, rows_lse
from .packages import Odd, PackageCall, arguments, parameters

_UPPER_LEFT, _LOWER_RIGHT = "LowerTriangularMask", "LowerTriangularFromBottomRightMask"


class XformersCall(PackageCall):
    """`xformers.ops.memory_efficient_attention`. Samples that its bias packs into a row are a row, [1 h n d].

    Raises:
        Odd: it has arguments that are not understood.
    """

    def __init__(
        self, function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = arguments(function, args, kwargs)
        super().__init__(function, module, given)
        q: Tensor = given["query"]
        if q.ndim != 4:
            raise Odd(f"got queries {list(q.shape)}, but [b t h d] is needed")
        if given.get("output_dtype") is not None:
            raise Odd("got output_dtype, which is not understood")
        scale, self._bias = given.get("scale"), given.get("attn_bias")
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self._kind = "" if self._bias is None else type(self._bias).__name__
        self.query, self.key, self.value = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
        self._unedited = self.query, self.key, self.value

    def attend(self, reads_lse: bool) -> Tensor:
        sites = zip(("query", "key", "value"), self._unedited, strict=True)
        edited = {x: found.transpose(1, 2) for x, old in sites if (found := getattr(self, x)) is not old}
        self.attended = self._function(**{**self.given, **edited})
        return self.attended

    def returned(self, out: Tensor) -> Tensor:
        return out

    def check_lse(self) -> None:
        if not isinstance(self._bias, Tensor | None) and not hasattr(self._bias, "materialize"):
            raise self.refuse_lse(f"it is not known what an attn_bias of class {self._kind} does")
        if isinstance(self._bias, Tensor) and self._bias.requires_grad and torch.is_grad_enabled():
            raise self.refuse_lse("its attn_bias requires a gradient, which does not go through the LSE")

    def compute_lse(self) -> Tensor:
        q, k = self.query, self.key
        if self._kind == _LOWER_RIGHT:
            starts = each_row(q.shape[0], q.shape[2], k.shape[2], q.device)
            sequences = Sequences(*starts, is_causal=True)
            return rows_lse(q.transpose(1, 2), k.transpose(1, 2), sequences, self.scale, None)
        mask = None if self._kind == _UPPER_LEFT else self.mask
        return ops.attention_lse(q, k, mask, self.scale, self._kind == _UPPER_LEFT)

    @property
    def is_causal(self) -> bool:
        causal = self._kind in (_UPPER_LEFT, _LOWER_RIGHT)
        return causal and self.query.shape[2] == self.key.shape[2]

    @property
    def mask(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._bias is None or self.is_causal:
            return None
        if isinstance(self._bias, Tensor):
            return self._bias
        self.check_lse()
        t, s = self.query.shape[2], self.key.shape[2]
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        mask: Tensor = self._bias.materialize((1, 1, t, s), dtype=dtype, device=self.query.device)
        return mask

    @property
    def logits(self) -> tuple[str, ...]:
        return ("a bias",) if isinstance(self._bias, Tensor) else ()

    def is_odd_for_all_keys(self) -> list[str]:
        return [] if self._kind in ("", "Tensor", _UPPER_LEFT, _LOWER_RIGHT) else [self._kind]


class FlexCall(PackageCall):
    """torch's `flex_attention`, also after torch.compile. It gives the LSE itself."""

    def __init__(
        self, function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = arguments(function, args, kwargs)
        super().__init__(function, module, given)
        self.query, self.key, self.value = given["query"], given["key"], given["value"]
        scale = given.get("scale")
        self.scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        self.mask = given.get("block_mask")

    def _call(self, **more: Any) -> Any:
        return self._function(**{**self.given, "query": self.query, "key": self.key, "value": self.value, **more})

    def _with_lse(self) -> tuple[Tensor, Tensor]:
        if "return_aux" not in parameters(self._function):
            return self._call(return_lse=True)
        from torch.nn.attention.flex_attention import AuxRequest

        out, more = self._call(return_lse=False, return_aux=AuxRequest(lse=True))
        return out, more.lse

    def attend(self, reads_lse: bool) -> Tensor:
        if not reads_lse or self.given.get("return_lse") or self.given.get("return_aux") is not None:
            self.attended = self._call()
        else:
            self.attended, lse = self._with_lse()
            self._lse = self._with_gradient(lse)
        out = self.attended[0] if isinstance(self.attended, tuple) else self.attended
        return out.transpose(1, 2)

    def returned(self, out: Tensor) -> Any:
        out = out.transpose(1, 2)
        return (out, *self.attended[1:]) if isinstance(self.attended, tuple) else out

    def compute_lse(self) -> Tensor:
        return self._with_gradient(self._with_lse()[1])

    def _with_gradient(self, lse: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad)
        if needed and not lse.requires_grad:
            raise self.refuse_lse(
                "its flex_attention gives an LSE without a gradient; run the model in torch.no_grad()"
            )
        return lse

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def logits(self) -> tuple[str, ...]:
        return () if self.given.get("score_mod") is None else ("score_mod",)
