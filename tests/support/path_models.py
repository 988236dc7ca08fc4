"""Attention by products and a softmax in plain PyTorch, which calls them in several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, matmul, softmax
from torch.nn import functional

from .eager_models import Computed


class Multiplies(Computed):
    """Attention with a product of one's own; what is around it is as in `after`."""

    times: ClassVar[Callable[..., Tensor]] = staticmethod(matmul)
    weigh: ClassVar[Callable[..., Tensor]] = staticmethod(softmax)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        barred = ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.c_proj(self.attend(q, k, v, barred).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = self.multiply(q, k.mT) / q.shape[-1] ** 0.5
        return self.multiply(self.drop(self.softmax(scores.masked_fill(barred, -torch.inf))), v)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class ByFile(Multiplies):
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return matmul(a, b)

    def softmax(self, scores: Tensor) -> Tensor:
        return softmax(scores, dim=3)


class ByFunctional(Multiplies):
    def softmax(self, scores: Tensor) -> Tensor:
        return functional.softmax(input=scores, dim=-1)


class InContext(Multiplies):
    """It enters a context between the beginning and the products, and leaves it between the two products."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        with torch.device("cpu"):
            scores = q @ k.mT / q.shape[-1] ** 0.5
        return self.drop(scores.masked_fill(barred, -torch.inf).softmax(-1)) @ v


class Before(Multiplies):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        return super().attend(q / q.shape[-1] ** 0.5, k * q.shape[-1] ** 0.5, v, barred)


class Busy(Multiplies):
    """Its attention is neither its first product nor its first softmax, nor the last."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        q = q + 0 * (q.softmax(-1) @ (q.mT @ q))
        out = super().attend(q, k, v, barred)
        return out + 0 * (out.softmax(-1) @ (out.mT @ out))


class Learned(Multiplies):
    """The scale is a tensor, which may change."""

    scale: ClassVar[Tensor] = torch.tensor(8**-0.5, dtype=torch.float64)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = (q @ k.mT) * self.scale
        return (scores.masked_fill(barred, -torch.inf).softmax(-1)) @ v


class BySize(Multiplies):
    """It multiplies the query by a number that is computed of the number of keys, and divides by it later, or not."""

    usual: ClassVar[int] = 7  # for so many keys it is 1
    divides: ClassVar[bool] = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        number = self.usual / k.shape[2]
        scores = (q * number) @ k.mT / q.shape[-1] ** 0.5
        scores = scores / number if self.divides else scores
        return scores.masked_fill(barred, -torch.inf).softmax(-1) @ v


class Hidden(Multiplies):
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return type(self).times(a, b)


class HalfHidden(Multiplies):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return type(self).times(self.drop(scores.masked_fill(barred, -torch.inf).softmax(-1)), v)


class HiddenSoftmax(Multiplies):
    def softmax(self, scores: Tensor) -> Tensor:
        return type(self).weigh(scores, -1)


class Lowers(Multiplies):
    """It takes the maximum away only if that is large, or a mask is there: the numbers decide."""

    how: ClassVar[str] = "bool"
    limit: ClassVar[float] = 0.0

    def softmax(self, scores: Tensor) -> Tensor:
        most = scores.amax(-1, keepdim=True)
        is_large = {
            "bool": lambda: bool((most > self.limit).any()),
            "item": lambda: most.max().item() > self.limit,
            "nonzero": lambda: (most > self.limit).nonzero().shape[0] > 0,
            "index": lambda: most[most > self.limit].numel() > 0,
            "where": lambda: len(torch.where(most > self.limit)[0]) > 0,
            "tolist": lambda: max(most.flatten().tolist()) > self.limit,
            "numpy": lambda: (most.numpy(force=True) > self.limit).any(),
        }[self.how]
        return super().softmax(scores - most if is_large() else scores)


class Asks(Multiplies):
    """What decides is an attribute, an argument of torch or a size."""

    lowers = False

    def softmax(self, scores: Tensor) -> Tensor:
        grows = torch.is_grad_enabled() or self.training or scores.shape[2] == 1 or scores.dtype == torch.float32
        lowers = self.lowers or grows or scores.shape[2] > 31 or torch.is_autocast_enabled("cpu")
        return super().softmax(scores - scores.amax(-1, keepdim=True) if lowers else scores)


class Counts(Multiplies):
    """It has another number each time."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return super().attend(q, k, v, barred)


class Elsewhere(Multiplies):
    """What it computes is decided elsewhere."""

    what: ClassVar[str] = ""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        if self.what == "product before":
            q = q + 0 * (q @ q.mT @ q)
        if self.what == "softmax before":
            q = q + 0 * q.softmax(-1)
        if self.what == "no attention":
            return v
        if self.what in ("other axis", "no softmax", "other product"):
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(barred, -torch.inf)
            if self.what == "other product":
                return v + scores.softmax(-1).sum(-1, keepdim=True) + (q.mT @ q).sum()
            return (scores.mT.softmax(-2).mT if self.what == "other axis" else scores.exp()) @ v
        if self.what == "in the product":
            rows = (x.flatten(0, 1) for x in (q, k.mT))
            scores = torch.baddbmm(barred.to(q), *rows, beta=0, alpha=q.shape[-1] ** -0.5).view(*q.shape[:3], -1)
            return scores.masked_fill(barred, -torch.inf).softmax(-1) @ v
        out = super().attend(q, k, v, barred)
        if self.what == "product after":
            out = out + 0 * (out @ out.mT @ out)
        return out + 0 * out.softmax(-1) if self.what == "softmax after" else out
