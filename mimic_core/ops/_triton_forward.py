"""Attention, its LSE, the gate and the shift in one pass over the keys."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._triton_tiles import (
    ADDITIVE,
    LOG2E,
    dot,
    finish,
    hide,
    load_rows,
    load_vector,
    products,
    rounded,
    row_sums,
)

# Capitals are what the compiler knows; the formatter would give each of the many arguments a line of its own.
# ruff: noqa: N803, SIM108
# fmt: off


@triton.jit
@no_type_check
def attend(
    acc0, acc1, highest, total, q0, q1, k, v, mask,
    k_s, v_s, mask_t, mask_s, scale, first_row, first, last, t, s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, VALUES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The online softmax over the keys from `first` to `last`; k, v and mask point at the first and come back moved.

    `scale` is positive and has the factor log2(e) in it; highest and total are to base 2.
    """
    i = tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_S)
    for start in range(first, last, BLOCK_S):
        k0, k1 = load_rows(k, k_s, j, s - start, D, D0, D1, EDGE)
        x = products(q0, q1, k0, k1, D1)
        x = hide(
            x, scale, mask, mask_t, mask_s, i[:, None], j[None, :], first_row, start, t, s, MASK, BY_ROW, LOWEST,
            CAUSAL, EDGE,
        )
        # The factor outside the maximum: the compiler then scales and subtracts in one instruction.
        if MASK == ADDITIVE:
            new = tl.maximum(highest, tl.max(x, 1))
        else:
            new = tl.maximum(highest, tl.max(x, 1) * scale)
        # Only a mask can leave a row without any key so far; -inf - -inf is NaN.
        base = tl.where(new == float("-inf"), 0.0, new) if MASK > 0 else new
        if MASK == ADDITIVE:
            p = tl.exp2(x - base[:, None])
        else:
            p = tl.exp2(x * scale - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(p, 1)
        highest = new
        if VALUES:
            v0, v1 = load_rows(v, v_s, j, s - start, D, D0, D1, EDGE)
            p = rounded(p, v0.dtype)
            acc0 = dot(p, v0, acc0 * shrink[:, None])
            if D1 > 0:
                acc1 = dot(p, v1, acc1 * shrink[:, None])
        k += BLOCK_S * k_s
        v += BLOCK_S * v_s
        mask += BLOCK_S * mask_s
    return acc0, acc1, highest, total, k, v, mask


@triton.jit(do_not_specialize=["t", "s"])
@no_type_check
def attention_kernel(
    q, k, v, mask, out, lse, mu, vector, weight, bias,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mask_h, mask_t, mask_s,
    scale, heads, per_group, t, s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, SHIFT: tl.constexpr,
    SAVE: tl.constexpr, VALUES: tl.constexpr,
):
    """One block of queries of one attention head. out is [b t h D], lse and mu [b h t], all contiguous.

    SHIFT: gate and shift. SAVE: write lse, and mu if there is one. VALUES: write out.
    """
    number = tl.cdiv(t, BLOCK_T)
    block = tl.program_id(0) % number
    row = tl.program_id(0) // number  # of [b h]
    if CAUSAL:
        block = number - 1 - block  # the longest first
    n = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    group = h // per_group
    first_row = block * BLOCK_T
    far = first_row.to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    left = t - first_row

    q0, q1 = load_rows(q + n * q_b + h * q_h + far * q_t, q_t, i, left, D, D0, D1)
    k += n * k_b + group * k_g
    v += n * v_b + group * v_g
    mask += n * mask_b + h * mask_h + far * mask_t
    acc0 = tl.zeros([BLOCK_T, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_T, D1], tl.float32) if D1 > 0 else acc0
    highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    bits = scale * LOG2E

    # First the keys every row of the block sees, then those with an edge among them.
    last = s
    whole = s // BLOCK_S * BLOCK_S
    if CAUSAL:
        last = tl.minimum(s, first_row + BLOCK_T)
        whole = tl.minimum(whole, (first_row + 1) // BLOCK_S * BLOCK_S)
    acc0, acc1, highest, total, k, v, mask = attend(
        acc0, acc1, highest, total, q0, q1, k, v, mask, k_s, v_s, mask_t, mask_s, bits, first_row, 0, whole, t, s,
        D, D0, D1, BLOCK_T, BLOCK_S, MASK, BY_ROW, LOWEST, CAUSAL, VALUES, False,
    )
    acc0, acc1, highest, total, k, v, mask = attend(
        acc0, acc1, highest, total, q0, q1, k, v, mask, k_s, v_s, mask_t, mask_s, bits, first_row, whole, last, t,
        s, D, D0, D1, BLOCK_T, BLOCK_S, MASK, BY_ROW, LOWEST, CAUSAL, VALUES, True,
    )
    if SHIFT:
        w0, w1 = load_vector(weight + h * D, D, D0, D1)
        logit = row_sums(q0, q1, w0, w1, D1) + tl.load(bias + h)
        v0, v1 = load_vector(vector + h * D, D, D0, D1)
    else:
        logit = highest
        v0 = acc0
        v1 = acc1
    at = row.to(tl.int64) * t + first_row + i
    out += ((n * t + far) * heads + h) * D
    finish(
        acc0, acc1, highest, total, logit, v0, v1, out, heads * D, lse + at, mu + at, i, left,
        D, D0, D1, SHIFT, SAVE, VALUES,
    )
