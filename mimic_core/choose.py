"""Choose which attention heads of a stack act, by a loss of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ShapeError, UnknownNameError
from .heads import ShiftStack
from .heads.stack import check_stack


@torch.no_grad()
def choose_heads(
    shifts: ShiftStack,
    loss: Callable[[], float | Tensor],
    steps: int = 100,
    samples: int = 8,
    rate: float = 0.1,
    generator: torch.Generator | None = None,
) -> None:
    """Set each `weight` of a stack to 0 or 1, by REINFORCE: MTV's attention heads, or the layers of a task vector.

        mc.estimate(model, shifts, [inputs])
        with mc.patch(model, shifts):
            mc.choose_heads(shifts, lambda: mc.losses.lm(model(**batch).logits, batch["input_ids"], answers))

    Each weight has a probability, 1/2 at first. In a step, `loss` is called once for each of some drawn choices, which
    are in the stack meanwhile. Adam then lowers the expected loss: its gradient is the mean of (loss - mean loss) times
    that of the choice's log-probability. At the end, the weights with a probability above 1/2 are 1, the others 0. If
    this raises an error, the stack is unchanged.

    Args:
        loss: The loss with the choice that the stack now holds, such as that of the next batch of a loader. It should
            run in the model that has the stack.
        steps: How many steps.
        samples: How many choices are drawn in a step; at least 2.
        rate: The learning rate of Adam on the log-odds.
        generator: Of the draws, on the CPU. None: torch's global one.

    Raises:
        WrongTypeError: `shifts` is no stack.
        UnknownNameError: a head has no parameter `weight`.
        ShapeError: `samples` is below 2, or a loss is NaN or infinite.
    """
    stack = check_stack(shifts)
    weights = [head._parameters.get("weight") for head in stack]
    sizes = [w.numel() for w in weights if w is not None]
    if len(sizes) < len(weights):
        raise UnknownNameError(f"the heads of {stack.name!r} have no parameter `weight` that a choice could set")
    if samples < 2:
        raise ShapeError(f"samples should be 2 or more, because their mean loss is compared with; found {samples}")
    before = [w.clone() for w in weights if w is not None]
    odds = torch.zeros(sum(sizes), requires_grad=True)
    adam = torch.optim.Adam([odds], lr=rate)

    def put(numbers: Tensor) -> None:
        for w, part in zip(weights, numbers.split(sizes), strict=True):
            assert w is not None
            w.copy_(part.view_as(w))

    try:
        for _ in range(steps):
            chance = odds.sigmoid()
            drawn = torch.rand(samples, len(odds), generator=generator).lt(chance).float()
            found = torch.zeros(samples)
            for n, one in enumerate(drawn):
                put(one)
                found[n] = number = float(loss())
                if not math.isfinite(number):
                    raise ShapeError(f"the loss of a choice of heads is {number}")
            odds.grad = ((found - found.mean())[:, None] * (drawn - chance)).mean(0)
            adam.step()
    except BaseException:
        put(torch.cat([x.flatten() for x in before]).cpu())
        raise
    put((odds > 0).float())
