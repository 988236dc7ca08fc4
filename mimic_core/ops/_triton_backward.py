"""Gradients of attention, given delta: one kernel for keys and values, one for queries.

With p the softmax and G the gradient of the (shifted) output:

    d logits = p (G v^T - delta)     delta = rowsum(G out) - d lse

`_triton_epilogue.fold_kernel` makes delta, and df = d (q . weight), which the gradient of q takes in here.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._triton_tiles import LOG2E, dot, hide, in_bits, load_rows, load_vector, products, rounded, store_rows

# Capitals are what the compiler knows; the formatter would give each of the many arguments a line of its own.
# ruff: noqa: N803
# fmt: off


@triton.jit
@no_type_check
def _load_lse(at, inside):
    """To base 2; +inf for a row that attends to nothing, or is not there, so that its probabilities are 0."""
    lse = tl.load(at, mask=inside, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
@no_type_check
def _through_rows(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, mask, lse, delta,
    q_t, grad_t, mask_t, mask_s, bits, first_key, first, last, t, s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, VALUES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what the queries from `first` to `last` send back; q, grad, mask, lse and delta point at query `first`.

    Tiles of logits lie with the keys along the first axis, as both products need them.
    """
    i = tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_S)
    for start in range(first, last, BLOCK_T):
        inside = i < t - start
        q0, q1 = load_rows(q, q_t, i, t - start, D, D0, D1)
        x = products(k0, k1, q0, q1, D1)
        x = hide(
            x, bits, mask, mask_t, mask_s, i[None, :], j[:, None], start, first_key, t, s, MASK, BY_ROW, LOWEST,
            CAUSAL, EDGE,
        )
        p = tl.exp2(in_bits(x, bits, MASK) - _load_lse(lse + i, inside)[None, :])
        d = tl.load(delta + i, mask=inside, other=0.0)
        if VALUES:
            g0, g1 = load_rows(grad, grad_t, i, t - start, D, D0, D1)
            low = rounded(p, g0.dtype)
            dv0 = dot(low, g0, dv0)
            if D1 > 0:
                dv1 = dot(low, g1, dv1)
            dx = p * (products(v0, v1, g0, g1, D1) - d[None, :])
        else:
            dx = -p * d[None, :]
        dx = rounded(dx, q0.dtype)
        dk0 = dot(dx, q0, dk0)
        if D1 > 0:
            dk1 = dot(dx, q1, dk1)
        q += BLOCK_T * q_t
        grad += BLOCK_T * grad_t
        mask += BLOCK_T * mask_t
        lse += BLOCK_T
        delta += BLOCK_T
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["t", "s"])
@no_type_check
def keys_kernel(
    q, k, v, mask, grad, lse, delta, dk, dv,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mask_h, mask_t, mask_s, grad_b, grad_h, grad_t,
    dk_b, dk_g, dk_s, dv_b, dv_g, dv_s,
    scale, groups, per_group, t, s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, VALUES: tl.constexpr,
):
    """Gradients of one block of keys and values, from every attention head that shares them.

    lse and delta are [b h t], contiguous. Without VALUES, delta alone flows back and dv is not written.
    """
    number = tl.cdiv(s, BLOCK_S)
    block = tl.program_id(0) % number
    row = tl.program_id(0) // number  # of [b g]
    n = (row // groups).to(tl.int64)
    group = (row % groups).to(tl.int64)
    first_key = block * BLOCK_S
    far = first_key.to(tl.int64)
    j = tl.arange(0, BLOCK_S)
    left = s - first_key
    k0, k1 = load_rows(k + n * k_b + group * k_g + far * k_s, k_s, j, left, D, D0, D1)
    if VALUES:
        v0, v1 = load_rows(v + n * v_b + group * v_g + far * v_s, v_s, j, left, D, D0, D1)
    else:
        v0 = k0
        v1 = k1
    dk0 = tl.zeros([BLOCK_S, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_S, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_S, D1], tl.float32) if D1 > 0 else dk0
    dv1 = tl.zeros([BLOCK_S, D1], tl.float32) if D1 > 0 else dv0
    bits = scale * LOG2E

    # In a causal call no query before the block's own sees a key of it. Every block is treated as one at the edge:
    # two loops ran out of registers.
    first = first_key // BLOCK_T * BLOCK_T if CAUSAL else first_key * 0
    down = first.to(tl.int64)
    for one in range(per_group):
        h = group * per_group + one
        stats = (n * groups * per_group + h) * t + down
        # Keys past the last one are no matter here: their rows are not stored.
        dk0, dk1, dv0, dv1 = _through_rows(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1,
            q + n * q_b + h * q_h + down * q_t,
            grad + n * grad_b + h * grad_h + down * grad_t,
            mask + n * mask_b + h * mask_h + far * mask_s + down * mask_t,
            lse + stats, delta + stats,
            q_t, grad_t, mask_t, mask_s, bits, first_key, first, t, t, s,
            D, D0, D1, BLOCK_T, BLOCK_S, MASK, BY_ROW, LOWEST, CAUSAL, VALUES, CAUSAL,
        )
    store_rows(dk + n * dk_b + group * dk_g + far * dk_s, dk_s, j, left, dk0 * scale, dk1 * scale, D, D0, D1)
    if VALUES:
        store_rows(dv + n * dv_b + group * dv_g + far * dv_s, dv_s, j, left, dv0, dv1, D, D0, D1)


@triton.jit
@no_type_check
def _through_keys(
    dq0, dq1, q0, q1, g0, g1, lse, delta, k, v, mask,
    k_s, v_s, mask_t, mask_s, bits, first_row, first, last, t, s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, VALUES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what the keys from `first` to `last` send back; k, v and mask point at key `first`."""
    i = tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_S)
    for start in range(first, last, BLOCK_S):
        k0, k1 = load_rows(k, k_s, j, s - start, D, D0, D1, EDGE)
        x = products(q0, q1, k0, k1, D1)
        x = hide(
            x, bits, mask, mask_t, mask_s, i[:, None], j[None, :], first_row, start, t, s, MASK, BY_ROW, LOWEST,
            CAUSAL, EDGE,
        )
        p = tl.exp2(in_bits(x, bits, MASK) - lse[:, None])
        if VALUES:
            v0, v1 = load_rows(v, v_s, j, s - start, D, D0, D1, EDGE)
            dx = p * (products(g0, g1, v0, v1, D1) - delta[:, None])
        else:
            dx = -p * delta[:, None]
        dx = rounded(dx, k0.dtype)
        dq0 = dot(dx, k0, dq0)
        if D1 > 0:
            dq1 = dot(dx, k1, dq1)
        k += BLOCK_S * k_s
        v += BLOCK_S * v_s
        mask += BLOCK_S * mask_s
    return dq0, dq1, k, v, mask


@triton.jit(do_not_specialize=["t", "s"])
@no_type_check
def queries_kernel(
    q, k, v, mask, grad, lse, delta, df, weight, dq,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mask_h, mask_t, mask_s, grad_b, grad_h, grad_t,
    dq_b, dq_h, dq_t,
    scale, heads, per_group, t, s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, CAUSAL: tl.constexpr, SHIFT: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Gradient of one block of queries of one attention head; with SHIFT the gate's part, df * weight, is in it."""
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
    at = row.to(tl.int64) * t + first_row + i
    q0, q1 = load_rows(q + n * q_b + h * q_h + far * q_t, q_t, i, left, D, D0, D1)
    if VALUES:
        g0, g1 = load_rows(grad + n * grad_b + h * grad_h + far * grad_t, grad_t, i, left, D, D0, D1)
    else:
        g0 = q0
        g1 = q1
    lse_bits = _load_lse(lse + at, i < left)
    d = tl.load(delta + at, mask=i < left, other=0.0)
    k += n * k_b + group * k_g
    v += n * v_b + group * v_g
    mask += n * mask_b + h * mask_h + far * mask_t
    dq0 = tl.zeros([BLOCK_T, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_T, D1], tl.float32) if D1 > 0 else dq0
    bits = scale * LOG2E

    last = s
    whole = s // BLOCK_S * BLOCK_S
    if CAUSAL:
        last = tl.minimum(s, first_row + BLOCK_T)
        whole = tl.minimum(whole, (first_row + 1) // BLOCK_S * BLOCK_S)
    dq0, dq1, k, v, mask = _through_keys(
        dq0, dq1, q0, q1, g0, g1, lse_bits, d, k, v, mask, k_s, v_s, mask_t, mask_s, bits, first_row, 0, whole, t,
        s, D, D0, D1, BLOCK_T, BLOCK_S, MASK, BY_ROW, LOWEST, CAUSAL, VALUES, False,
    )
    dq0, dq1, k, v, mask = _through_keys(
        dq0, dq1, q0, q1, g0, g1, lse_bits, d, k, v, mask, k_s, v_s, mask_t, mask_s, bits, first_row, whole, last,
        t, s, D, D0, D1, BLOCK_T, BLOCK_S, MASK, BY_ROW, LOWEST, CAUSAL, VALUES, True,
    )
    dq0 = dq0 * scale
    dq1 = dq1 * scale
    if SHIFT:
        through_gate = tl.load(df + at, mask=i < left, other=0.0)[:, None]
        w0, w1 = load_vector(weight + h * D, D, D0, D1)
        dq0 += through_gate * w0
        if D1 > 0:
            dq1 += through_gate * w1
    store_rows(dq + n * dq_b + h * dq_h + far * dq_t, dq_t, i, left, dq0, dq1, D, D0, D1)
