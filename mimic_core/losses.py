"""Losses of the shift-head papers, as pure functions of tensors and of layer-wise hidden states.

Teacher and student are compared token by token. Both must hold the same number of tokens of every sample.
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
    """Mean squared difference of hidden states: the mean over layers, tokens and channels, then over samples.

    All samples have the same weight, whatever their length. The teacher gets no gradient.

    Args:
        student: A capture of one site, from the patched run without demonstrations.
        teacher: The same site and layers, from the unpatched run with demonstrations.

    Raises:
        ShapeError: the two differ in layers, samples, or in the number of tokens of a sample.

    Source: MimIC, arXiv:2504.08851, eq. 6. This is the mean over tokens instead of the sum, as in the published
    numbers.
    """
    return _layer_wise(student, teacher, lambda s, t: (s - t).square().mean(-1))


def layer_cosine(student: LayerStates, teacher: LayerStates) -> Float[Tensor, ""]:
    """1 - cosine similarity of hidden states: the mean over layers and tokens, then over samples.

    Arguments and errors are those of `layer_mse`.
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
    """Return the samples, renumbered without gaps, and the number of tokens of each."""
    if not torch.equal(student, teacher.to(student.device)):
        raise ShapeError(_mismatch(student, teacher))
    if student.numel() == 0:
        raise ShapeError("student and teacher selected no tokens; `where` must choose at least one")
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
    """KL(teacher || student) of next-token distributions, the mean over the chosen positions of the whole batch.

    Both logits are divided by `temperature`, and the result is multiplied by its square. The teacher gets no gradient.

    Args:
        student_where: True at the positions that are compared, in order, sample by sample. The logits at a position
            predict the token after it.
        teacher_where: The same positions in the text of the teacher.

    Raises:
        ShapeError: a mask does not fit its logits, or the masks choose different numbers of positions.
        ValueError: the temperature is not positive.

    Source: LIVE, arXiv:2406.13185.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    chosen = []
    for name, logits, where in (("student", student, student_where), ("teacher", teacher, teacher_where)):
        if logits.shape[:2] != where.shape:
            raise ShapeError(
                f"{name}_where should be [b t] = {list(logits.shape[:2])} like the logits, found {list(where.shape)}"
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
    """Next-token cross-entropy in nats, the mean over the label tokens of the whole batch.

    It does not depend on how a version of transformers treats `labels`.

    Args:
        label_mask: True at the tokens to predict. Each is predicted from the logits one position before it, so the
            first position is ignored.

    Raises:
        ShapeError: the shapes do not fit each other, or there is no label.
    """
    if not logits.shape[:2] == input_ids.shape == label_mask.shape:
        raise ShapeError(
            f"logits [b t n], input_ids [b t] and label_mask [b t] do not fit each other: {list(logits.shape)}, "
            f"{list(input_ids.shape)}, {list(label_mask.shape)}"
        )
    chosen = label_mask[:, 1:].to(logits.device)
    if not chosen.any():
        raise ShapeError("label_mask chooses no token after the first position, so there is nothing to predict")
    return F.cross_entropy(wide(logits[:, :-1][chosen]), input_ids[:, 1:].to(logits.device)[chosen])


@dataclass(frozen=True)
class Recipe:
    """The weights of the terms of a loss.

    Attributes:
        align: Weight of the layer-wise alignment (`layer_mse` or `layer_cosine`).
        kl: Weight of `logits_kl`.
        lm: Weight of `lm`.
    """

    align: float = 0.0
    kl: float = 0.0
    lm: float = 0.0

    def __call__(self, **terms: Tensor) -> Float[Tensor, ""]:
        """The weighted sum of the terms `align=`, `kl=` and `lm=` that have a weight in this recipe.

        Raises:
            ValueError: a term with a weight is missing, or a term without a weight is given.
        """
        weights = {name: w for name, w in vars(self).items() if w}
        if set(terms) != set(weights):
            raise ValueError(f"this recipe has weights for {sorted(weights)}; the terms given are {sorted(terms)}")
        parts = [terms[name] * weight for name, weight in weights.items()]
        return torch.stack(parts).sum()


_RECIPES = {
    "mimic": Recipe(align=1.0, lm=0.5),  # arXiv:2504.08851
    "live": Recipe(kl=1.0, lm=0.5),  # LIVE in the comparison of arXiv:2504.08851
    "lm": Recipe(lm=1.0),
}


def recipe(name: str) -> Recipe:
    """The published weights of a method: "mimic" (alignment + 0.5 LM), "live" (KL + 0.5 LM) or "lm" (only LM).

    Raises:
        UnknownNameError: there is no recipe of that name.
    """
    if name not in _RECIPES:
        raise UnknownNameError(f"no recipe is called {name!r}; there are: {', '.join(_RECIPES)}")
    return _RECIPES[name]
