"""Put shifts, or plain functions, into a model, reversibly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .adapters import locate
from .edits import Installation, SiteEdit, installed
from .errors import PatchStateError, ShapeError
from .heads import ShiftStack
from .types import At, Located, check_site


class Handle:
    """What undoes a patch or hook. As a context manager it removes at the end, whatever happened inside."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    @property
    def installed(self) -> bool:
        """False after `remove`."""
        return self._installation.installed

    def remove(self) -> None:
        """Leave the model exactly as it was. Handles can be removed in any order; twice is once."""
        self._installation.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as if not patched, inside the `with`; every attention runs its own kernel. All threads see it."""
        self._installation.switch_off()
        try:
            yield
        finally:
            self._installation.switch_on()

    def __enter__(self) -> Handle:
        if not self.installed:
            raise PatchStateError("this handle was removed; patch the model again for a new one")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def patch(model: nn.Module, shifts: ShiftStack) -> Handle:
    """Put a stack of shift heads into a model.

    At once: the model is shifted until the handle is removed. All or nothing: on an error the model is as it was.
    Several stacks can be in one model; at a shared site they act in the order they were patched in. The model's
    parameters, config and state dict don't change, and the shifts are no part of the model. A deep copy or pickle of a
    patched model is patched too, with shifts of its own.

    What torch.compile has made of this model is made anew when a patch comes, and is there again when it goes; a stack
    of the same form put in its place runs the same graphs. Other models' graphs stay. `handle.disabled()` costs one
    more graph.

    Raises:
        UnsupportedModelError: no adapter fits the model.
        ShapeError: the stack was built for a model of other sizes.
        PatchStateError: this very stack is already in this model. Also raised by a later forward that never reaches one
            of the sites.
    """
    found = locate(model)
    if misfit := shifts.spec.misfit(found.spec):
        raise ShapeError(f"these shifts don't fit {type(found.model).__name__}: they were built for {misfit}")
    if any(i.key is shifts for i in installed(found.model)):
        raise PatchStateError(
            "these shifts are already in this model; remove their handle first, or build another stack"
        )
    edits = [
        SiteEdit(
            layer=head.layer.index,
            site=site,
            # Called as a module, a head costs as much again: torch looks for hooks that nobody hangs on it.
            run=head.forward if run is head else run,
            shift=head.gated_shift if site == "attn_heads" and head.is_gated_shift else None,
            fused=head.fused if site == "attn_heads" else None,
            needs_lse=head.needs_lse and site == "attn_heads",
            needs_prompt_end=head.needs_prompt_end,
            needs_at=head.needs_at,
        )
        for head in shifts
        for site, run in head.edits().items()
    ]
    return Handle(Installation(found, edits, key=shifts))


def hook(
    model: nn.Module,
    site: str,
    fn: Callable[[Tensor, At], Tensor | None],
    layers: Iterable[int] | None = None,
) -> Handle:
    """Edit or watch a site with a plain function.

    Args:
        site: One of `mimic_core.types.SITES`; its docstring has the shapes.
        fn: Called with the site's value and an `At` (`at.layer`, `at.module`, `at.prompt_end`; at attention sites also
            `at.query`, `at.key`, `at.value`, `at.mask`, `at.scale`, `at.lse`). Returns the new value, or None to leave
            it.
        layers: Which decoder layers; None is all that have the site.

    Raises:
        UnknownNameError: there is no such site.
        UnsupportedModelError: no adapter fits, or a layer lacks the site.

    A forward raises ShapeError if `fn` returns another shape, dtype or device, and PatchStateError if it returns a
    value at `lse`, which can only be read, or if a site is never reached.
    """
    name = check_site(site)
    found = locate(model)
    chosen = choose_layers(found, (name,), layers)
    edits = [SiteEdit(layer, name, fn, needs_prompt_end=True) for layer in chosen]
    return Handle(Installation(found, edits))


def choose_layers(found: Located, sites: Iterable[str], layers: Iterable[int] | None) -> list[int]:
    """The layers asked for, or every one that has all the sites."""
    if layers is not None:
        return list(layers)
    wanted = set(sites)
    return [layer.index for layer in found.spec.layers if wanted <= set(layer.sites)]
