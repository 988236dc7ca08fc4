"""Losses of the shift-head papers, as pure functions of tensors and of layer-wise hidden states.

Teacher and student are compared token by token. Both must hold the same number of tokens of every sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .errors import ShapeError, UnknownNameError
from .ops._precision import wide
from .types import LayerStates

__all__ = [
    "Recipe",
    "layer_contrastive",
    "layer_cosine",
    "layer_lorentz",
    "layer_mse",
    "lm",
    "logits_kl",
    "recipe",
]

_Weights = Mapping[int, float] | Literal["teacher"] | None


def layer_mse(student: LayerStates, teacher: LayerStates, weights: _Weights = None) -> Float[Tensor, ""]:
    """Mean squared difference of hidden states: the mean over layers, tokens and channels, then over samples.

    All samples have the same weight, whatever their length. The teacher gets no gradient.

    Args:
        student: A capture of one site, from the patched run without demonstrations.
        teacher: The same site and layers, from the unpatched run with demonstrations.
        weights: How much each layer counts. None: all the same. Numbers by layer: the mean is weighted by them.
            "teacher": the distance is divided by the mean square of the teacher's states in this layer, so that no
            layer counts more because its numbers are larger. In a small Llava the last layer is 98% of the plain mean
            of squares.

    Raises:
        ShapeError: the two differ in layers, samples, or in the number of tokens of a sample.
        ValueError: the weights are not those of the layers, or negative, or all zero; or the teacher's states are zero.

    Source: MimIC, arXiv:2504.08851, eq. 6. This is the mean over tokens instead of the sum, as in the published
    numbers.
    """
    return _layer_wise(student, teacher, lambda s, t: (s - t).square().mean(-1), weights)


def layer_cosine(
    student: LayerStates, teacher: LayerStates, weights: Mapping[int, float] | None = None
) -> Float[Tensor, ""]:
    """1 - cosine similarity of hidden states: the mean over layers and tokens, then over samples.

    Arguments and errors are those of `layer_mse`.
    """
    return _layer_wise(student, teacher, lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1), weights)


def layer_lorentz(
    student: LayerStates,
    teacher: LayerStates,
    curvature: float = 1.0,
    weights: Mapping[int, float] | None = None,
) -> Float[Tensor, ""]:
    """Squared distance of hidden states in hyperbolic space, averaged as in `layer_mse`.

    Both are divided by the root mean square norm of the teacher's tokens in the layer. Then the exponential map at the
    origin of the Lorentz model brings them into the space of curvature -c, and the distance is along a geodesic.

    Args:
        curvature: c. With a small one, the distance is nearly Euclidean.

    Raises:
        ValueError: c is not positive; a state is so much longer than the teacher's others (by some hundred times) that
            the distance overflows, as the first token's can be: leave it out; or as in `layer_mse`.

    Other arguments and errors are those of `layer_mse`. Source: Hyper-ICL, arXiv:2606.04434, for the loss. How the
    paper scales hidden states before the map could not be seen, so the division is this library's.
    """
    if not curvature > 0:
        raise ValueError(f"curvature should be positive, found {curvature}")

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (ours, theirs)]
        unit = curvature**-0.5 * _scale(norms[1].double().square(), "norm").sqrt()
        r, s = ((norm.double() / unit).squeeze(-1) for norm in norms)
        # Half the squared chord is 1 - cos, without the cancellation.
        chord = (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).double().square().sum(-1)
        z = 2 * ((r - s) / 2).sinh().square() + r.sinh() * s.sinh() * chord / 2
        if not torch.isfinite(z).all():
            raise ValueError(
                f"a hidden state is {float(torch.maximum(r, s).max()):.0f} times as long as the teacher's are, and its "
                f"hyperbolic distance overflows; leave the token out with `where`, or choose a smaller curvature"
            )
        return (_squared_arccosh(z) / curvature).to(ours.dtype)

    return _layer_wise(student, teacher, distance, weights)


def _squared_arccosh(z: Tensor) -> Tensor:
    """arccosh(1 + z)^2. The derivative of arccosh is infinite at 1, but not that of its square."""
    near = z < 1e-3
    series = z * (2 + z * (-1 / 3 + z * (4 / 45 - z / 35)))
    far = torch.where(near, torch.ones_like(z), z)
    return torch.where(near, series, torch.log1p(far + (far * (far + 2)).sqrt()).square())


def layer_contrastive(
    student: LayerStates,
    teacher: LayerStates,
    temperature: float = 0.1,
    weights: Mapping[int, float] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of telling the teacher's same token from its other tokens in the batch, averaged as in `layer_mse`.

    The logits are the cosine similarities of the student's token with all of the teacher's tokens in the layer, divided
    by the temperature. So for n tokens a layer makes an [n n] tensor.

    Raises:
        ValueError: the temperature is not positive, or there is only one token; or as in `layer_mse`.

    Other arguments and errors are those of `layer_mse`. Source: InfoNCE, arXiv:1807.03748.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        if len(ours) < 2:
            raise ValueError("a contrastive loss needs two tokens or more in the batch, found 1")
        logits = einsum(F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1), "n c, m c -> n m") / temperature
        return F.cross_entropy(logits, torch.arange(len(ours), device=ours.device), reduction="none")

    return _layer_wise(student, teacher, distance, weights)


def _layer_wise(
    student: LayerStates,
    teacher: LayerStates,
    distance: Callable[[Tensor, Tensor], Tensor],
    weights: _Weights,
) -> Float[Tensor, ""]:
    layers = list(student.states)
    if layers != list(teacher.states) or not layers:
        raise ShapeError(
            f"student and teacher must hold the same layers; the student holds {layers}, the teacher "
            f"{list(teacher.states)}"
        )
    factors = _factors(layers, weights)
    samples, counts = _check_samples(_samples(student), _samples(teacher))
    per_layer = []
    for layer in layers:
        ours, theirs = (_tokens(side.states[layer]) for side in (student, teacher))
        theirs = wide(theirs.detach().to(ours.device))
        found = distance(wide(ours), theirs)
        if weights == "teacher":
            found = found / _scale(theirs.square(), "mean square").to(found.dtype)
        per_layer.append(found.to(samples.device))
    per_token = einsum(torch.stack(per_layer), per_layer[0].new_tensor(factors), "l n, l -> n")
    per_sample = per_token.new_zeros(len(counts)).index_add(0, samples, per_token) / counts
    return per_sample.mean()


def _factors(layers: list[int], weights: _Weights) -> list[float]:
    """What the distance of each layer is multiplied by, before the sum over layers."""
    if weights is None or weights == "teacher":
        return [1 / len(layers)] * len(layers)
    if isinstance(weights, str) or set(weights) != set(layers):
        given = repr(weights) if isinstance(weights, str) else sorted(weights)
        raise ValueError(f"weights should be 'teacher', or have a number for each of layers {layers}; found {given}")
    numbers = [float(weights[layer]) for layer in layers]
    if not all(0 <= x < math.inf for x in numbers) or not any(numbers):
        raise ValueError(f"the weights of the layers should be 0 or more, and not all 0; found {numbers}")
    return [x / sum(numbers) for x in numbers]


def _scale(squares: Tensor, what: str) -> Tensor:
    """The mean of the teacher's squares."""
    found = squares.mean()
    if not found > 0 or not torch.isfinite(found):
        raise ValueError(f"the {what} of the teacher's states is {float(found):g}, so nothing can be measured by it")
    return found


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
    top_k: int | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of next-token distributions, the mean over the chosen positions of the whole batch.

    Both logits are divided by `temperature`, and the result is multiplied by its square. The teacher gets no gradient.

    Args:
        student_where: True at the positions that are compared, in order, sample by sample. The logits at a position
            predict the token after it.
        teacher_where: The same positions in the text of the teacher.
        top_k: Compare only the teacher's k likeliest tokens; the others count as one token. The result is never larger
            than that over all tokens. None: all.

    Raises:
        ShapeError: a mask does not fit its logits, or the masks choose different numbers of positions.
        ValueError: the temperature is not positive, or `top_k` is below 1.

    Source: LIVE, arXiv:2406.13185.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k should be 1 or more, or None for all tokens, found {top_k}")
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
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    if top_k is not None and top_k < theirs.shape[-1]:
        kept = theirs.topk(top_k).indices
        ours, theirs = _with_one_rest(ours, kept), _with_one_rest(theirs, kept)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _with_one_rest(logs: Tensor, kept: Tensor) -> Tensor:
    """The log-probabilities of some tokens, and that of all others together."""
    rest = logs.scatter(-1, kept, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, kept), rest], dim=-1)


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
