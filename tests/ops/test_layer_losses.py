"""Layer-wise losses against the slow oracles, and what they must not depend on: padding, lengths, the batch's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_core import losses
from tests.support import oracles
from tests.support.loss_cases import LAYER_LOSSES, States, lengths_of_samples, normal, pair, plain, windows
from tests.support.op_cases import DRAWN


@pytest.mark.parametrize("loss", LAYER_LOSSES)
@DRAWN
@given(lengths=lengths_of_samples, layers=st.sampled_from([(0,), (2, 5), (1, 2, 3)]), seed=st.integers(0, 99))
def test_layer_loss_is_the_oracle(loss: str, lengths: list[int], layers: tuple[int, ...], seed: int):
    samples = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    student, teacher = pair(samples, layers, seed=seed)
    leaves = list(student.states.values())
    got = getattr(losses, loss)(student, teacher)
    want = getattr(oracles, loss)(student.states, teacher.states, samples)
    torch.testing.assert_close(got, want)
    for mine, exact in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("loss", LAYER_LOSSES)
@DRAWN
@given(
    lengths=lengths_of_samples,
    longer=st.integers(0, 4),
    sides=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_layer_loss_takes_tokens_from_any_padding(
    loss: str, lengths: list[int], longer: int, sides: tuple[bool, bool], seed: int
):
    """The teacher's sequences are longer, and padded on the other side: the same tokens, the same loss."""
    samples = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    student, teacher = pair(samples, (0,), seed=seed)
    want = getattr(oracles, loss)(student.states, teacher.states, samples)
    padded = []
    for side, left, extra in ((student, sides[0], 0), (teacher, sides[1], longer)):
        where, _ = windows(lengths, 5 + extra, left, seed)
        whole = normal(*where.shape, 6, seed=seed + 1)
        whole[where] = side.states[0].detach()
        padded.append(States({0: whole[where]}, where.nonzero()[:, 0]))
    torch.testing.assert_close(getattr(losses, loss)(*padded), want)


@pytest.mark.parametrize("loss", LAYER_LOSSES[:2])  # the third measures by all of the teacher's tokens
def test_samples_weigh_equally(loss: str):
    """A long sample and a short one: the mean of the two losses, not the mean over tokens."""
    samples = [4, 4, 4, 4, 4, 4, 4, 9]
    student, teacher = pair(samples)
    alone = []
    for tokens in (slice(0, 7), slice(7, 8)):
        part = ({i: x[tokens] for i, x in side.states.items()} for side in (student, teacher))
        alone.append(getattr(losses, loss)(*(States(states, torch.tensor(samples[tokens])) for states in part)))
    torch.testing.assert_close(getattr(losses, loss)(student, teacher), (alone[0] + alone[1]) / 2)
    assert (alone[0] - alone[1]).abs() > 1e-3


@pytest.mark.parametrize("loss", LAYER_LOSSES)
def test_layer_loss_of_whole_sequences(loss: str):
    """Nothing selected: states are [b t c] and name no samples; the other side may name them."""
    student, teacher = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    samples = torch.arange(3).repeat_interleave(4)
    want = getattr(oracles, loss)({0: student.flatten(0, 1)}, {0: teacher.flatten(0, 1)}, samples.tolist())
    flat = States({0: teacher.flatten(0, 1)}, samples)
    for right in (States({0: teacher}), flat):
        torch.testing.assert_close(getattr(losses, loss)(States({0: student}), right), want)


@pytest.mark.parametrize("loss", LAYER_LOSSES)
def test_teacher_gets_no_gradient(loss: str):
    student, teacher = pair([0, 0, 1])
    getattr(losses, loss)(student, teacher).backward()
    assert all(x.grad is not None and x.grad.any() for x in student.states.values())
    assert all(x.grad is None for x in teacher.states.values())


@pytest.mark.parametrize("loss", LAYER_LOSSES)
def test_layer_loss_in_half_precision_is_computed_in_fp32(loss: str):
    student, teacher = pair([0, 0, 1, 1, 1], width=64, dtype=torch.bfloat16)
    got = getattr(losses, loss)(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), getattr(oracles, loss)(student.states, teacher.states, [0, 0, 1, 1, 1]))
    got.backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in student.states.values())


