"""The handle of a patch or hook: it says how the edits act, and removes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Bool, Float
from torch import Tensor

from . import optimizers
from .adapters import locate
from .edits import Given, Installation, SiteEdit, installed
from .errors import PatchStateError, ShapeError
from .heads import ShiftHead, ShiftStack, StackSet
from .heads.split import of_process
from .heads.stack_set import Mixed, is_order_of, kinds
from .positions import Positions, check_mask, check_positions
from .samples import Samples, check_strength
from .types import Located, Site, check_token_site


class Handle:
    """Removes a patch or hook. As a context manager it removes it at the end of the `with`, also after an exception."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    @property
    def installed(self) -> bool:
        """Whether the patch is in the model: False after `remove`."""
        return self._installation.installed

    def remove(self) -> None:
        """Restore the model exactly. Handles can be removed in any order. A second call does nothing.

        If this happens during a forward in which some of the edits have not run yet, that forward raises
        PatchStateError when it ends.
        """
        self._installation.remove()
        for stack in self._installation.parts:
            optimizers.forget(stack)

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
        self._check_installed()
        if (positions is None) == (prompt is None):
            raise ShapeError("handle.at needs either positions=mask or prompt=mask")
        given = Given(
            positions=None if positions is None else check_mask(positions, "positions"),
            prompt=None if prompt is None else check_mask(prompt, "prompt"),
        )
        with self._installation.at(given):
            yield

    @property
    def strength(self) -> float | Float[Tensor, ""]:
        """How strongly the edits act: 0 is not at all, 1 (the default) is as they are.

        With strength s, the value of a site becomes `value + s * (edited - value)`, for every head and function. A
        tensor can have a gradient. `using` gives each sample its own.

        Raises:
            ShapeError: it is set to something else than a number or a float tensor [].
        """
        return self._installation.strength

    @strength.setter
    def strength(self, strength: float | Float[Tensor, ""]) -> None:
        self._installation.strength = check_strength(strength)

    @contextmanager
    def using(
        self,
        *stacks: str | Sequence[str | None] | None,
        strength: float | Sequence[float] | Float[Tensor, "*b"] | None = None,
    ) -> Iterator[None]:
        """Say which stack of a `StackSet` each sample gets, and how strongly, inside the `with`, in this thread.

            with handle.using(["vqa", None, "caption"], strength=[1.0, 1.0, 0.5]):
                model.generate(**batch)

        In `model.generate` a sample can have several rows (beams, several sequences): give one name for each sample.

        Args:
            stacks: A name or None for all samples, or a list with one for each sample. None is no stack: such a sample
                is exactly as in the unpatched model. Leave it out if the handle is not of a `StackSet`.
            strength: As `Handle.strength`, which counts if this is None. A tensor [b] or a list has one for each
                sample.

        Raises:
            UnknownNameError: the set has no such stack.
            ShapeError: the strengths are no numbers, or not one for each sample, or a stack that was added to the set
                does not fit the model. A forward raises it if it has another number of rows.
            PatchStateError: the handle was removed; or a stack is needed and none is given, or the other way round; or
                the set has another kind of stack than before and the patch can't take it in now, or one that composes
                the same heads in another order. A forward of a model
                with a set raises it outside `using`.
        """
        self._check_installed()
        shifts = self._installation.key
        if len(stacks) != isinstance(shifts, StackSet):
            raise PatchStateError(
                "handle.using needs a name, or None, or a list with one for each sample, because a set is in the model"
                if isinstance(shifts, StackSet)
                else "only handle.using(strength=...) is possible here: names are for a patch with a StackSet"
            )
        chosen, uniform = None, False
        if isinstance(shifts, StackSet):
            (said,) = stacks
            uniform = said is None or isinstance(said, str)
            names = [said] if said is None or isinstance(said, str) else said
            chosen = [None if name is None else shifts[name] for name in names]
            self._take_in(shifts)
        many = None if chosen is None or uniform else len(chosen)
        samples = Samples(chosen, uniform, None if strength is None else check_strength(strength, many, each=True))
        with self._installation.at(Given(samples=samples)):
            yield

    def _take_in(self, shifts: StackSet) -> None:
        """Install what stacks need that were added to a set since.

        Raises:
            PatchStateError, ShapeError: it is not possible.
        """
        old = self._installation
        known = {id(stack) for stack in old.parts}
        if known == {id(stack) for stack in shifts.values()}:
            return
        found = locate(old.model)
        edits = edits_of(found, shifts)
        check_new(found, [stack for stack in shifts.values() if id(stack) not in known])
        there = [edit.picks for edit in old.edits if isinstance(edit.picks, Mixed)]
        if {edit.picks for edit in edits} <= {*there} and is_order_of((x.kind for x in there), shifts.values()):
            old.parts = shifts.values()
        elif old.is_in_use or any(other.order > old.order for other in installed(*found.model.modules())):
            raise PatchStateError(
                "a stack of a new kind was added to the set, and the patch can't take it in now: a forward runs, or "
                "`at`, `using` or `disabled` is open, or the model has later patches. Do it without them, or remove "
                "the handle and patch again"
            )
        else:
            old.remove()
            self._installation = Installation(found, edits, shifts, shifts.values(), begins=old.begins)
            self._installation.strength = old.strength
        for stack in shifts.values():
            if id(stack) not in known:
                optimizers.watch(stack)

    def _check_installed(self) -> None:
        if not self.installed:
            raise PatchStateError("this handle was removed; patch the model again for a new one")

    def __enter__(self) -> Handle:
        self._check_installed()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def stacks_of(shifts: object) -> list[ShiftStack]:
    """A stack, or those of a set. Empty for anything else."""
    return [shifts] if isinstance(shifts, ShiftStack) else shifts.values() if isinstance(shifts, StackSet) else []


