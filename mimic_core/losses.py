"""Losses of the shift-head papers. Pure functions of tensors and of layer-wise hidden states.

Teacher and student are compared token by token: each must hold the same number of tokens of every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .errors import ShapeError, UnknownNameError
from .ops._precision import wide
from .types import LayerStates

__all__ = ["Recipe", "layer_cosine", "layer_mse", "lm", "logits_kl", "recipe"]


def layer_mse(student: LayerStates, teacher: LayerStates) -> Float[Tensor, ""]:
    """Mean squared difference of hidden states: over layers, tokens and channels, then over samples.

    Samples weigh the same whatever their length. The teacher gets no gradient.

    Args:
        student: A capture of one site, patched run without demonstrations.
        teacher: The same site and layers, unpatched run with them.

    Raises:
        ShapeError: the two differ in layers, samples, or in the number of tokens of a sample.

    Source: MimIC, arXiv:2504.08851, eq. 6 (mean instead of sum over tokens, as its published numbers).
    """
    return _layer_wise(student, teacher, lambda s, t: (s - t).square().mean(-1))


def layer_cosine(student: LayerStates, teacher: LayerStates) -> Float[Tensor, ""]:
    """1 - cosine similarity of hidden states: mean over layers and tokens, then over samples.

    Arguments and errors as `layer_mse`.
    """
    return _layer_wise(student, teacher, lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1))


def _layer_wise(
    student: LayerStates, teacher: LayerStates, distance: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, ""]:
    layers = list(student.states)
    if layers != list(teacher.states) or not layers:
        raise ShapeError(
            f"student and teacher must hold the same layers; the student holds {layers}, the teacher "
            f"{list(teacher.states)}"
        )
    samples, counts = _check_samples(_samples(student), _samples(teacher))
    per_layer = []
    for layer in layers:
        ours, theirs = (_tokens(side.states[layer]) for side in (student, teacher))
        per_layer.append(distance(wide(ours), wide(theirs.detach().to(ours.device))).to(samples.device))
    per_token = torch.stack(per_layer).mean(0)
    per_sample = per_token.new_zeros(len(counts)).index_add(0, samples, per_token) / counts
    return per_sample.mean()


def _tokens(states: Tensor) -> Tensor:
    return rearrange(states, "... c -> (...) c")


def _samples(side: LayerStates) -> Tensor:
    if side.samples is not None:
        return side.samples
    first = next(iter(side.states.values()))
    return repeat(torch.arange(first.shape[0], device=first.device), "b -> (b t)", t=first.shape[1])


def _check_samples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Samples renumbered without gaps, and how many tokens each has."""
    if not torch.equal(student, teacher.to(student.device)):
        raise ShapeError(_mismatch(student, teacher))
    if student.numel() == 0:
        raise ShapeError("student and teacher selected no token at all; `where` must choose at least one")
    _, numbered, counts = student.unique(return_inverse=True, return_counts=True)
    return numbered, counts


def _mismatch(student: Tensor, teacher: Tensor) -> str:
    ours, theirs = student.tolist(), teacher.tolist()
    for sample in sorted({*ours, *theirs}):
        a, b = ours.count(sample), theirs.count(sample)
        if a != b:
            return (
                f"sample {sample}: the student selected {a} tokens, the teacher {b}; both must select the same "
                f"query and answer tokens, without BOS and padding"
            )
    return "student and teacher selected the samples' tokens in different orders"


def logits_kl(
    student: Float[Tensor, "b t n"],
    teacher: Float[Tensor, "b u n"],
    student_where: Bool[Tensor, "b t"],
    teacher_where: Bool[Tensor, "b u"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of next-token distributions, mean over the chosen positions of the whole batch.

    Both logits are divided by `temperature` and the result multiplied by its square. The teacher gets no gradient.

    Args:
        student_where: True at the positions whose distributions are compared, sample by sample in order. The logits at
            a position predict the token after it.
        teacher_where: The same positions in the teacher's text.

    Raises:
        ShapeError: a mask does not fit its logits, or the two choose different numbers of positions.
        ValueError: the temperature is not positive.

    Source: LIVE, arXiv:2406.13185.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    chosen = []
    for name, logits, where in (("student", student, student_where), ("teacher", teacher, teacher_where)):
        if logits.shape[:2] != where.shape:
            raise ShapeError(
                f"{name}_where should be [b t] = {list(logits.shape[:2])} as the logits, found {list(where.shape)}"
            )
        chosen.append(where.to(logits.device).nonzero()[:, 0])
    _check_samples(*chosen)
    ours = wide(student[student_where.to(student.device)]) / temperature
    theirs = wide(teacher.detach()[teacher_where.to(teacher.device)]).to(ours.device) / temperature
    divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
    return divergence * temperature**2


def lm(
    logits: Float[Tensor, "b t n"], input_ids: Int[Tensor, "b t"], label_mask: Bool[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Next-token cross-entropy over the tokens chosen as labels, in nats, mean over all of the batch.

    Args:
        label_mask: True at the tokens to be predicted (each from the logits one position before it); the first
            position can't be, and counts for nothing.

    Raises:
        ShapeError: the shapes disagree, or no label is left.

    Independent of how a transformers version treats `labels`.
    """
    if not logits.shape[:2] == input_ids.shape == label_mask.shape:
        raise ShapeError(
            f"logits [b t n], input_ids [b t] and label_mask [b t] disagree: {list(logits.shape)}, "
            f"{list(input_ids.shape)}, {list(label_mask.shape)}"
        )
    chosen = label_mask[:, 1:].to(logits.device)
    if not chosen.any():
        raise ShapeError("label_mask chooses no token after the first position; there is nothing to predict")
    return F.cross_entropy(wide(logits[:, :-1][chosen]), input_ids[:, 1:].to(logits.device)[chosen])


@dataclass(frozen=True)
class Recipe:
    """The weights a paper gives the terms of its loss.

    Attributes:
        align: Weight of the layer-wise alignment (`layer_mse` or `layer_cosine`).
        kl: Weight of `logits_kl`.
        lm: Weight of `lm`.
    """

    align: float = 0.0
    kl: float = 0.0
    lm: float = 0.0

    def __call__(self, **terms: Tensor) -> Float[Tensor, ""]:
        """The weighted sum of `align=`, `kl=` and `lm=`: exactly the terms this recipe weighs.

        Raises:
            ValueError: a term with a weight is missing, or one without is given.
        """
        weights = {name: w for name, w in vars(self).items() if w}
        if set(terms) != set(weights):
            raise ValueError(f"this recipe weighs {sorted(weights)}; the terms given are {sorted(terms)}")
        parts = [terms[name] * weight for name, weight in weights.items()]
        return torch.stack(parts).sum()


_RECIPES = {
    "mimic": Recipe(align=1.0, lm=0.5),  # arXiv:2504.08851
    "live": Recipe(kl=1.0, lm=0.5),  # LIVE as compared in arXiv:2504.08851
    "lm": Recipe(lm=1.0),
}


def recipe(name: str) -> Recipe:
    """A published weighting: "mimic" (alignment + 0.5 LM), "live" (KL + 0.5 LM) or "lm" (LM alone).

    Raises:
        UnknownNameError: there is no recipe of that name.
    """
    if name not in _RECIPES:
        raise UnknownNameError(f"no recipe is called {name!r}; there are: {', '.join(_RECIPES)}")
    return _RECIPES[name]
