"""What a step says of its tokens is the same, whatever steps came before."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimic_core.positions import Positions
from mimic_core.vllm.batch import Step, Tokens

CPU = torch.device("cpu")
# Requests of a batch: the row of the stack of each, and its strength.
BATCHES = st.lists(st.tuples(st.integers(-1, 2), st.sampled_from((0.0, 0.5, 1.0))), min_size=1, max_size=3)
# Steps of a batch: how many tokens each of its requests runs, and from where.
RUNS = st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=3, max_size=3), max_size=4)


def said(tokens: Tokens, n: int) -> list[object]:
    if not tokens.is_active:
        return [False]
    parts: list[Tensor | None] = [*tokens.of(n), *tokens.chosen(n), tokens.at]
    return [tokens.only, tokens.is_whole, *(None if x is None else x.tolist() for x in parts)]


@given(
    steps=st.lists(st.tuples(BATCHES, RUNS), min_size=1, max_size=4),
    positions=st.sampled_from(("all", "prompt", "generated")),
)
def test_a_step_says_the_same_after_others(steps: list[tuple[list, list]], positions: Positions) -> None:
    kept = Tokens(16, positions, CPU)
    for requests, runs in steps:
        rows, strengths = np.array([row for row, _ in requests]), np.array([x for _, x in requests], dtype=np.float32)
        buffer = np.zeros(3, dtype=np.int64)  # vLLM writes the counts of each step into the same memory
        for run in runs:
            buffer[:] = [count for count, _ in run]
            counts = buffer[: len(requests)]
            step = Step(counts, np.array([start for _, start in run])[: len(requests)], np.full(len(requests), 4))
            differs = kept.begin(rows, strengths, step)
            fresh = Tokens(16, positions, CPU)
            assert fresh.begin(rows.copy(), strengths.copy(), step)
            n = int(counts.sum())
            assert said(kept, n) == said(fresh, n)
            assert differs or positions == "all"
            if run is runs[-1]:
                assert kept.begin(rows.copy(), strengths.copy(), step), "the batch was looked up again"


def test_a_step_that_decodes_is_not_worked_out_again() -> None:
    tokens, rows, strengths = Tokens(16, "all", CPU), np.array([0, -1]), np.ones(2, dtype=np.float32)
    steps = [Step(np.array([1, 1]), np.array([place, 9]), np.array([4, 9])) for place in range(4, 8)]
    assert [tokens.begin(rows, strengths, step) for step in steps] == [True, False, False, False]