def check_new(found: Located, stacks: Sequence[ShiftStack]) -> None:
    """Check that stacks fit a model and are not in it.

    Raises:
        ShapeError: a stack was built for a model of other sizes.
        PatchStateError: a stack is already in the model, or not the same in all processes of the model.
    """
    for stack in stacks:
        if misfit := stack.spec.misfit(found.spec):
            raise ShapeError(f"these shifts do not fit {type(found.model).__name__}: they were built for {misfit}")
    if found.parallel is not None:
        found.parallel.check_same(stacks)
    owners = installed(*found.model.modules())
    there = {id(part) for owner in owners for stack in owner.parts for part in stack.parts}
    if any(id(part) in there for stack in stacks for part in stack.parts):
        raise PatchStateError(
            "these shifts are already in this model; remove their handle first, or build another stack"
        )


def edits_of(found: Located, shifts: ShiftStack | StackSet) -> list[SiteEdit]:
    """The edits of a stack or a set. A set has one for each kind of heads, layer and site.

    Raises:
        UnsupportedModelError: the model is tensor-parallel, and a head needs all attention heads.
    """
    if isinstance(shifts, ShiftStack):
        return [
            SiteEdit(
                layer=head.layer.index,
                site=site,
                # Calling the module instead of its forward takes twice as long, because torch looks for hooks.
                run=head.forward if (run := head.edits()[site]) is head else run,
                shift=head.gated_shift if site == "attn_heads" and head.is_gated_shift else None,
                addition=head.addition() if run is head else None,
                fused=head.fused if site == "attn_heads" else None,
                needs_lse=head.needs_lse and site == "attn_heads",
                needs_positions=head.needs_prompt_end,
                needs_at=head.needs_at,
                positions=positions_at(site, head.config.positions),
                shared=_shared(found, head, site),
            )
            for whole in shifts
            for site in whole.edits()
            for head in (of_process(whole, found.parallel, site),)
        ]
    edits = []
    for kind, stacks in kinds(shifts.values()).items():
        heads = {head.layer.index: head for stack in reversed(stacks) for head in stack}
        edits += [
            SiteEdit(
                layer=layer,
                site=site,
                run=of_process(head, found.parallel, site).edits()[site],
                needs_lse=head.needs_lse and site == "attn_heads",
                needs_positions=head.needs_prompt_end,
                needs_at=head.needs_at,
                positions=positions_at(site, head.config.positions),
                picks=Mixed(kind, layer, site, found.parallel),
                shared=_shared(found, head, site),
            )
            for layer, head in sorted(heads.items())
            for site in head.edits()
        ]
    return edits


def _shared(found: Located, head: ShiftHead, site: Site) -> Callable[[Tensor], Tensor] | None:
    parallel = found.parallel
    return parallel.shared if parallel is not None and parallel.splits(head.layer.index, site) else None


def positions_at(site: Site, positions: object) -> Positions | Tensor:
    """Return `positions`, if an edit at the site can be limited to them."""
    checked = check_mask(positions, "positions") if isinstance(positions, Tensor) else check_positions(positions)
    if isinstance(checked, Tensor) or checked != "all":
        check_token_site(site)
    return checked
