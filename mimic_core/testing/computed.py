"""The oracle's view of attention that a module computes by itself. It shares no code with the library.

The library follows tensors forward and edits the query before it is multiplied. Here all calls of torch are written
down. A softmax looks back for the product that it comes from, and what lies between is run again with edited factors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LAST = 400
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")


class _Call(NamedTuple):
    """A call of torch, and for a product of two tensors: whose it is and how many samples that got.

    `earlier` is the call that gave the same tensor before, which was written to since.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    module: nn.Module | None = None
    samples: int = 0
    earlier: int | None = None

    @property
    def factors(self) -> list[Tensor]:
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        tensors += [x for y in self.args if isinstance(y, list | tuple) for x in y if isinstance(x, Tensor)]
        return tensors[-2:]

    def again(self, old: list[Tensor], new: list[Tensor]) -> Any:
        """The same call with other tensors."""

        def other(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(map(other, x))
            return next((b for a, b in zip(old, new, strict=True) if a is x), x)

        return self.func(*map(other, self.args), **{name: other(x) for name, x in self.kwargs.items()})


class Softmax(NamedTuple):
    """The softmax of one attention: its module, query [b h t d], key [b g s d], its input and its output."""

    module: nn.Module
    query: Tensor
    key: Tensor
    logits: Tensor
    out: Tensor
    samples: int


class Computed(TorchFunctionMode):
    """Inside the `with`, attention by products and a softmax is given to the oracle.

    Args:
        edit: Gives the new value of `query`, `key` or `value` of a module.
        attended: Gets the softmax, the value and the output [b t h e], and gives a new output.
        sdpa: Torch's SDPA, called by a name that is not the usual one.
        is_plain: Whether the softmax of a module is computed here.
        is_busy: Whether calls are those of other attention.
    """

    def __init__(
        self,
        edit: Callable[[nn.Module, str, Tensor], Tensor],
        attended: Callable[[Softmax, Tensor, Tensor], Tensor],
        sdpa: Callable[..., Tensor],
        is_plain: Callable[[nn.Module], bool],
        is_busy: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._edit, self._attended, self._sdpa = edit, attended, sdpa
        self._is_plain, self._is_busy = is_plain, is_busy
        self._calls: dict[int, _Call] = {}
        self._latest: dict[int, int] = {}
        self._count = 0
        self._softmaxes: list[Softmax] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._is_busy():
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._sdpa(*args, **kwargs)
        if name == "softmax":
            return self._softmax(func, args, kwargs)
        module, samples = None, 0
        call = _Call(func, args, kwargs, torch.empty(0))
        if name in _PRODUCTS and len(call.factors) == 2 and all(x.ndim > 2 for x in call.factors):
            if isinstance(found := self._heads(call), Tensor):
                return found
            module, samples = _running()
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and name != "__get__":
            self._keep(call._replace(out=out, module=module, samples=samples, earlier=self._index(out)))
        return out

    def _keep(self, call: _Call) -> None:
        self._calls[self._count] = call
        self._latest[id(call.out)] = self._count
        old = self._calls.pop(self._count - _LAST, None)
        if old is not None and self._latest.get(id(old.out)) == self._count - _LAST:
            del self._latest[id(old.out)]
        self._count += 1

    def _index(self, x: Any, before: int | None = None) -> int | None:
        """The last call that gave a tensor."""
        index = self._latest.get(id(x))
        while index is not None and before is not None and index >= before:
            index = self._calls[index].earlier if index in self._calls else None
        return index if index in self._calls else None

    def _way(
        self, x: Any, ends: Callable[[Any], bool], before: int | None = None, dead: set[int] | None = None
    ) -> list[_Call] | None:
        """The calls that lead to a tensor, from one with an end. An empty list if it is an end itself."""
        dead = set() if dead is None else dead
        if ends(x):
            return []
        index = self._index(x, before)
        if index is None or index in dead:
            return None
        dead.add(index)
        call = self._calls[index]
        if call.module is not None and ends(call):
            return [call]
        for y in (*call.args, *call.kwargs.values()):
            if isinstance(y, Tensor) and (way := self._way(y, ends, index, dead)) is not None:
                return [*way, call]
        return None

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x, *rest = args
        way = self._way(x, lambda end: isinstance(end, _Call))
        if not way or x.ndim < 3 or way[0].module is None or _mixes(way):
            return func(*args, **kwargs)
        product, *others = way
        module, b = way[0].module, product.samples
        name = getattr(product.func, "__name__", "")
        first, second = product.factors
        if name == "einsum":
            given, _, to = product.args[0].replace(" ", "").partition("->")
            of_first, of_second = given.split(",")
            (shared,) = (set(of_first) & set(of_second)) - set(to)
            turned = to[-2] in of_second
            of_q, of_k = (of_second, of_first) if turned else (of_first, of_second)
            q, k = (second, first) if turned else (first, second)
            batch_q, batch_k = to[:-2], "".join(c for c in to[:-2] if c in of_k)
            to_q, to_k = batch_q + to[-2] + shared, batch_k + to[-1] + shared
            query, key = torch.einsum(f"{of_q}->{to_q}", q), torch.einsum(f"{of_k}->{to_k}", k)
        else:
            turned, of_q, of_k, to_q, to_k = False, "td", "ds", "td", "sd"
            q, k = first, second
            query, key = q, k.transpose(-1, -2)
        factors = self._times(q), 1.0  # a cache may hold scaled keys
        shapes = query.shape, key.shape
        query, key = (_with_heads(y, b) / factor for y, factor in zip((query, key), factors, strict=True))
        edited = self._edit(module, "query", query), self._edit(module, "key", key)
        if edited[0] is not query or edited[1] is not key:
            new = [(y * f).reshape(shape) for y, f, shape in zip(edited, factors, shapes, strict=True)]
            if name == "einsum":
                new = [torch.einsum(f"{to_q}->{of_q}", new[0]), torch.einsum(f"{to_k}->{of_k}", new[1])]
            else:
                new[1] = new[1].transpose(-1, -2)
            before, now = product.out, product.again([q, k], new)
            for call in others:
                before, now = call.out, call.again([before], [now])
            x = now
        out = func(x, *rest, **kwargs)
        self._softmaxes = [*self._softmaxes[-8:], Softmax(module, *edited, x, out, b)]
        return out

    def _times(self, x: Tensor) -> float:
        """The number by which a tensor was multiplied, if it was only moved since."""
        factor = 1.0
        while (index := self._index(x)) is not None:
            call = self._calls[index]
            name = getattr(call.func, "__name__", "").strip("_")
            tensors = [y for y in call.args if isinstance(y, Tensor) and y.ndim]
            if len(tensors) != 1 or tensors[0] is x:
                break
            numbers = [
                float(y) for y in call.args if isinstance(y, float | int) or (isinstance(y, Tensor) and not y.ndim)
            ]
            if name in ("mul", "rmul", "div", "truediv") and len(numbers) == 1:
                factor = factor * numbers[0] if "mul" in name else factor / numbers[0]
            elif not _is_moved(tensors[0], call.out):
                break
            x = tensors[0]
        return factor

    def _heads(self, call: _Call) -> Tensor | None:
        """The product of weights and values. None if it is another one."""
        weights, value = call.factors
        found = None
        for softmax in reversed(self._softmaxes):
            if self._way(weights, lambda end, softmax=softmax: end is softmax.out) is not None:
                found = softmax
                break
        if found is None:
            return None
        wide, to, letters, order, out_order = value, "", "", "", ""
        if getattr(call.func, "__name__", "") == "einsum":
            given, _, to = call.args[0].replace(" ", "").partition("->")
            of_weights, letters = given.split(",")
            (e,) = set(letters) - set(of_weights)
            order = "".join(c for c in of_weights[:-2] if c in letters) + of_weights[-1] + e
            out_order = of_weights[:-2] + of_weights[-2] + e
            wide = torch.einsum(f"{letters}->{order}", value)
        shape = wide.shape
        site = _with_heads(wide, found.samples)
        edited = self._edit(found.module, "value", site)
        if edited is not site:
            back = edited.reshape(shape)
            back = torch.einsum(f"{order}->{letters}", back) if to else back
        else:
            back = value
        computed = weights
        if self._is_plain(found.module):
            computed = torch.softmax(_wide(found.logits), -1).to(weights.dtype).reshape(weights.shape)
        out = call.again([weights, value], [computed, back])
        out = torch.einsum(f"{to}->{out_order}", out) if to else out
        shape = out.shape
        heads = _with_heads(out, found.samples).transpose(1, 2)
        out = self._attended(found, edited, heads).transpose(1, 2).reshape(shape)
        return torch.einsum(f"{out_order}->{to}", out) if to else out


def lse_of(found: Softmax) -> Tensor:
    """The log-sum-exp of what a softmax got, in fp64, [b h t]. -inf in a row of which each key is masked."""
    wide = _wide(found.logits)
    lowest = max(torch.finfo(x.dtype).min for x in (found.query, found.logits))
    none = (wide < lowest / 2).all(-1)
    lse = torch.logsumexp(wide.masked_fill(none[..., None], 0.0), -1).masked_fill(none, -torch.inf)
    return lse.reshape(found.query.shape[:3])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _with_heads(x: Tensor, b: int) -> Tensor:
    """[(b h) . .] as [b h . .]; without heads, [b 1 . .]."""
    return x if x.ndim == 4 else x.reshape(b, -1, *x.shape[1:])


def _mixes(way: list[_Call]) -> bool:
    return any(getattr(call.func, "__name__", "") in ("cat", "transpose", "permute", "topk") for call in way[1:])


def _is_moved(x: Tensor, out: Tensor) -> bool:
    """Whether a tensor has the same numbers as another, in another order or shape."""
    if x.numel() != out.numel():
        return False
    return torch.equal(x.detach().flatten().double().sort()[0], out.detach().flatten().double().sort()[0])


def _running() -> tuple[nn.Module | None, int]:
    """The innermost module whose call this code runs in, and how many samples it got, read from the stack."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        if isinstance(module, nn.Module):
            given = (*frame.f_locals.get("args", ()), *frame.f_locals.get("kwargs", {}).values())
            rows = [x.shape[0] for x in given if isinstance(x, Tensor) and x.ndim > 2 and x.is_floating_point()]
            return module, rows[0] if rows else 1
        frame = frame.f_back
    return None, 0
