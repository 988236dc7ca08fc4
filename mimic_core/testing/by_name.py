"""The oracle's view of functions of packages that code calls by name. It shares no code with the library."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

_PACKED = ("flash_attn_qkvpacked_func", "flash_attn_kvpacked_func")
_PACKED += ("flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func")
_FLASH = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", *_PACKED)
_WHERE = {"flash_attn": _FLASH, "flash_attn_interface": _FLASH, "flash_attn.flash_attn_interface": _FLASH}
_WHERE |= {"flash_attn.cute": _FLASH[:2], "flash_attn.cute.interface": _FLASH[:2]}
_WHERE |= {"xformers.ops": ("memory_efficient_attention",), "torch.nn.attention.flex_attention": ("flex_attention",)}

# transformers' own files are not searched for it: its attention interface calls it.
_OF_TRANSFORMERS = "_flash_attention_forward"
_WHERE |= {"transformers.modeling_flash_attention_utils": (_OF_TRANSFORMERS,)}


class Given(NamedTuple):
    """What a call means: query [b h t d], key [b g s d], value [b g s e], what is attended to, and how it is run.

    Attributes:
        mask: bool or additive, [b h t s] with axes that may be 1, or flex attention's.
        options: `scaling`, `softcap`, `s_aux` (sinks) and `score_mod`.
        run: The function with another query, key and value. It returns the output [b t h e].
        back: What the function returns for such an output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    back: Callable[[Tensor], Any]


class Replaced:
    """The names of the functions, in all files, replaced between `put` and `restore`."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        self._attention = attention
        self._before: list[tuple[Any, str, Any]] = []

    def put(self) -> None:
        functions = {
            id(_below(function)): name
            for file, names in _WHERE.items()
            for name in names
            if (function := getattr(sys.modules.get(file), name, None)) is not None
        }
        for file, name in _places(frozenset(functions), len(sys.modules)):
            x = getattr(file, name, None)
            if id(_below(x)) in functions:
                bound = x if type(x) is partial else partial(x)  # pyright: ignore[reportCallIssue, reportArgumentType]
                attend = partial(self._attention, functions[id(_below(x))], bound.func)
                self._before.append((file, name, x))
                setattr(file, name, partial(attend, *bound.args, **bound.keywords))

    def restore(self) -> None:
        for file, name, x in self._before:
            setattr(file, name, x)
        self._before = []


@lru_cache(maxsize=1)
def _places(functions: frozenset[int], loaded: int) -> list[tuple[ModuleType, str]]:
    """The files that have the functions, and under which names. To look through all files takes a tenth of a second."""
    return [
        (file, name)
        for file in list(sys.modules.values())
        if isinstance(file, ModuleType) and not file.__name__.startswith("mimic_core.")
        for name, x in list(vars(file).items())
        if type(x) in (FunctionType, partial)
        and id(_below(x)) in functions
        and not (name == _OF_TRANSFORMERS and file.__name__.startswith("transformers."))
    ]


def _below(x: Any) -> Any:
    """The function that a `partial`, torch.compile, or a patch in a model has put something around."""
    while True:
        names = ("func",) if type(x) is partial else ("original", "_torchdynamo_orig_callable")
        found = next((n for n in names if type(x) in (partial, FunctionType) and hasattr(x, n)), None)
        if found is None:
            return x
        x = getattr(x, found)


def read(kind: str, function: Callable[..., Any], args: Any, kwargs: Any, batch: tuple[int, int] | None) -> Given:
    """What a call means. `batch` is b and t of the states of the module that calls."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if kind in _PACKED:
        function, given = _by_themselves(function, given)
        kind = "flash_attn_varlen_func" if "varlen" in kind else "flash_attn_func"
    readers = {"flash_attn_varlen_func": _varlen, "flash_attn_with_kvcache": _kvcache}
    readers |= {"memory_efficient_attention": _xformers, "flex_attention": _flex}
    readers[_OF_TRANSFORMERS] = _transformers
    return readers.get(kind, _flash)(function, given, batch)


