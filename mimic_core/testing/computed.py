"""The oracle's view of attention that a module computes by itself. It shares no code with the library.

The library follows tensors forward and edits the query before it is multiplied. Here all calls of torch are written
down. A softmax looks back for the product that it comes from, and what lies between is run again with edited factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calls import Call, Softmax, is_moved, mixes, nth, own_bias, running, takes_largest, wide, with_heads

_LAST = 400
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")


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
        self._calls: dict[int, Call] = {}
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
        call = Call(func, args, kwargs, torch.empty(0))
        if name in _PRODUCTS and len(call.factors) == 2 and all(x.ndim > 2 for x in call.factors):
            if isinstance(found := self._heads(call), Tensor):
                return found
            module, samples = running()
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and name != "__get__":
            call = call._replace(out=out, module=module, samples=samples, earlier=self._index(out))
            self._keep(call._replace(largest=takes_largest(name, args, out)))
        elif isinstance(out, tuple) and name in ("max", "topk"):
            for n, one in enumerate(out):
                self._keep(call._replace(func=nth(func, n), out=one))
        return out

    def _keep(self, call: Call) -> None:
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
    ) -> list[Call] | None:
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
        for y in call.tensors:
            if (way := self._way(y, ends, index, dead)) is not None:
                return [*way, call]
        return None

    def _again(self, old: Tensor, new: Tensor, after: Call | None = None) -> dict[int, Tensor]:
        """All that was computed from a tensor, after a call, if it is another one: by the tensors that there were."""
        olds, news, begun = [old], [new], after is None
        for call in self._calls.values():
            if begun and any(x is y for x in call.tensors for y in olds):
                again = call.again(olds, news)
                olds, news = [call.out, *olds], [again, *news]
            begun = begun or call is after
        return {id(x): y for x, y in zip(reversed(olds), reversed(news), strict=True)}

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x, *rest = args
        way = self._way(x, lambda end: isinstance(end, Call))
        if not way or x.ndim < 3 or way[0].module is None or mixes(way):
            return func(*args, **kwargs)
        product, others = way[0], {}
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
        query, key = (with_heads(y, b) / factor for y, factor in zip((query, key), factors, strict=True))
        edited = self._edit(module, "query", query), self._edit(module, "key", key)
        if edited[0] is not query or edited[1] is not key:
            new = [(y * f).reshape(shape) for y, f, shape in zip(edited, factors, shapes, strict=True)]
            if name == "einsum":
                new = [torch.einsum(f"{to_q}->{of_q}", new[0]), torch.einsum(f"{to_k}->{of_k}", new[1])]
            else:
                new[1] = new[1].transpose(-1, -2)
            others = self._again(product.out, product.again([q, k], new), product)
            x = others[id(x)]
        out, whole = func(x, *rest, **kwargs), x
        for call in way:
            if call.largest:
                less, row = (others.get(id(y), y) for y in (call.out, call.tensors[1]))
                whole = self._again(call.out, less + row, call)[id(args[0])]
            elif (own := own_bias(call)) is not None:
                whole = whole - own
        self._softmaxes = [*self._softmaxes[-8:], Softmax(module, *edited, x, out, b, whole)]
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
            elif not is_moved(tensors[0], call.out):
                break
            x = tensors[0]
        return factor

    def _heads(self, call: Call) -> Tensor | None:
        """The product of weights and values. None if it is another one."""
        weights, value = call.factors
        found = None
        for softmax in reversed(self._softmaxes):
            if self._way(weights, lambda end, softmax=softmax: end is softmax.out) is not None:
                found = softmax
                break
        if found is None:
            return None
        whole, to, letters, order, out_order = value, "", "", "", ""
        if getattr(call.func, "__name__", "") == "einsum":
            given, _, to = call.args[0].replace(" ", "").partition("->")
            of_weights, letters = given.split(",")
            (e,) = set(letters) - set(of_weights)
            order = "".join(c for c in of_weights[:-2] if c in letters) + of_weights[-1] + e
            out_order = of_weights[:-2] + of_weights[-2] + e
            whole = torch.einsum(f"{letters}->{order}", value)
        shape = whole.shape
        site = with_heads(whole, found.samples)
        edited = self._edit(found.module, "value", site)
        if edited is not site:
            back = edited.reshape(shape)
            back = torch.einsum(f"{order}->{letters}", back) if to else back
        else:
            back = value
        computed = weights
        if self._is_plain(found.module):
            computed = torch.softmax(wide(found.logits), -1).to(found.out.dtype)
            computed = self._again(found.out, computed)[id(weights)]
        out = call.again([weights, value], [computed, back])
        out = torch.einsum(f"{to}->{out_order}", out) if to else out
        shape = out.shape
        heads = with_heads(out, found.samples).transpose(1, 2)
        out = self._attended(found, edited, heads).transpose(1, 2).reshape(shape)
        return torch.einsum(f"{out_order}->{to}", out) if to else out
