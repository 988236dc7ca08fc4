"""Put shift heads or functions into a model, and remove them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import optimizers
from .adapters import locate, unwrap
from .averaging import Averaging
from .edits import Given, Installation, SiteEdit, installed
from .errors import PatchStateError, ShapeError, WrongTypeError
from .heads import ShiftStack
from .heads.stack import check_stack
from .positions import Positions, check_mask, check_positions
from .types import At, Located, Site, check_site, check_token_site


class Handle:
    """Removes a patch or hook. As a context manager it removes it at the end of the `with`, also after an exception."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    @property
    def installed(self) -> bool:
        """Whether the patch is in the model: False after `remove`."""
        return self._installation.installed

    def remove(self) -> None:
        """Restore the model exactly. Handles can be removed in any order. A second call does nothing."""
        self._installation.remove()
        if isinstance(self._installation.key, ShiftStack):
            optimizers.forget(self._installation.key)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the patch off inside the `with`, for this thread. Attention then runs the model's own kernel.

        Code that torch.compile made of a whole model is not checked: let no other thread run it inside the `with`.

        Raises:
            PatchStateError: another thread is inside a forward of the model. A thread that begins a forward inside the
                `with` and has not called `disabled` itself gets this error too.
        """
        self._installation.switch_off()
        try:
            yield
        finally:
            self._installation.switch_on()

    @contextmanager
    def at(
        self, *, positions: Bool[Tensor, "b t"] | None = None, prompt: Bool[Tensor, "b s"] | None = None
    ) -> Iterator[None]:
        """Say where the edits act, or where the prompt is, in the forwards inside the `with`, in this thread.

            with handle.at(prompt=labels.eq(-100) & mask):      # rows that go on with the answer
                loss = model(**batch, labels=labels).loss

        A forward alone cannot know where its prompt ends if its rows go on with an answer, or if the prompt comes in
        several forwards. `model.generate` says it by itself.

        Args:
            positions: The tokens of each forward on which the edits act, whatever positions they were built with.
                `at.positions` and `at.prompt_end` are then this mask too.
            prompt: The tokens of the prompt. s counts from the beginning of the cache. Tokens after s are not in the
                prompt.

        Raises:
            ShapeError: not exactly one of the two is given, or it is not a bool mask of two axes. A forward raises it
                if the mask does not fit its tokens.
            PatchStateError: the handle was removed. A forward raises it if an edit is at `key`, `value` or `lse`.
        """
        if not self.installed:
            raise PatchStateError("this handle was removed; patch the model again for a new one")
        if (positions is None) == (prompt is None):
            raise ShapeError("handle.at needs either positions=mask or prompt=mask")
        given = Given(
            positions=None if positions is None else check_mask(positions, "positions"),
            prompt=None if prompt is None else check_mask(prompt, "prompt"),
        )
        with self._installation.at(given):
            yield

    def __enter__(self) -> Handle:
        if not self.installed:
            raise PatchStateError("this handle was removed; patch the model again for a new one")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def patch(model: nn.Module, shifts: ShiftStack | DistributedDataParallel) -> Handle:
    """Put a stack of shift heads into a model.

    The shifts act from now on, until the handle is removed. If this raises an error, the model is unchanged. A model
    can have several stacks; at the same site they act in the order in which they were patched. The model's parameters,
    config and state dict do not change, and the shifts are not part of the model. A deep copy or pickle of a patched
    model is also patched, with its own copy of the shifts.

    With torch.compile, the patched model is compiled again. When the patch is removed, the graphs from before are used
    again. Another stack of the same form uses the same graphs. Graphs of other models are not affected.
    `handle.disabled()` needs one more graph.

    `model.parameters()` does not include the shifts: give `shifts.parameters()` to the optimizer. If they have a
    gradient and no optimizer has them, the next step of an optimizer raises PatchStateError, or warns if it has other
    parameters to train.

    In several processes, give the stack inside DistributedDataParallel, which averages its gradients:

        mimic_core.patch(model, DistributedDataParallel(shifts))

    A DistributedDataParallel around a module that holds the stack does the same. A forward with gradients raises
    PatchStateError if it runs in one that does not hold the stack.

    Raises:
        WrongTypeError: `shifts` is not a ShiftStack.
        UnsupportedModelError: no adapter fits the model.
        ShapeError: the stack was built for a model of other sizes.
        PatchStateError: this stack is already in this model, or in a part of it. Or its parameters are sharded, or
            the options of its DistributedDataParallel need its forward. A later forward also raises it if it does not
            reach one of the sites.
    """
    stack = check_stack(shifts)
    averaging = Averaging(stack, shifts if isinstance(shifts, DistributedDataParallel) else None)
    found = locate(model)
    if misfit := stack.spec.misfit(found.spec):
        raise ShapeError(f"these shifts do not fit {type(found.model).__name__}: they were built for {misfit}")
    edits = [
        SiteEdit(
            layer=head.layer.index,
            site=site,
            # Calling the module instead of its forward takes twice as long, because torch looks for hooks.
            run=head.forward if run is head else run,
            shift=head.gated_shift if site == "attn_heads" and head.is_gated_shift else None,
            fused=head.fused if site == "attn_heads" else None,
            needs_lse=head.needs_lse and site == "attn_heads",
            needs_positions=head.needs_prompt_end,
            needs_at=head.needs_at,
            positions=positions_at(site, head.config.positions),
        )
        for head in stack
        for site, run in head.edits().items()
    ]
    handle = Handle(Installation(found, edits, key=stack, begins=averaging))
    optimizers.watch(stack)
    return handle


def handles(model: nn.Module) -> list[Handle]:
    """The handles of all patches, hooks and open captures in a model, in the order in which they were made.

    A deep copy or pickle of a patched model is patched too. This removes its patches:

        for handle in mimic_core.handles(copy):
            handle.remove()
    """
    return [Handle(installation) for installation in installed(*unwrap(model).modules())]


def hook(
    model: nn.Module,
    site: str,
    fn: Callable[[Tensor, At], Tensor | None],
    layers: Iterable[int] | None = None,
    positions: Positions | Bool[Tensor, "b t"] = "all",
) -> Handle:
    """Edit or read a site with a function.

    Args:
        site: One of `mimic_core.types.SITES`; see `mimic_core.types.Site` for the shapes.
        fn: Called with the value of the site and an `At` (`at.layer`, `at.module`, `at.positions(...)`; at attention
            sites also `at.query`, `at.key`, `at.value`, `at.mask`, `at.scale`, `at.lse`). It returns the new value, or
            None to keep the value. It may store what it gets and use it later: later writes of the model do not reach
            it. For this, one copy is made at `key` and `value`, each time `at.key` or `at.value` is read, and at the
            other sites if the function returns None or the tensor it got.
        layers: Which decoder layers; None means all that have the site.
        positions: The tokens on which the function acts; see `mimic_core.positions.Positions`. It gets the value of
            all tokens, and what it returns is used at these. A mask [b t] is for forwards of this shape only.

    Raises:
        WrongTypeError: `fn` is not callable.
        UnknownNameError: there is no such site, or no such positions.
        ShapeError: `positions` is a tensor, but not a bool mask [b t].
        PatchStateError: the edit is limited to positions at `key`, `value` or `lse`.
        UnsupportedModelError: no adapter fits, or a layer lacks the site.

    A later forward raises ShapeError if `fn` returns another shape, dtype or device. It raises PatchStateError if `fn`
    returns a value at `lse`, which can only be read, or if the forward does not reach the site.
    """
    if not callable(fn):
        raise WrongTypeError(f"a function (value, at) is needed, found {type(fn).__name__}")
    name = check_site(site)
    found = locate(model)
    chosen = choose_layers(found, (name,), layers)
    where = positions_at(name, positions)
    edits = [SiteEdit(layer, name, fn, needs_positions=True, keeps=True, positions=where) for layer in chosen]
    return Handle(Installation(found, edits))


def positions_at(site: Site, positions: object) -> Positions | Tensor:
    """Return `positions`, if an edit at the site can be limited to them."""
    checked = check_mask(positions, "positions") if isinstance(positions, Tensor) else check_positions(positions)
    if isinstance(checked, Tensor) or checked != "all":
        check_token_site(site)
    return checked


def choose_layers(found: Located, sites: Iterable[str], layers: Iterable[int] | None) -> list[int]:
    """The given layers, or else every layer that has all the sites."""
    if layers is not None:
        return list(layers)
    wanted = set(sites)
    return [layer.index for layer in found.spec.layers if wanted <= set(layer.sites)]