def _by_themselves(function: Callable[..., Any], given: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function that is given query, key and value, or key and value, in one tensor: as one that is not."""
    name = "qkv" if "qkv" in given else "kv"
    both = [x for x in ("cu_seqlens", "max_seqlen") if x in given]

    def plain(**given: Any) -> Any:
        rest = {x: y for x, y in given.items() if x not in name and x[:-2] not in both}
        whole = torch.stack([given[x] for x in name], -3)
        return function(**{name: whole}, **rest, **{x: given[f"{x}_q"] for x in both})

    rest = {x: y for x, y in given.items() if x != name and x not in both}
    rest |= {x: given[name].select(-3, i) for i, x in enumerate(name)}
    return plain, rest | {f"{x}_{end}": given[x] for x in both for end in "qk"}


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def _flash_options(given: dict[str, Any]) -> dict[str, Any]:
    options = {"scaling": given["softmax_scale"], "is_causal": False}
    options |= {"softcap": given["softcap"]} if given.get("softcap") else {}
    sinks = next((given[x] for x in ("s_aux", "learnable_sink") if given.get(x) is not None), None)
    return options if sinks is None else options | {"s_aux": sinks}


def _seen(rows: Tensor, columns: Tensor, given: dict[str, Any]) -> Tensor:
    """Which keys are attended to, by the places of queries and keys in their sequence, counted from its end."""
    distance = rows[..., :, None] - columns[..., None, :]
    before, after = given.get("window_size") or (-1, -1)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if given.get("causal"):
        seen = seen & (distance >= 0)
    elif after is not None and after >= 0:
        seen = seen & (distance >= -after)
    if before is not None and before >= 0:
        seen = seen & (distance <= before)
    return seen


def _flash(function: Callable[..., Any], given: dict[str, Any], batch: Any) -> Given:
    q, k, v = (rearrange(given[name], "b t h d -> b h t d") for name in "qkv")
    t, s = q.shape[2], k.shape[2]
    mask = _seen(torch.arange(-t, 0, device=q.device), torch.arange(-s, 0, device=q.device), given)
    return Given(q, k, v, mask[None, None], _flash_options(given), *_runs(function, given, "b t"))


def _runs(function: Callable[..., Any], given: dict[str, Any], tokens: str, **sizes: int) -> Any:
    """How a function is run, and what it returns then; its samples and tokens are the axes `tokens`."""
    kept: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = {n: rearrange(x, f"b h t d -> {tokens} h d") for n, x in zip("qkv", (q, k, v), strict=True)}
        kept.append(function(**{**given, **moved}))
        return rearrange(_first(kept[-1]), f"{tokens} h e -> b t h e", **sizes)

    def back(out: Tensor) -> Any:
        more = given.get("return_attn_probs") or "return_lse" in given
        found = kept[-1] if kept else function(**given) if more else None
        out = rearrange(out, f"b t h e -> {tokens} h e")
        return (out, *found[1:]) if isinstance(found, tuple) else out

    return run, back


def _varlen(function: Callable[..., Any], given: dict[str, Any], batch: tuple[int, int] | None) -> Given:
    n, rows = len(given["q"]), 1
    if batch is not None and batch[0] * batch[1] == n == len(given["k"]):
        rows = batch[0]
    q, k, v = (rearrange(given[name], "(b t) h d -> b h t d", b=rows) for name in "qkv")
    of_tokens = []
    for name, count in (("cu_seqlens_q", n), ("cu_seqlens_k", len(given["k"]))):
        ends = given[name].tolist()
        sample = torch.tensor([next((i for i, end in enumerate(ends[1:]) if j < end), -1) for j in range(count)])
        place = torch.tensor([j - ends[i + 1] for j, i in enumerate(sample.tolist())])
        of_tokens.append((sample.to(q.device).view(rows, -1), place.to(q.device).view(rows, -1)))
    (sample_q, place_q), (sample_k, place_k) = of_tokens
    mask = _seen(place_q, place_k, given) & (sample_q[..., :, None] == sample_k[..., None, :])

    return Given(q, k, v, mask[:, None], _flash_options(given), *_runs(function, given, "(b t)", b=rows))


def _kvcache(function: Callable[..., Any], given: dict[str, Any], batch: Any) -> Given:
    q = rearrange(given["q"], "b t h d -> b h t d")
    b, t = len(given["q"]), given["q"].shape[1]
    held = given["cache_seqlens"] if given["cache_seqlens"] is not None else given["k_cache"].shape[1]
    held = [int(held)] * b if not isinstance(held, Tensor) else held.tolist()
    if given["k"] is not None:
        new = given["k"].shape[1]
        for row, start in enumerate(held):
            given["k_cache"][row, start : start + new] = given["k"][row]
            given["v_cache"][row, start : start + new] = given["v"][row]
        held = [start + new for start in held]
    s = max(held)
    k, v = (rearrange(given[name][:, :s], "b s g d -> b g s d") for name in ("k_cache", "v_cache"))
    ends = torch.tensor(held, device=q.device)[:, None]
    places = torch.arange(s, device=q.device) - ends
    mask = _seen(torch.arange(-t, 0, device=q.device).expand(b, t), places, given) & (places < 0)[:, None, :]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = {
            n: rearrange(x, "b h t d -> b t h d") for n, x in zip(("q", "k_cache", "v_cache"), (q, k, v), strict=True)
        }
        rest = {"k": None, "v": None, "cache_seqlens": ends[:, 0].int()}
        return _first(function(**{**given, **moved, **rest}))

    return Given(q, k, v, mask[:, None], _flash_options(given), run, lambda out: out)


def _transformers(function: Callable[..., Any], given: dict[str, Any], batch: Any) -> Given:
    """With a mask of padding [b s], or with whole rows. Rows of several sequences are not for the oracle."""
    given |= given.pop("kwargs", {})
    names = ("query_states", "key_states", "value_states")
    q, k, v = (rearrange(given[name], "b t h d -> b h t d") for name in names)
    t, s, window, padding = q.shape[2], k.shape[2], given["sliding_window"], given["attention_mask"]
    real_k = torch.ones(len(q), s, dtype=torch.bool, device=q.device)
    if padding is not None:
        real_k[:, : padding.shape[1]] = padding[:, :s].bool()
        real_k[:, padding.shape[1] :] = False
    real_q = torch.ones_like(real_k[:, :1]) if t == 1 or padding is None else padding[:, :s].bool()[:, -t:]
    real_q = real_q.expand(len(q), t)
    # Places among the real tokens, counted from their end.
    place_q, place_k = (real.cumsum(1) - real.sum(1, keepdim=True) for real in (real_q, real_k))
    window_size = (-1, -1) if window is None or s <= window else (window - 1, window - 1)
    seen = _seen(place_q, place_k, {"causal": given["is_causal"], "window_size": window_size})
    seen = seen & real_q[:, :, None] & real_k[:, None]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = {n: rearrange(x, "b h t d -> b t h d") for n, x in zip(names, (q, k, v), strict=True)}
        return function(**{**given, **moved})

    options = {"scaling": given["softmax_scale"], "is_causal": False}
    options |= {name: given[name] for name in ("softcap", "s_aux") if given.get(name) is not None}
    return Given(q, k, v, seen[:, None], options, run, lambda out: out)


def _xformers(function: Callable[..., Any], given: dict[str, Any], batch: Any) -> Given:
    names = ("query", "key", "value")
    q, k, v = (rearrange(given[name], "b t h d -> b h t d") for name in names)
    t, s, bias = q.shape[2], k.shape[2], given["attn_bias"]
    mask, everything = bias, torch.ones(t, s, dtype=torch.bool, device=q.device)[None, None]
    if type(bias).__name__ == "LowerTriangularMask":
        mask = everything.tril()
    elif type(bias).__name__ == "LowerTriangularFromBottomRightMask":
        mask = everything.tril(s - t)
    elif bias is not None and not isinstance(bias, Tensor):
        mask = bias.materialize((1, 1, t, s), dtype=torch.float32, device=q.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = {n: rearrange(x, "b h t d -> b t h d") for n, x in zip(names, (q, k, v), strict=True)}
        return function(**{**given, **moved})

    return Given(q, k, v, mask, {"scaling": given["scale"], "is_causal": False}, run, lambda out: out)


def _flex(function: Callable[..., Any], given: dict[str, Any], batch: Any) -> Given:
    kept: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append(function(**{**given, "query": q, "key": k, "value": v}))
        return rearrange(_first(kept[-1]), "b h t e -> b t h e")

    def back(out: Tensor) -> Any:
        moved = rearrange(out, "b t h e -> b h t e")
        return (moved, *kept[-1][1:]) if kept and isinstance(kept[-1], tuple) else moved

    options = {"scaling": given["scale"], "is_causal": False, "score_mod": given["score_mod"]}
    return Given(given["query"], given["key"], given["value"], given["block_mask"], options, run, back)


def states_of(args: Any, kwargs: Any) -> tuple[int, int] | None:
    """b and t of the first states [b t c] among arguments."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point():
            return x.shape[0], x.shape[1]
    return None


def caller(depth: int) -> tuple[nn.Module | None, tuple[int, int] | None]:
    """The innermost module whose call this code runs in, and b and t of what it got."""
    frame = sys._getframe(depth)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        if isinstance(module, nn.Module):
            return module, states_of(frame.f_locals.get("args", ()), frame.f_locals.get("kwargs", {}))
        frame = frame.f_back
    return None, None
