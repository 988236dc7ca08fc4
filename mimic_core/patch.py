"""Put shift heads or functions into a model, and remove them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import optimizers
from .adapters import Handed, locate, unwrap
from .averaging import Averaging
from .edits import Installation, SiteEdit, installed
from .errors import UnsupportedModelError, WrongTypeError
from .handle import Handle, check_new, edits_of, positions_at, stacks_of
from .heads import ShiftStack, StackSet
from .heads.stack import check_stack
from .positions import Positions
from .samples import check_strength
from .types import SITES, At, Located, check_site


def patch(
    model: nn.Module,
    shifts: ShiftStack | StackSet | DistributedDataParallel,
    strength: float | Float[Tensor, ""] = 1.0,
    *,
    adapter: Handed = None,
) -> Handle:
    """Put a stack of shift heads into a model, or a set of stacks of which each sample gets its own.

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

    A DistributedDataParallel or fully_shard around a module that holds the stack does the same. A forward with
    gradients raises PatchStateError if it runs in a DistributedDataParallel that does not hold the stack.

    Args:
        shifts: The stack, or a `StackSet`. With a set, run the model inside `handle.using(...)`.
        strength: See `Handle.strength`.
        adapter: See `adapter_for`.

    Raises:
        WrongTypeError: `shifts` is neither.
        UnsupportedModelError: no adapter fits the model, or it is tensor-parallel and a head needs all attention heads.
        ShapeError: the strength is no number, or the stack was built for a model of other sizes.
        PatchStateError: this stack is already in this model, or in a part of it. Or fully_shard is around the stack
            itself, or the options of its DistributedDataParallel need its forward. Or the model is tensor-parallel, and
            the stack is not the same in all processes. A later forward also raises it if it does not reach one of the
            sites, or if the parameters are still sharded then.
    """
    inner = shifts if isinstance(shifts, StackSet) else check_stack(shifts)
    averaging = Averaging(inner, shifts if isinstance(shifts, DistributedDataParallel) else None)
    found, stacks = locate(model, adapter), stacks_of(inner)
    check_new(found, stacks)
    strength = check_strength(strength)
    handle = Handle(Installation(found, edits_of(found, inner), inner, stacks, begins=averaging))
    handle.strength = strength
    for stack in stacks:
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
    *,
    adapter: Handed = None,
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
        adapter: See `adapter_for`.

    Raises:
        WrongTypeError: `fn` is not callable.
        UnknownNameError: there is no such site, or no such positions.
        ShapeError: `positions` is a tensor, but not a bool mask [b t].
        PatchStateError: the edit is limited to positions at `key`, `value` or `lse`.
        UnsupportedModelError: no adapter fits, or a layer lacks the site. Or the model is tensor-parallel, and each
            process has only its own heads at the site.

    A later forward raises ShapeError if `fn` returns another shape, dtype or device. It raises PatchStateError if `fn`
    returns a value at `lse`, which can only be read, or if the forward does not reach the site.
    """
    if not callable(fn):
        raise WrongTypeError(f"a function (value, at) is needed, found {type(fn).__name__}")
    name = check_site(site)
    found = locate(model, adapter)
    chosen = choose_layers(found, (name,), layers)
    where = positions_at(name, positions)
    if found.parallel is not None and any(found.parallel.splits(layer, name) for layer in chosen):
        raise UnsupportedModelError(
            f"in this tensor-parallel model, each of {found.parallel.size} processes has only its own heads at "
            f"{name!r}, so the function would not see all: read them with mimic_core.capture, which gives all heads, "
            f"or edit them with a ShiftHead that has per_head"
        )
    edits = [SiteEdit(layer, name, fn, needs_positions=True, keeps=True, positions=where) for layer in chosen]
    return Handle(Installation(found, edits))


def choose_layers(found: Located, sites: Iterable[str], layers: Iterable[int] | None) -> list[int]:
    """The given layers, or else every layer that has all the sites.

    Raises:
        UnsupportedModelError: there is none.
    """
    if layers is not None:
        return list(layers)
    wanted = set(sites)
    chosen = [layer.index for layer in found.spec.layers if wanted <= set(layer.sites)]
    if not chosen:
        first = found.spec.layers[0]
        asked = " and ".join(site for site in SITES if site in wanted)
        raise UnsupportedModelError(
            f"{asked} was asked for, which no layer of {type(found.model).__name__} has; layer {first.index} "
            f"({first.path}) has {first.offer()}"
        )
    return chosen
