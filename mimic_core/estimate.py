"""Fill heads whose vectors are taken from activations, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import locate
from .capture import capture
from .errors import ShapeError, UnknownNameError, WrongTypeError
from .handle import check_new
from .heads import ShiftStack, Taken
from .heads.stack import single
from .positions import Positions, check_positions
from .types import Site

Inputs = Mapping[str, Any]
States = dict[Site, dict[int, Tensor]]
"""By site and layer, [b k] in fp64: one row for each sample."""
# The largest angle, in radians, by which a first component may be off.
ANGLE = 0.01


@torch.no_grad()
def estimate(
    model: nn.Module,
    shifts: ShiftStack,
    batches: Iterable[Inputs | tuple[Inputs, Inputs]],
    positions: Positions = "prompt_end",
    rank: int = 64,
) -> None:
    """Fill a stack with values from the model's activations: ICV, CAA, I2CL, MTV and task vectors.

        mc.estimate(model, shifts, [inputs])                     # "i2cl", "mtv", "task_vector": with demonstrations
        mc.estimate(model, shifts, [(inputs_x, inputs_y)])       # "icv", "caa": y minus x, sample by sample

    What is taken is said by the head (`ShiftHead.taken`): a mean over samples, or the first principal component. The
    model runs as it is, so put it into eval mode. Activations are not kept: there are running sums in fp64, and for
    components at most 2 * rank rows. If this raises an error, the stack is unchanged.

    Args:
        batches: Arguments of the model by name, padded on either side with an `attention_mask`, without labels. For
            heads with differences, pairs of them with as many samples. A loader will do: it is read once.
        positions: The tokens of each sample; their mean is taken. "prompt_end", the last one that is not padding, is
            that of the papers. "prompt" is the mean over all tokens that are not padding.
        rank: How many directions are kept for a first component. Up to 2 * rank pairs it is exact. With more, the angle
            to the exact one is at most 0.01, or an error is raised.

    Raises:
        WrongTypeError: `shifts` is no stack, or composed of several, or a batch is no mapping, or no pair where a pair
            is needed.
        UnknownNameError: the head takes nothing from activations, or the positions are "all", which has padding.
        ShapeError: the stack fits another model, there is no batch, a sample has no token at the positions, the texts
            of a pair differ in number, an activation is NaN or infinite, or no first component is determined.
        PatchStateError: the stack is in the model, or what `capture` raises.
    """
    stack, found = single(shifts, "mimic_core.estimate"), locate(model)
    check_new(found, [stack])
    head = next(iter(stack))
    if not head.taken:
        raise UnknownNameError(
            f"{type(head).__name__} takes nothing from activations, so train it, or fill it yourself"
        )
    if check_positions(positions) == "all":
        raise UnknownNameError("positions 'all' has padding too: give 'prompt' for all tokens that are not padding")
    sums = {taken: _Component(rank) if taken.of == "component" else _Mean() for taken in head.taken}
    sites: list[Site] = list(dict.fromkeys(taken.site for taken in head.taken))
    for number, batch in enumerate(batches):
        parts = _parts(batch, head.taken[0].pairs, number)
        seen = [_states(model, part, sites, stack.layers, positions, f"batch {number}") for part in parts]
        for taken, total in sums.items():
            rows = [torch.cat(list(states[taken.site].values()), dim=1) for states in seen]
            if len({x.shape for x in rows}) > 1:
                raise ShapeError(f"the texts of pair {number} have {' and '.join(str(len(x)) for x in rows)} samples")
            total.add(rows[0] if len(rows) == 1 else rows[1] - rows[0])
    if any(total.count == 0 for total in sums.values()):
        raise ShapeError("there was no batch, so there is nothing to take; a loader that was read to its end is empty")
    values = [_by_layer(stack, taken, total.value()) for taken, total in sums.items()]
    for one, *parts in zip(stack, *values, strict=True):
        one.take({taken.name: x for taken, x in zip(sums, parts, strict=True)})


def _by_layer(stack: ShiftStack, taken: Taken, value: Tensor) -> Sequence[Tensor]:
    sizes = [head.own(taken.name).numel() for head in stack]
    if sum(sizes) != len(value):
        raise ShapeError(f"{taken} of {stack.name!r} is for {sum(sizes)} numbers; all layers have {len(value)}")
    return value.split(sizes)


def _parts(batch: Any, pairs: bool, number: int) -> Sequence[Inputs]:
    parts = batch if pairs and isinstance(batch, (tuple, list)) else (batch,)
    if len(parts) != 1 + pairs or not all(isinstance(part, Mapping) for part in parts):
        wanted = "a pair of mappings, the first text's and the second's" if pairs else "a mapping"
        raise WrongTypeError(
            f"batch {number} should be {wanted} of arguments of the model; found {type(batch).__name__}"
        )
    return parts


def _states(
    model: nn.Module, inputs: Inputs, sites: list[Site], layers: Sequence[int], positions: Positions, name: str
) -> States:
    with capture(model, sites, where=positions, layers=layers, grad=False) as seen:
        model(**inputs)
    samples = seen.samples
    assert samples is not None
    samples = samples.cpu()
    given = [x for key in ("input_ids", "inputs_embeds", "attention_mask") if isinstance(x := inputs.get(key), Tensor)]
    tokens = torch.bincount(samples, minlength=len(given[0]) if given else 0)
    if not tokens.numel() or not tokens.all():
        empty = (tokens == 0).nonzero().flatten().tolist()
        raise ShapeError(f"{name}: samples {empty} have no token at positions {positions!r}: they are padding alone")
    found: States = {}
    for site in sites:
        for layer, value in seen[site].items():
            value = value.flatten(1).cpu().double()
            if not value.isfinite().all():
                raise ShapeError(f"{name}: {site} of layer {layer} is NaN or infinite")
            total = torch.zeros(len(tokens), value.shape[1], dtype=value.dtype).index_add_(0, samples, value)
            found.setdefault(site, {})[layer] = total / tokens[:, None]
    return found


class _Mean:
    """The mean of rows [n k]."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self._sum = self._sum + rows.sum(0)

    def value(self) -> Tensor:
        return torch.as_tensor(self._sum / self.count)


