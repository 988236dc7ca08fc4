"""How the arguments of attention functions are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .biased import FlexCall, XformersCall
from .call import SDPACall
from .named import FLEX, SDPA, TRANSFORMERS, XFORMERS, Called
from .packages import FlashCall, Odd, PackageCall
from .transformers_flash import TransformersFlashCall


def reading(
    called: Called,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: tuple[Any, ...],
    given_by_name: Mapping[str, Any],
) -> SDPACall | TransformersFlashCall | PackageCall | str:
    """The call of a function by a module. Or why it is not understood.

    Args:
        given, given_by_name: The arguments of the module's forward.
    """
    if called.kind == SDPA:
        call = SDPACall(called.original, module, *args, **kwargs)
        return call if call.query.ndim == 4 else f"got queries {list(call.query.shape)}, but [b h t d] is needed"
    try:
        if called.kind == XFORMERS:
            return XformersCall(called.original, module, args, kwargs)
        if called.kind == FLEX:
            return FlexCall(called.original, module, args, kwargs)
        if called.kind == TRANSFORMERS:
            return TransformersFlashCall(called.original, module, args, kwargs)
        return FlashCall(called.original, module, args, kwargs, _tokens((*given, *given_by_name.values())))
    except Odd as odd:
        return str(odd)


def _tokens(given: Iterable[Any]) -> tuple[int, int] | None:
    """b and t of the first hidden states."""
    found = (x for x in given if isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point())
    return next(((x.shape[0], x.shape[1]) for x in found), None)
