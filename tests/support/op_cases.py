"""The cases every test of the ops runs on, how a case becomes tensors, and how close a result must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.support import oracles


class Tolerance(NamedTuple):
    """Largest error allowed, relative to the largest entry wanted: of an output, and of a gradient.

    On top of 1.5 times the error plain SDPA makes on the same inputs; in units of the dtype's eps for half precision.
    """

    out: float
    grad: float


TOLERANCE = {
    torch.float64: Tolerance(1e-12, 1e-11),
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.bfloat16: Tolerance(1.0, 1.0),
    torch.float16: Tolerance(1.0, 1.0),
}
# Where what is wanted is zero or cancels to nearly zero; inputs and incoming gradients are of order 1. A gradient takes
# in half precision the rounding of the output with it, eps / 2, even where plain SDPA's output happens to be exact.
ABSOLUTE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
HALF = (torch.bfloat16, torch.float16)

# "cpu" is the op in C++, "plain" the same backend without: conftest.py takes it away from a test with that `backend`.
BACKENDS = ("reference", "cpu", "plain", "sdpa")
# Drawn anew would be drawn differently in every run: a failure must be there again in the next one.
DRAWN = settings(max_examples=30, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """One call of attention. `mask` is "form axes option...", as `make_mask` reads it; `e` is the value width."""

    mask: str = "none"
    b: int = 2
    h: int = 4
    g: int = 2
    t: int = 5
    s: int = 7
    d: int = 8
    e: int | None = None
    is_causal: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in vars(self).items() if value != vars(Case())[name]]
        return "-".join(said).replace(" ", "_").replace("torch.", "") or "plain"


CASES = [
    Case(),
    Case(g=4),
    Case(g=1),
    Case(b=1, h=1, g=1),
    Case(t=1),
    Case(t=1, s=1, g=4),
    Case(t=7, s=3),
    Case(is_causal=True),
    Case(is_causal=True, t=6, s=6, g=4),
    Case(is_causal=True, t=6, s=6, g=1),
    Case(is_causal=True, t=7, s=4),
    Case(is_causal=True, t=1),
    *(Case(f"bool {axes}") for axes in ("b1ts", "11ts", "ts", "b11s", "bhts", "hts", "s", "bht1")),
    *(Case(f"{form} {axes}") for form in ("min", "inf") for axes in ("b1ts", "ts", "b11s")),
    *(Case(f"bias {axes}", g=g) for axes, g in (("bhts", 4), ("1hts", 2), ("b1ts", 1), ("b1t1", 2))),
    Case("bool b1ts turned"),
    Case("bias bhts turned"),
    Case("bias b1ts strided"),
    Case("min32 b1ts", dtype=torch.float64),
    Case("bias64 b1ts"),
    *(Case(f"{form} {axes} empty") for form in ("bool", "min", "inf", "bias") for axes in ("b1ts", "b11s", "bhts")),
    Case("bool ts empty", t=1),
    Case("inf b1ts empty", dtype=torch.float64),
    Case("min b1ts empty", dtype=torch.float64),
    Case("bool b11s", t=1, s=9),
    Case("min b1ts", t=1, s=9),
    Case(d=1),
    Case("bool b1ts empty", d=1, g=4),
    Case(d=64, is_causal=True),
    Case(d=80, g=1),
    Case("bool b1ts", d=80, t=6, s=6),
    # More than one block of queries, and of keys, in torch's CPU kernel.
    Case(b=1, h=2, g=1, t=70, s=70, is_causal=True),
    Case("bool b11s", b=1, h=2, g=1, t=3, s=600),
    Case(scale=0.3),
    Case("inf b1ts", scale=-0.3),
    Case(scale=-0.3, is_causal=True),
    Case(scale=-0.3, is_causal=True, g=4, t=6, s=6),
    *(Case(layout=layout) for layout in ("projected", "strided", "turned")),
    *(Case(layout=layout, t=6, s=6, is_causal=True) for layout in ("projected", "strided", "turned")),
    Case("min b1ts empty", layout="strided", g=4),
    Case(layout="turned", d=1, t=1),
    Case(dtype=torch.float64, is_causal=True),
]
WIDE_VALUES = [Case(e=5), Case("bool b1ts empty", e=12, g=4), Case(e=1, is_causal=True, t=6, s=6)]
HALF_CASES = [
    replace(case, dtype=dtype)
    for dtype in HALF
    for case in (
        Case(),
        Case(g=4, d=64, is_causal=True, t=6, s=6),
        Case(g=1, d=80, t=33, s=40, b=1),
        Case("bool b1ts empty"),
        Case("min b1ts empty"),
        Case("inf b11s empty", g=4),
        Case("min32 b1ts empty"),
        Case("bias32 bhts"),
        Case(is_causal=True, t=7, s=4),
        Case(t=1, s=9, d=1),
        Case(layout="strided"),
    )
]


@st.composite
def drawn_cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64)) -> Case:
    g = draw(st.integers(1, 3))
    is_causal = draw(st.booleans())
    form = draw(st.sampled_from(("bool", "min", "inf", "bias")))
    axes = draw(st.sampled_from(("b1ts", "11ts", "ts", "b11s", "bhts", "1hts", "hts", "s")))
    option = draw(st.sampled_from(("", " empty", " turned", " empty strided")))
    return Case(
        mask="none" if is_causal or draw(st.booleans()) else f"{form} {axes}{option}",
        b=draw(st.integers(1, 3)),
        h=g * draw(st.integers(1, 3)),
        g=g,
        t=draw(st.integers(1, 9)),
        s=draw(st.integers(1, 9)),
        d=draw(st.sampled_from((1, 2, 5, 8, 16))),
        is_causal=is_causal,
        scale=draw(st.sampled_from((None, 0.25, 2.0))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(("contiguous", "projected", "strided", "turned"))),
    )


def make_mask(case: Case, random: torch.Generator) -> Tensor | None:
    """A mask from "form axes option...".

    Forms: bool; min and inf (0 or the dtype's lowest number, or -inf); bias (random numbers, and -inf), with 32 or 64
    appended where its dtype is not that of the inputs. Axes: letters of b h t s, 1 where it broadcasts. Options: empty
    (a row attends to nothing), strided and turned (memory in another order). Elsewhere every row has a key.
    """
    if case.mask == "none":
        return None
    form, axes, *options = case.mask.split()
    shape = [1 if axis == "1" else getattr(case, axis) for axis in axes]
    forbidden = torch.rand(shape, generator=random) < 0.4
    forbidden[..., -1] = False
    if "empty" in options:
        forbidden.view(-1, shape[-1])[0] = True
    dtype = {"32": torch.float32, "64": torch.float64}.get(form[-2:], case.dtype)
    values = torch.randn(shape, generator=random) if form.startswith("bias") else torch.zeros(shape)
    lowest = torch.finfo(dtype).min if form.startswith("min") else -math.inf
    mask = ~forbidden if form == "bool" else values.to(dtype).masked_fill(forbidden, lowest)
    for option in options:
        mask = laid_out(mask, option)
    return mask


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another order of memory."""
    if layout == "projected" and x.ndim == 4:  # as a model's projections give them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "turned" and x.ndim > 1:
        return x.mT.contiguous().mT
    return x


class Inputs(NamedTuple):
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    incoming: dict[str, Tensor]  # gradients of the outputs


@cache
def inputs_of(case: Case) -> Inputs:
    """Random tensors of a case, the same ones every time."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    b, h, g, t, s, d, e = case.b, case.h, case.g, case.t, case.s, case.d, case.e or case.d
    of_case = {"q": normal(b, h, t, d), "k": normal(b, g, s, d), "v": normal(b, g, s, e)}
    parameters = {"vector": normal(h, e), "gate_weight": normal(h, d) / d**0.5, "gate_bias": normal(h) + 1}
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    tensors = {name: laid_out(x.to(case.dtype), case.layout) for name, x in of_case.items()}
    tensors |= {name: x.to(wide) for name, x in parameters.items()}
    incoming = {"out": normal(b, t, h, e).to(case.dtype), "lse": normal(b, h, t).to(wide)}
    options = {"mask": make_mask(case, random), "scale": case.scale, "is_causal": case.is_causal}
    return Inputs(tensors, options, incoming)


LEAVES = {
    "attention": ("q", "k", "v"),
    "out": ("q", "k", "v"),
    "lse": ("q", "k", "v"),
    "attention_lse": ("q", "k"),
    "shifted": ("q", "k", "v", "vector", "gate_weight", "gate_bias"),
}


def call(op: str, source: Any, x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of one op, from mimic_core.ops or from the oracles. "out" and "lse" look at one result alone."""
    if options.get("backend") == "plain":
        options = {**options, "backend": "cpu"}
    if op == "shifted":
        return {"out": source.shifted_attention(*(x[name] for name in LEAVES[op]), **options)}
    if op == "attention_lse" and source is not oracles:
        return {"lse": source.attention_lse(x["q"], x["k"], **options)}
    out, lse = source.attention_with_lse(x["q"], x["k"], x["k" if op == "attention_lse" else "v"], **options)
    return {name: y for name, y in {"out": out, "lse": lse}.items() if op == "attention" or name in op}


class Results(NamedTuple):
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def results(op: str, source: Any, inputs: Inputs, **options: Any) -> Results:
    """Outputs and every gradient, taken while `torch.empty` holds NaN."""
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in LEAVES[op]}
    with poisoned_empty():
        outputs = call(op, source, leaves, {**inputs.options, **options})
        # In the oracle an output depends on nothing where no row attends to anything.
        tracked = {name: y for name, y in outputs.items() if y.requires_grad}
        incoming = [inputs.incoming[name].to(y.dtype) for name, y in tracked.items()]
        grads = [torch.zeros_like(x) for x in leaves.values()]
        if tracked:
            grads = torch.autograd.grad(
                list(tracked.values()), list(leaves.values()), incoming, allow_unused=True, materialize_grads=True
            )
    return Results({name: y.detach() for name, y in outputs.items()}, dict(zip(leaves, grads, strict=True)))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill with NaN whatever is allocated without being filled: used before it is written, it shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _then_fill(getattr(owner, name)))
        yield


