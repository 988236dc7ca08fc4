"""The errors of a forward in which edits did not run as they should."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import PatchStateError
from .entry import SiteEdit


def halfway(what: str) -> PatchStateError:
    """Edits were put in, removed or switched while a forward ran."""
    return PatchStateError(
        f"a patch, hook or capture was {what} during a forward of its model, so only some layers were edited: do this "
        f"when no forward runs. If another thread did it, wait for the forward, or give each thread a copy of the model"
    )


def never_reached(model: nn.Module, missed: Sequence[SiteEdit]) -> PatchStateError:
    """A forward ended, and these edits did not run."""
    where = ", ".join(f"{edit.site} of layer {edit.layer}" for edit in missed[:4])
    more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
    return PatchStateError(
        f"a forward of {type(model).__name__} never reached {where}{more}, so the edits there did "
        f"nothing. Perhaps its attention does not go through transformers' AttentionInterface, or its adapter "
        f"names wrong modules. Or something has replaced the forward of these modules since: then remove the "
        f"patch and patch again. Or torch.compile could not compile the edits: then run the model uncompiled"
    )


def other_passes(path: str, ran: int, passes: int) -> PatchStateError:
    """A layer with edits for each of its passes ran another number of times."""
    return PatchStateError(
        f"{path} ran {ran} times in this forward, and {passes} times when the model was looked at, and each pass has "
        f"edits of its own: give the model what makes as many passes, or use one head for all passes: "
        f"adapter=mimic_core.GenericAdapter(share_passes=True)"
    )
