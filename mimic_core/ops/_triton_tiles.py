"""What all Triton kernels share: loading and multiplying a head in two tiles, masking logits, finishing a row.

A head is two tiles side by side (`_triton_blocks.tiles`). Where D1 is 0 there is only the first; the second is then
the first once more, so that the signatures stay, and is never used. A function has one return: behind an `if` that
holds one, Triton 3.2 compiles the rest as well. `no_type_check` keeps annotation checkers off what it reads as source.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from triton.runtime import JITFunction

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Values of the kernels' MASK argument; 0 is no mask.
BOOL = tl.constexpr(1)
ADDITIVE = tl.constexpr(2)

# Capitals are what the compiler knows; the formatter would give each of the many arguments a line of its own.
# ruff: noqa: N803
# fmt: off


@triton.jit
@no_type_check
def square(x):
    return x * x


# Triton's interpreter stands in for the compiler when it was asked for before this file was imported.
INTERPRETED = tl.constexpr(not isinstance(square, JITFunction))


@triton.jit
@no_type_check
def rounded(x, dtype: tl.constexpr):
    """x in dtype, to the nearest; the interpreter would cut the digits of bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
@no_type_check
def dot(a, b, acc):
    # "ieee" speaks of fp32 only: TF32 would leave the gradients three digits.
    if INTERPRETED:
        # It keeps bf16 as integers, which numpy would multiply as such. Products of bf16 are exact in fp32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
@no_type_check
def products(a0, a1, b0, b1, D1: tl.constexpr):
    """a @ b.T over both tiles."""
    acc = dot(a0, tl.trans(b0), tl.zeros([a0.shape[0], b0.shape[0]], tl.float32))
    if D1 > 0:
        acc = dot(a1, tl.trans(b1), acc)
    return acc


@triton.jit
@no_type_check
def row_sums(a0, a1, b0, b1, D1: tl.constexpr):
    """sum(a * b) over the width, in fp32."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


@triton.jit
@no_type_check
def _load_tile(
    base, stride, rows, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr
):
    cols = FIRST + tl.arange(0, WIDTH)
    where = base + rows[:, None] * stride + cols[None, :]
    if EDGE:
        inside = rows[:, None] < limit
        if FIRST + WIDTH > D:
            inside = inside & (cols[None, :] < D)
        x = tl.load(where, mask=inside, other=0.0)
    elif FIRST + WIDTH > D:
        x = tl.load(where, mask=cols[None, :] < D, other=0.0)
    else:
        x = tl.load(where)
    return x


@triton.jit
@no_type_check
def load_rows(
    base, stride, rows, limit, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EDGE: tl.constexpr = True
):
    """Both tiles of some rows of [n D]; with EDGE those at `limit` and after are zero."""
    x0 = _load_tile(base, stride, rows, limit, 0, D0, D, EDGE)
    x1 = _load_tile(base, stride, rows, limit, D0, D1, D, EDGE) if D1 > 0 else x0
    return x0, x1


@triton.jit
@no_type_check
def load_vector(base, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both tiles of one [D], as [1 D] in fp32."""
    cols0 = tl.arange(0, D0)
    x0 = tl.load(base + cols0, mask=cols0 < D, other=0.0).to(tl.float32)[None, :]
    x1 = x0
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        x1 = tl.load(base + cols1, mask=cols1 < D, other=0.0).to(tl.float32)[None, :]
    return x0, x1


@triton.jit
@no_type_check
def store_rows(base, stride, rows, limit, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    dtype: tl.constexpr = base.dtype.element_ty
    cols0 = tl.arange(0, D0)
    inside = (rows[:, None] < limit) & (cols0[None, :] < D)
    tl.store(base + rows[:, None] * stride + cols0[None, :], rounded(x0, dtype), mask=inside)
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        inside = (rows[:, None] < limit) & (cols1[None, :] < D)
        tl.store(base + rows[:, None] * stride + cols1[None, :], rounded(x1, dtype), mask=inside)


@triton.jit
@no_type_check
def store_vector(base, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    cols0 = tl.arange(0, D0)
    tl.store(base + cols0, x0, mask=cols0 < D)
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        tl.store(base + cols1, x1, mask=cols1 < D)


@triton.jit
@no_type_check
def hide(
    x, scale, mask, mask_t, mask_s, i, j, first_row, first_key, t, s,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):
    """-inf where a row may not see a key. i and j count rows and keys from the first ones, two axes each.

    Without an additive mask x stays as it is elsewhere; with one it becomes scale * x + mask, in bits: see `in_bits`.
    `mask` points at the first row and key. Rows share it unless BY_ROW. EDGE: keys may be past the last one, or
    after a row in a causal call.
    """
    if MASK > 0:
        inside = j < s - first_key
        where = mask + j * mask_s
        if BY_ROW:
            inside = inside & (i < t - first_row)
            where = where + i * mask_t
        if MASK == BOOL:
            x = tl.where(tl.load(where, mask=inside, other=0) != 0, x, float("-inf"))
        else:
            added = tl.load(where, mask=inside, other=float("-inf")).to(tl.float32)
            x = tl.where(added > LOWEST, x * scale + added * LOG2E, float("-inf"))
    elif EDGE:
        # Only one number changes from block to block: the compiler compares with constants.
        inside = j < s - first_key
        if CAUSAL:
            inside = inside & (j - i <= first_row - first_key)
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
@no_type_check
def in_bits(x, scale, MASK: tl.constexpr):
    """What `hide` gives as logits to base 2; `scale` has the factor log2(e) in it."""
    if MASK != ADDITIVE:
        x = x * scale
    return x


@triton.jit
@no_type_check
def gate(logit, lse):
    """sigmoid(logit - lse), 0 for a row that attends to nothing."""
    return tl.where(lse == float("-inf"), 0.0, tl.sigmoid(logit - lse))


@triton.jit
@no_type_check
def finish(
    acc0, acc1, highest, total, logit, v0, v1, out, out_stride, lse_at, mu_at, rows, limit,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SHIFT: tl.constexpr, SAVE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Divide by the sum, take the LSE, gate, shift by the vector (v0, v1) and store what is wanted."""
    lse = (highest + tl.log2(total)) * LN2
    total = tl.where(total == 0.0, 1.0, total)[:, None]
    acc0 = acc0 / total
    if D1 > 0:
        acc1 = acc1 / total
    if SHIFT:
        mu = gate(logit, lse)
        acc0 += mu[:, None] * v0
        if D1 > 0:
            acc1 += mu[:, None] * v1
        if SAVE:
            tl.store(mu_at, mu, mask=rows < limit)
    if SAVE:
        tl.store(lse_at, lse, mask=rows < limit)
    if VALUES:
        store_rows(out, out_stride, rows, limit, acc0, acc1, D, D0, D1)