def _then_fill(make: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    return poisoned


@cache
def attending_inputs(case: Case) -> Inputs:
    """Inputs whose incoming gradients leave out rows that attend to nothing: their output is not specified."""
    inputs = inputs_of(case)
    empty = empty_rows(case)
    out, lse = inputs.incoming["out"], inputs.incoming["lse"]
    out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
    return inputs._replace(incoming={"out": out, "lse": lse.masked_fill(empty, 0.0)})


@cache
def empty_rows(case: Case) -> Tensor:
    """Which rows attend to no key, [b h t]."""
    allowed, _ = oracles.allowed_and_bias(
        inputs_of(case).options["mask"], case.is_causal, (case.b, case.h, case.t, case.s)
    )
    return ~allowed.any(-1)


@cache
def wanted(op: str, case: Case) -> Results:
    return results(op, oracles, attending_inputs(case))


def check(op: str, case: Case, got: Results) -> None:
    """Compare outputs and gradients with the oracle's; rows that attend to nothing need only be finite."""
    want, empty = wanted(op, case), empty_rows(case)
    plain = plain_sdpa_errors(case)
    for name, mine in got.outputs.items():
        if name == "lse":
            assert torch.equal(mine == -math.inf, empty), "-inf exactly where a row attends to nothing"
            rows = empty
        else:
            assert mine.isfinite().all(), name
            rows = empty.transpose(1, 2)[..., None]
        mine, exact = mine.masked_fill(rows, 0.0), want.outputs[name].masked_fill(rows, 0.0)
        assert_near(f"out {name}", mine, exact, case.dtype, plain.get(f"out {name}", 0.0))
    assert got.grads.keys() == want.grads.keys()
    for name, mine in got.grads.items():
        assert_near(f"grad {name}", mine, want.grads[name], case.dtype, plain.get(f"grad {name}", 0.0))


def assert_near(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, plain_error: float = 0.0) -> None:
    """Within the tolerance of `dtype`, as TOLERANCE and ABSOLUTE have it. Names start with "out" or "grad"."""
    assert got.shape == want.shape, name
    assert got.isfinite().all(), f"{name} is not finite"
    tolerance = TOLERANCE[dtype].grad if name.startswith("grad") else TOLERANCE[dtype].out
    if dtype in HALF:
        tolerance *= torch.finfo(dtype).eps
    error = (got.double() - want).abs().max().item()
    limit = tolerance * want.abs().max().item() + 1.5 * plain_error + ABSOLUTE[dtype]
    assert error <= limit, f"{name}: {error:.3g} from the oracle, {limit:.3g} is allowed"


@cache
def plain_sdpa_errors(case: Case) -> dict[str, float]:
    """How far F.scaled_dot_product_attention is from the oracle in the case's dtype, output and gradients."""
    inputs = attending_inputs(case)
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in LEAVES["out"]}
    k, v = (leaves[name].repeat_interleave(case.h // case.g, dim=1) for name in ("k", "v"))
    mask, bias = oracles.allowed_and_bias(inputs.options["mask"], case.is_causal, (case.b, case.h, case.t, case.s))
    if bias is not None:
        mask = bias.masked_fill(~mask, -math.inf).to(case.dtype)
    out = F.scaled_dot_product_attention(leaves["q"].contiguous(), k, v, attn_mask=mask, scale=case.scale)
    out = out.transpose(1, 2)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.incoming["out"])
    want, attends = wanted("out", case), ~empty_rows(case).transpose(1, 2)[..., None]
    errors = {"out out": ((out.double() - want.outputs["out"]) * attends).abs().max().item()}
    for name, grad in zip(leaves, grads, strict=True):
        errors[f"grad {name}"] = (grad.double() - want.grads[name]).abs().max().item()
    return errors


def leaves_of(case: Case, op: str = "shifted") -> list[Tensor]:
    """The tensors an op has gradients in, as leaves."""
    return [attending_inputs(case).tensors[name].detach().requires_grad_() for name in LEAVES[op]]


def on_gpu(op: str, source: Any, case: Case) -> Results:
    """Results of a case whose tensors are moved there, and back."""
    inputs = attending_inputs(case)

    def moved(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in tensors.items()}

    got = results(op, source, inputs._replace(**{name: moved(part) for name, part in inputs._asdict().items()}))
    return Results(*({name: x.cpu() for name, x in part.items()} for part in got))
