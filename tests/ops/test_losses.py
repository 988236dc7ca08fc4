"""KL and cross-entropy against the slow oracles, recipes, and what the losses refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimic_core import ShapeError, UnknownNameError, losses
from tests.support import oracles
from tests.support.loss_cases import LAYER_LOSSES, States, lengths_of_samples, normal, pair, plain, windows
from tests.support.op_cases import DRAWN

# --- KL


def kl_case(
    lengths: list[int], longer: int, sides: tuple[bool, bool], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student_where, _ = windows(lengths, 5, sides[0], seed)
    teacher_where, _ = windows(lengths, 5 + longer, sides[1], seed)
    student = normal(*student_where.shape, 7, seed=seed).requires_grad_()
    teacher = normal(*teacher_where.shape, 7, seed=seed + 1).requires_grad_()
    return student, teacher, student_where, teacher_where


@DRAWN
@given(
    lengths=lengths_of_samples,
    longer=st.integers(0, 4),
    sides=st.tuples(st.booleans(), st.booleans()),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_logits_kl_is_the_oracle(
    lengths: list[int], longer: int, sides: tuple[bool, bool], temperature: float, seed: int
):
    student, teacher, student_where, teacher_where = kl_case(lengths, longer, sides, seed)
    got = losses.logits_kl(student, teacher, student_where, teacher_where, temperature)
    want = oracles.logits_kl(student, teacher, student_where, teacher_where, temperature)
    torch.testing.assert_close(got, want)
    (mine,), (exact,) = (torch.autograd.grad(y, student) for y in (got, want))
    torch.testing.assert_close(mine, exact)
    assert not mine[~student_where].any(), "only chosen positions get a gradient"


@pytest.mark.parametrize("k", [1, 3, 5, 7, 50])
def test_kl_of_the_likeliest_tokens(k: int):
    case = kl_case([2, 0, 5], 3, (True, False), 0)
    got = losses.logits_kl(*case, temperature=2.0, top_k=k)
    whole = losses.logits_kl(*case, temperature=2.0)
    if k >= 7:
        assert torch.equal(got, whole)
        return
    student, teacher, student_where, teacher_where = case
    terms = []
    for ours, theirs in zip(student[student_where], teacher.detach()[teacher_where], strict=True):
        q, p = ((x / 2).softmax(-1) for x in (ours, theirs))
        kept = sorted(range(7), key=lambda i: -float(p[i]))[:k]
        lumped = [torch.stack([*(x[i] for i in kept), 1 - sum(x[i] for i in kept)]) for x in (p, q)]
        terms.append((lumped[0] * (lumped[0].log() - lumped[1].log())).sum())
    want = torch.stack(terms).mean() * 4
    torch.testing.assert_close(got, want)
    assert 0 < got < whole
    for mine, exact in zip(torch.autograd.grad(got, student), torch.autograd.grad(want, student), strict=True):
        torch.testing.assert_close(mine, exact)
    with pytest.raises(ValueError, match="top_k should be 1 or more"):
        losses.logits_kl(*case, top_k=0)


def test_kl_by_hand():
    """Direction, and the factor T squared: p = (2/3, 1/3) against q = (1/2, 1/2)."""
    teacher, student, where = torch.tensor([[[math.log(2.0), 0.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1).bool()
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert losses.logits_kl(student, teacher, where, where).item() == pytest.approx(expected)
    for temperature in (0.5, 3.0):
        scaled = losses.logits_kl(student, teacher * temperature, where, where, temperature)
        assert scaled.item() == pytest.approx(expected * temperature**2)


def test_kl_teacher_gets_no_gradient_and_half_precision_is_computed_in_fp32():
    student, teacher, student_where, teacher_where = kl_case([2, 0, 5], 3, (True, False), 0)
    student, teacher = (x.detach().bfloat16().requires_grad_() for x in (student, teacher))
    got = losses.logits_kl(student, teacher, student_where, teacher_where)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), oracles.logits_kl(student, teacher, student_where, teacher_where))
    got.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


# --- LM


@DRAWN
@given(b=st.integers(1, 3), t=st.integers(2, 6), seed=st.integers(0, 99))
def test_lm_is_the_oracle(b: int, t: int, seed: int):
    random = torch.Generator().manual_seed(seed)
    logits = normal(b, t, 5, seed=seed).requires_grad_()
    ids = torch.randint(5, (b, t), generator=random)
    labels = torch.rand(b, t, generator=random) < 0.5
    labels[0, -1] = True
    got, want = (source.lm(logits, ids, labels) for source in (losses, oracles))
    torch.testing.assert_close(got, want)
    (mine,), (exact,) = (torch.autograd.grad(y, logits) for y in (got, want))
    torch.testing.assert_close(mine, exact)


def test_lm_by_hand():
    """Each label from the logits before it: probabilities 1/2 and 1/4; a label at the first position is ignored."""
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = math.log(3.0)  # token 2 has probability 1/2 at position 1 of the first sample
    ids = torch.tensor([[1, 2, 0], [3, 3, 1]])
    labels = torch.tensor([[True, True, False], [True, False, True]])
    expected = (math.log(2) + math.log(4)) / 2
    assert losses.lm(logits, ids, labels).item() == pytest.approx(expected)
    labels[:, 0] = False
    assert losses.lm(logits, ids, labels).item() == pytest.approx(expected)


def test_lm_in_half_precision_is_computed_in_fp32():
    logits, ids, labels = normal(2, 4, 50, dtype=torch.bfloat16), torch.ones(2, 4).long(), torch.ones(2, 4).bool()
    got = losses.lm(logits, ids, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), oracles.lm(logits, ids, labels))


# --- recipes


@pytest.mark.parametrize(
    ("name", "weights"), [("mimic", {"align": 1.0, "lm": 0.5}), ("live", {"kl": 1.0, "lm": 0.5}), ("lm", {"lm": 1.0})]
)
def test_recipe_weighs_its_terms(name: str, weights: dict[str, float]):
    terms = {term: torch.tensor(float(i + 2), requires_grad=True) for i, term in enumerate(weights)}
    total = losses.recipe(name)(**terms)
    assert total.item() == sum(weights[term] * x.item() for term, x in terms.items())
    total.backward()
    for term, x in terms.items():
        assert x.grad is not None
        assert x.grad.item() == weights[term]


@pytest.mark.parametrize("given_terms", ["align", "lm", "align lm kl", "kl lm", ""])
def test_recipe_wants_its_terms_and_no_other(given_terms: str):
    terms = {term: torch.tensor(1.0) for term in given_terms.split()}
    found = re.escape(f"this recipe has weights for ['align', 'lm']; the terms given are {sorted(terms)}")
    with pytest.raises(ValueError, match=found):
        losses.recipe("mimic")(**terms)


# --- errors


def told(error: type[Exception], message: str, run: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("loss", LAYER_LOSSES)
def test_layer_loss_errors(loss: str):
    function = plain(getattr(losses, loss))
    one, two = pair([0, 0, 2, 2, 2])[0], pair([0, 0, 2, 2])[1]
    told(
        ShapeError,
        "^sample 2: the student selected 3 tokens, the teacher 2; both must select the same query and answer tokens",
        lambda: function(one, two),
    )
    gone = pair([0, 0])[1]
    told(ShapeError, "sample 2: the student selected 3 tokens, the teacher 0", lambda: function(one, gone))
    swapped = pair([2, 2, 2, 0, 0])[1]
    told(ShapeError, "in different orders", lambda: function(one, swapped))
    nothing = pair([])
    told(ShapeError, "selected no tokens; `where` must choose at least one", lambda: function(*nothing))
    layers = pair([0, 0, 2, 2, 2], layers=(0, 4))[1]
    told(
        ShapeError,
        r"must hold the same layers; the student holds \[0, 3\], the teacher \[0, 4\]",
        lambda: function(one, layers),
    )
    told(ShapeError, r"the student holds \[\], the teacher \[\]", lambda: function(States({}), States({})))
    whole, longer = States({0: normal(2, 3, 6)}), States({0: normal(2, 4, 6)})
    told(ShapeError, "sample 0: the student selected 3 tokens, the teacher 4", lambda: function(whole, longer))


def test_logits_kl_errors():
    kl = plain(losses.logits_kl)
    student, teacher, student_where, teacher_where = kl_case([2, 3], 2, (True, False), 0)
    short = teacher_where.clone()
    short[1, 0] = False
    told(
        ShapeError,
        "sample 1: the student selected 3 tokens, the teacher 2",
        lambda: kl(student, teacher, student_where, short),
    )
    none = torch.zeros_like(student_where), torch.zeros_like(teacher_where)
    told(ShapeError, "no tokens", lambda: kl(student, teacher, *none))
    told(
        ShapeError,
        r"student_where should be \[b t\] = \[2, 5\] like the logits, found \[2, 7\]",
        lambda: kl(student, teacher, teacher_where, teacher_where),
    )
    told(
        ShapeError,
        r"teacher_where should be \[b t\] = \[2, 7\] like the logits, found \[1, 7\]",
        lambda: kl(student, teacher, student_where, teacher_where[:1]),
    )
    for temperature in (0.0, -1.0):
        told(
            ValueError,
            f"temperature must be positive, found {temperature}",
            lambda t=temperature: kl(student, teacher, student_where, teacher_where, t),
        )


def test_lm_errors():
    lm = plain(losses.lm)
    logits, ids, labels = normal(2, 4, 5), torch.zeros(2, 4).long(), torch.ones(2, 4).bool()
    shapes = r"do not fit each other: \[2, 4, 5\], \[2, 4\], \[2, 3\]"
    told(ShapeError, shapes, lambda: lm(logits, ids, labels[:, 1:]))
    told(ShapeError, r"do not fit each other: \[2, 4, 5\], \[2, 3\], \[2, 4\]", lambda: lm(logits, ids[:, 1:], labels))
    labels[:, 1:] = False  # the first position can't be predicted
    told(ShapeError, "chooses no token after the first position", lambda: lm(logits, ids, labels))


def test_unknown_recipe():
    told(UnknownNameError, "^no recipe is called 'icl'; there are: mimic, live, lm$", lambda: losses.recipe("icl"))