class _Component(_Mean):
    """The first principal component of rows, about zero: the unit vector v with the largest sum of (row . v)^2.

    At most 2 * rank rows are kept. More of them are turned into `rank` orthogonal ones: of the sum of row^T row, this
    loses a matrix whose norm is known.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._rows = torch.zeros(0)
        self._lost = 0.0

    def add(self, rows: Tensor) -> None:
        super().add(rows)
        for some in rows.split(self._rank):
            self._rows = torch.cat([self._rows, some]) if len(self._rows) else some
            if len(self._rows) > 2 * self._rank:
                squares, turned = self._turned()
                self._lost += squares[-self._rank - 1].item()
                self._rows = turned[-self._rank :]

    def _turned(self) -> tuple[Tensor, Tensor]:
        """The rows turned into orthogonal ones, and the squares of their lengths, the largest last."""
        squares, vectors = torch.linalg.eigh(self._rows @ self._rows.T)
        return squares, vectors.T @ self._rows

    def value(self) -> Tensor:
        squares, turned = self._turned()
        first, second = squares[-1].item(), squares[-2].item() if len(squares) > 1 else 0.0
        gap = first - second - self._lost
        if first <= 0 or gap <= 1e-9 * first:
            raise ShapeError(
                f"the differences of {self.count} pairs have no first principal component: the sums of squares along "
                f"the first two are {first:.3g} and {second:.3g}, and {self._lost:.3g} is not known; give other pairs, "
                f"or a larger rank"
            )
        if self._lost > math.sin(ANGLE) * gap:
            raise ShapeError(
                f"the first principal component of {self.count} pairs is not known well with rank={self._rank}; give a "
                f"larger rank: with {-(-self.count // 2)} it is exact"
            )
        one = turned[-1] / turned[-1].norm()
        return one if one @ super().value() >= 0 else -one
