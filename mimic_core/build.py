"""Make the shift heads that fit a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters import locate
from .errors import UnknownNameError
from .heads import HeadConfig, ShiftStack, head_class, head_for_config


def build_shifts(model: nn.Module, head: str | HeadConfig = "mimic", **options: Any) -> ShiftStack:
    """Shift heads for a model's decoder layers, at the initial values of their paper.

    Args:
        model: A supported model. It is only read; freezing it is the caller's.
        head: The name of a registered head, or its config.
        options: Fields of the head's config, where `head` is a name: `layers=(0, 1)`, `gate=False`, ...

    Returns:
        A module holding only the shifts' parameters, each head on its layer's device, in fp32. Random initial values
        come from torch's global generator.

    Raises:
        UnsupportedModelError: no adapter fits the model, or a chosen layer lacks the head's site.
        UnknownNameError: no such head or option.
        ShapeError: `layers` names a layer the model doesn't have.
    """
    inner, _, spec = locate(model)
    if isinstance(head, str):
        kind = head_class(head)
        unknown = set(options) - set(kind.config_class.option_names())
        if unknown:
            raise UnknownNameError(
                f"shift head {head!r} has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(kind.config_class.option_names())}"
            )
        config = kind.config_class(**options)
    else:
        kind, config = head_for_config(head), head
        if options:
            raise UnknownNameError(f"options go into the config or beside a name, not both; found {', '.join(options)}")
    return place(ShiftStack(kind, config, spec), inner)


def place(stack: ShiftStack, model: nn.Module) -> ShiftStack:
    """Move each head to the device of its layer's weights; where those are offloaded (meta), leave it on the CPU."""
    for head in stack:
        weights = next(model.get_submodule(head.layer.path).parameters(), None)
        if weights is not None and weights.device.type != "meta":
            head.to(weights.device)
    return stack
