"""The statistics of the comparison of methods."""

from __future__ import annotations

import random

import pytest

from benchmarks.icl.stats import difference, packed, ranks, unpacked


def test_a_difference_is_a_paired_bootstrap_over_seeds_and_questions() -> None:
    """Against loops over Python's own random numbers: the same distribution, not the same draws."""
    draw = random.Random(0)
    one = {seed: [draw.random() < 0.5 + 0.15 * seed for _ in range(40)] for seed in range(3)}
    # Seeds differ much, so that it matters that they are drawn too.
    other = {seed: [right and draw.random() > 0.35 * seed for right in one[seed]] for seed in one}
    means = []
    for _ in range(4000):
        gained = []
        for seed in draw.choices(sorted(one), k=3):
            asked = draw.choices(range(40), k=40)
            gained.append(sum(one[seed][i] - other[seed][i] for i in asked) / 40)
        means.append(sum(gained) / 3)
    means.sort()
    found = difference([one], [other])
    assert found.mean == pytest.approx(sum(sum(one[s]) - sum(other[s]) for s in one) / 120)
    assert (found.low, found.high) == pytest.approx((means[100], means[3899]), abs=0.02)
    # Paired: where two methods answer alike, nothing is left to chance, however hard the questions are.
    assert difference([one, one], [one, one]).high == 0
    assert not difference([one], [one]).counts
    better = {seed: [True] * 40 for seed in one}
    assert difference([better], [{seed: [False] * 40 for seed in one}]).low == 1
    # Over two tasks, the interval is that of their mean.
    wide, narrow = difference([one], [other]), difference([one] * 4, [other] * 4)
    assert (narrow.high - narrow.low) == pytest.approx((wide.high - wide.low) / 2, rel=0.1)
    for bad in ({0: one[0]}, {seed: right[:-1] for seed, right in one.items()}):
        with pytest.raises(ValueError, match="a difference needs the same"):
            difference([one], [bad])


def test_ranks_and_packed_answers() -> None:
    assert ranks([0.2, 0.9, 0.2, 0.5]) == [3.5, 1.0, 3.5, 2.0]
    for right in ([], [False, False, True], [True] * 9):
        assert unpacked(packed(right)) == right
    with pytest.raises(ValueError, match="should hold 3 answers"):
        unpacked("3:1f")
