"""Attention of one query: the keys are spread over programs, and what they found is put together afterwards.

The attention heads that share a key head are the rows of one tile: keys and values are read once for all of them.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._triton_forward import attend
from ._triton_tiles import LOG2E, finish, load_rows, load_vector, row_sums, store_rows

# Capitals are what the compiler knows; the formatter would give each of the many arguments a line of its own.
# ruff: noqa: N803
# fmt: off


@triton.jit(do_not_specialize=["s", "chunk"])
@no_type_check
def decode_kernel(
    q, k, v, mask, out, lse, mu, vector, weight, bias, part_out, part_lse,
    q_b, q_h, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mask_h, mask_s,
    scale, groups, per_group, s, chunk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, LOWEST: tl.constexpr, SHIFT: tl.constexpr,
    SAVE: tl.constexpr, VALUES: tl.constexpr,
):
    """One chunk of the keys of one group. With one split this is all; else `combine_kernel` goes on.

    part_out [b h SPLITS D] and part_lse [b h SPLITS], to base 2, are what a split found by itself.
    """
    split = tl.program_id(0) % SPLITS
    row = tl.program_id(0) // SPLITS  # of [b g]
    n = (row // groups).to(tl.int64)
    group = (row % groups).to(tl.int64)
    h = group * per_group
    first = split * chunk
    far = first.to(tl.int64)
    i = tl.arange(0, BLOCK_R)
    q0, q1 = load_rows(q + n * q_b + h * q_h, q_h, i, per_group, D, D0, D1)
    acc0 = tl.zeros([BLOCK_R, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_R, D1], tl.float32) if D1 > 0 else acc0
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    # The heads stand where `attend` has the queries: a mask's head axis is its row axis here.
    acc0, acc1, highest, total, k, v, mask = attend(
        acc0, acc1, highest, total, q0, q1, k + n * k_b + group * k_g + far * k_s,
        v + n * v_b + group * v_g + far * v_s, mask + n * mask_b + h * mask_h + far * mask_s, k_s, v_s, mask_h,
        mask_s, scale * LOG2E, 0, first, tl.minimum(s, first + chunk), per_group, s, D, D0, D1, BLOCK_R, BLOCK_S,
        MASK, BY_ROW, LOWEST, False, VALUES, True,
    )
    head = n * groups * per_group + h + i  # of [b h]
    if SPLITS > 1:
        # A split whose keys are all forbidden, or that has none, found 0 and -inf.
        sure = tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(part_lse + head * SPLITS + split, highest + tl.log2(total), mask=i < per_group)
        if VALUES:
            part_out += ((n * groups * per_group + h) * SPLITS + split) * D
            store_rows(part_out, SPLITS * D, i, per_group, acc0 / sure, acc1 / sure, D, D0, D1)
    else:
        if SHIFT:
            w0, w1 = load_rows(weight + h * D, D, i, per_group, D, D0, D1)
            logit = row_sums(q0, q1, w0, w1, D1) + tl.load(bias + h + i, mask=i < per_group, other=0.0)
            v0, v1 = load_rows(vector + h * D, D, i, per_group, D, D0, D1)
        else:
            logit = highest
            v0 = acc0
            v1 = acc1
        out += (n * groups * per_group + h) * D
        finish(
            acc0, acc1, highest, total, logit, v0, v1, out, D, lse + head, mu + head, i, per_group, D, D0, D1,
            SHIFT, SAVE, VALUES,
        )


@triton.jit
@no_type_check
def combine_kernel(
    part_out, part_lse, q, out, lse, mu, vector, weight, bias,
    q_b, q_h, heads,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SPLITS: tl.constexpr, SHIFT: tl.constexpr,
    SAVE: tl.constexpr, VALUES: tl.constexpr,
):
    """One attention head: its splits weighted by their LSE, then gate and shift."""
    row = tl.program_id(0)  # of [b h]
    n = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    far = row.to(tl.int64)
    i = tl.arange(0, SPLITS)
    found = tl.load(part_lse + far * SPLITS + i)
    highest = tl.max(found, 0)
    share = tl.exp2(found - tl.where(highest == float("-inf"), 0.0, highest))
    if VALUES:
        x0, x1 = load_rows(part_out + far * SPLITS * D, D, i, SPLITS, D, D0, D1)
        acc0 = tl.sum(x0 * share[:, None], 0)[None, :]
        acc1 = tl.sum(x1 * share[:, None], 0)[None, :]
    else:
        acc0 = tl.zeros([1, D0], tl.float32)
        acc1 = acc0
    one = tl.arange(0, 1)
    highest = highest + tl.zeros([1], tl.float32)
    total = tl.sum(share, 0) + tl.zeros([1], tl.float32)
    if SHIFT:
        q0, q1 = load_vector(q + n * q_b + h * q_h, D, D0, D1)
        w0, w1 = load_vector(weight + h * D, D, D0, D1)
        logit = row_sums(q0, q1, w0, w1, D1) + tl.load(bias + h)
        v0, v1 = load_vector(vector + h * D, D, D0, D1)
    else:
        logit = highest
        v0 = acc0
        v1 = acc1
    finish(
        acc0, acc1, highest, total, logit, v0, v1, out + far * D, D, lse + far + one, mu + far + one, one, 1,
        D, D0, D1, SHIFT, SAVE, VALUES,
    )