def test_layer_loss_of_equal_states_is_zero():
    student, _ = pair([0, 1, 1])
    assert losses.layer_mse(student, student) == 0
    assert losses.layer_cosine(student, student).abs() < 1e-12
    assert losses.layer_lorentz(student, student) == 0


@DRAWN
@given(lengths=lengths_of_samples.filter(lambda x: sum(x) > 1), seed=st.integers(0, 99))
def test_contrastive_loss_is_the_oracle(lengths: list[int], seed: int):
    samples = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    student, teacher = pair(samples, seed=seed)
    leaves = list(student.states.values())
    got = losses.layer_contrastive(student, teacher)
    want = oracles.layer_contrastive(student.states, teacher.states, samples)
    torch.testing.assert_close(got, want)
    for mine, exact in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(mine, exact)


def test_layers_can_have_weights():
    samples = [0, 1, 1]
    student, teacher = pair(samples)
    alone = {
        layer: {
            loss: getattr(losses, loss)(
                *(States({layer: side.states[layer]}, side.samples) for side in (student, teacher))
            )
            for loss in (*LAYER_LOSSES, "layer_contrastive")
        }
        for layer in (0, 3)
    }
    for loss in (*LAYER_LOSSES, "layer_contrastive"):
        got = getattr(losses, loss)(student, teacher, weights={0: 1.0, 3: 3.0})
        torch.testing.assert_close(got, 0.25 * alone[0][loss] + 0.75 * alone[3][loss])
    scales = [teacher.states[layer].square().mean() for layer in (0, 3)]
    by_teacher = (alone[0]["layer_mse"] / scales[0] + alone[3]["layer_mse"] / scales[1]) / 2
    torch.testing.assert_close(losses.layer_mse(student, teacher, weights="teacher"), by_teacher)
    # A layer whose numbers are all 100 times as large counts as before.
    louder = (States({**side.states, 3: 100 * side.states[3]}, side.samples) for side in (student, teacher))
    torch.testing.assert_close(losses.layer_mse(*louder, weights="teacher"), by_teacher)
    for odd, words in (
        ({0: 1.0}, r"layers \[0, 3\]; found \[0\]"),
        ({0: 0.0, 3: 0.0}, "not all 0"),
        ({0: -1.0, 3: 2.0}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            plain(losses.layer_mse)(student, teacher, weights=odd)
    zero = States({layer: x.detach() * 0 for layer, x in teacher.states.items()}, teacher.samples)
    with pytest.raises(ValueError, match="nothing can be measured by it"):
        losses.layer_mse(student, zero, weights="teacher")


def test_hyperbolic_distance_near_and_far():
    near = normal(4, 6)
    student = States({0: near.clone().requires_grad_()}, torch.arange(4))
    got = losses.layer_lorentz(student, States({0: near}, torch.arange(4)))
    assert got == 0
    (gradient,) = torch.autograd.grad(got, student.states[0])
    assert torch.equal(gradient, torch.zeros_like(near))
    other = normal(4, 6, seed=1)
    flat = losses.layer_lorentz(*(States({0: x}, torch.arange(4)) for x in (near, other)), curvature=1e-8)
    unit = other.square().sum(-1).mean()
    torch.testing.assert_close(flat, (near - other).square().sum(-1).mean() / unit, rtol=1e-6, atol=0)
    # Points on one ray: the distance is the difference of their lengths, here far beyond what fp32 could raise e to.
    ray = torch.tensor([[1.0, 2.0, 2.0]])
    lengths = [States({0: torch.cat([ray, k * ray])}, torch.arange(2)) for k in (1.0, 200.0)]
    far = losses.layer_lorentz(lengths[1], lengths[0])
    torch.testing.assert_close(far, torch.tensor(199.0**2 / 2))
    with pytest.raises(ValueError, match="1000 times as long as the teacher's"):
        losses.layer_lorentz(States({0: 1000 * ray}), States({0: ray}))


def test_what_layer_losses_do_not_take():
    one = States({0: normal(1, 3)}, torch.zeros(1).long())
    with pytest.raises(ValueError, match="two tokens or more"):
        losses.layer_contrastive(one, one)
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.layer_contrastive(one, one, temperature=0.0)
    with pytest.raises(ValueError, match="curvature should be positive"):
        losses.layer_lorentz(one, one, curvature=-1.0)
