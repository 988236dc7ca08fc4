"""Build the shift heads for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .adapters import Handed, locate
from .errors import UnknownNameError, WrongTypeError
from .heads import ComposedStack, HeadConfig, ShiftStack, head_class, head_for_config
from .origins import origin_of


def build_shifts(
    model: nn.Module,
    head: str | HeadConfig | Sequence[str | HeadConfig] = "mimic",
    *,
    adapter: Handed = None,
    **options: Any,
) -> ShiftStack:
    """Build shift heads for the decoder layers of a model, with the initial values of their paper.

    Args:
        model: A supported model. It is not changed, so freeze it yourself.
        head: The name of a registered head, or its config. Or a list of these: they act together, at the same site in
            this order. The stack is then trained, saved and loaded as one, and has `parts`.
        adapter: See `adapter_for`.
        options: Fields of the head's config, if `head` is a name: `layers=(0, 1)`, `gate=False`.

    Returns:
        A module that holds only the parameters of the shifts, in fp32. Each head is on the device of its layer. Random
        initial values come from torch's global generator; in a tensor-parallel model, from that of the first process.

    Raises:
        WrongTypeError: `head` is neither a name nor a config, nor a list of them.
        UnsupportedModelError: no adapter fits the model, or a chosen layer lacks a site of the head.
        UnknownNameError: there is no such head or option.
        ShapeError: `layers` names a layer that the model does not have, or the list has none or more than 16.
    """
    if isinstance(head, list | tuple):
        if options:
            raise UnknownNameError(
                f"options were given together with a list: {', '.join(options)}; put them into the configs of its heads"
            )
        return ComposedStack([build_shifts(model, one, adapter=adapter) for one in head])
    found = locate(model, adapter)
    if isinstance(head, str):
        kind = head_class(head)
        unknown = set(options) - set(kind.config_class.option_names())
        if unknown:
            raise UnknownNameError(
                f"shift head {head!r} has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(kind.config_class.option_names())}"
            )
        config = kind.config_class(**options)
    elif not isinstance(head, HeadConfig):
        raise WrongTypeError(f"the name of a shift head or its config is needed, found {type(head).__name__}")
    else:
        kind, config = head_for_config(head), head
        if options:
            raise UnknownNameError(
                f"options were given together with a config: {', '.join(options)}; put them into the config"
            )
    stack = place(ShiftStack(kind, config, found.spec, origin_of(found)), found.model)
    if found.parallel is not None:
        found.parallel.share(stack)
    return stack


def place(stack: ShiftStack, model: nn.Module) -> ShiftStack:
    """Move each head to the device of its layer's weights. If those are offloaded (meta), it stays on the CPU."""
    for head in stack:
        weights = next(model.get_submodule(head.layer.path).parameters(), None)
        if weights is not None and weights.device.type != "meta":
            head.to(weights.device)
    return stack
