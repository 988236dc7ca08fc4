"""Which modules of a model add their input to their output.

The generic adapter knows how the models of transformers are laid out. Of another model's modules it must know whether
their output is before or after the residual addition. With all weights at zero, an MLP gives the same for every input,
and a layer hands its input on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .probe import Example, run_on_text, unedited


def adds_its_input(
    model: nn.Module, decoder: nn.Module, modules: list[nn.Module], example: Example | None
) -> dict[nn.Module, bool | None]:
    """Whether each module hands its input on, beside its weights. None: it can't be run alone."""
    found: dict[nn.Module, bool | None] = {}
    busy: list[bool] = []

    def ran(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if busy:
            return
        busy.append(True)
        try:
            found[module] = _depends(module, args, kwargs)
        except Exception:  # a module can raise anything, and none of it is the caller's affair
            found[module] = None
        finally:
            busy.clear()

    @contextmanager
    def watch() -> Iterator[None]:
        hooks = [m.register_forward_hook(ran, with_kwargs=True) for m in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    with unedited(model):
        run_on_text(model, decoder, watch, example)
    return found


def _depends(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether the output follows the first tensor if all weights but those of norms are zero."""
    norms = {p for m in module.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()}
    weights = {
        name: p if p in norms else torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
        for name, p in module.named_parameters()
    }
    place = next((i for i, x in enumerate(args) if _is_state(x)), None)
    name = next((key for key, x in kwargs.items() if _is_state(x)), "") if place is None else ""
    if place is None and not name:
        return None
    outputs = []
    for change in (False, True):
        given, named = list(args), dict(kwargs)
        holder: Any = given if place is not None else named
        key: Any = place if place is not None else name
        holder[key] = holder[key].roll(1, -1) + 1 if change else holder[key].clone()
        output = functional_call(module, weights, tuple(given), named)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    return not torch.equal(*outputs)


def _is_state(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
