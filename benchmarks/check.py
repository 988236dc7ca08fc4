"""Nothing is timed before it was compared with `backend="reference"` in fp64 on the very inputs it is timed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import mimic_core as mc

from .cases import Case, Inputs
from .contestants import LEAVES, Contestant
from .errors import BenchmarkError

# Largest error of an output or gradient, relative to the largest entry of what is wanted, by dtype. A few times what
# rounding gives, and a fraction of what a dropped term gives.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
# Scores of the reference held at a time: 1 GiB for each fp64 tensor of that size, of which autograd keeps a few.
_ELEMENTS = 1 << 23

Results = dict[str, Tensor]


class Error(NamedTuple):
    """The difference between two tensors: its largest entry, and its norm."""

    largest: float
    length: float


class Wanted(NamedTuple):
    """What the reference says of some heads: with the shift, and of attention alone. The heads and key heads it did."""

    shifted: Results
    plain: Results
    heads: slice
    key_heads: slice


def wanted_of(inputs: Inputs) -> Wanted:
    """Outputs and gradients by the reference, for the last four heads or so.

    An attention head's results don't depend on the others, so some heads of the whole call tell as much as a smaller
    call, and are the call that is timed. The last ones, because indices past the end show there; and several, because
    the gradient of a single gate bias may happen to be nearly zero.
    """
    h, g = inputs.q.shape[1], inputs.k.shape[1]
    count = min(g, -(-4 * g // h))
    heads, key_heads = slice(h - count * h // g, None), slice(g - count, None)
    shifted, plain = (_reference(inputs, heads, key_heads, with_shift) for with_shift in (True, False))
    return Wanted(shifted, plain, heads, key_heads)


def _reference(x: Inputs, heads: slice, key_heads: slice, shifted: bool) -> Results:
    parts = [x.q[:, heads], x.k[:, key_heads], x.v[:, key_heads]]
    parts += [parameter[heads] for parameter in (x.vector, x.gate_weight, x.gate_bias)]
    q, k, v, vector, weight, bias = (part.detach().double().requires_grad_() for part in parts)
    if not shifted:
        vector = torch.zeros_like(vector)
    b, h, t, _ = q.shape
    s = k.shape[2]
    step = max(1, _ELEMENTS // (b * h * s))
    outs = []
    for start in range(0, t, step):
        rows = slice(start, min(start + step, t))
        mask = None if x.mask is None else x.mask[:, :, rows]
        if x.is_causal:
            mask = torch.arange(start, rows.stop, device=q.device)[:, None] >= torch.arange(s, device=q.device)
        out = mc.ops.shifted_attention(q[:, :, rows], k, v, vector, weight, bias, mask=mask, backend="reference")
        torch.autograd.backward(out, x.grad[:, rows, heads].double())
        outs.append(out.detach())
    found = {"out": torch.cat(outs, dim=1)}
    for name, leaf in zip(LEAVES, (q, k, v, vector, weight, bias), strict=True):
        if leaf.grad is not None and (shifted or name in LEAVES[:3]):
            found[name] = leaf.grad
    return found


def error(found: Tensor, wanted: Tensor) -> Error:
    """Of a tensor, relative to the one wanted."""
    difference = (found.double() - wanted).nan_to_num(torch.inf)
    return Error(
        float(difference.abs().max() / wanted.abs().max()),
        float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(wanted)),
    )


def errors(contestant: Contestant, inputs: Inputs, wanted: Wanted) -> dict[str, Error]:
    """Of the output and every gradient of a contestant."""
    out = contestant.run(inputs)
    gradients = dict(zip(contestant.leaves, contestant.gradients(inputs), strict=True))
    chosen = {"out": out[:, :, wanted.heads]}
    for name, gradient in gradients.items():
        by_key = name in ("k", "v")
        if gradient.ndim == 4:
            gradient = gradient.transpose(0, 1)
        chosen[name] = gradient[wanted.key_heads if by_key else wanted.heads]
        if gradient.ndim == 4:
            chosen[name] = chosen[name].transpose(0, 1)
    target = wanted.shifted if contestant.shifts else wanted.plain
    if inputs.unseeing is not None:
        chosen["out"] = chosen["out"].masked_fill(inputs.unseeing, 0.0)
        target = target | {"out": target["out"].masked_fill(inputs.unseeing, 0.0)}
    return {name: error(x.detach(), target[name]) for name, x in chosen.items()}


def check(contestant: Contestant, case: Case, inputs: Inputs, wanted: Wanted) -> dict[str, Error]:
    """The errors of a contestant, if they are small.

    Raises:
        BenchmarkError: its output or a gradient is wrong.
    """
    found = errors(contestant, inputs, wanted)
    refuse(contestant.name, case.name, {name: e.largest for name, e in found.items()}, LIMITS[case.dtype])
    return found


def refuse(contestant: str, case: str, found: Mapping[str, float], limit: float) -> None:
    """Raise if an error is above the limit, or not a number.

    Raises:
        BenchmarkError: naming contestant, case, error and limit.
    """
    wrong = {name: e for name, e in found.items() if not e <= limit}
    if wrong:
        listed = ", ".join(f"{name} {e:.2g}" for name, e in wrong.items())
        raise BenchmarkError(
            f"{contestant} is wrong in {case} and is not measured: error relative to the reference of {listed}; "
            f"the limit is {limit:g}"
        )
