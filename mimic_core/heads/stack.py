"""A stack: one shift head for each chosen decoder layer. It is what is trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import PatchStateError, ShapeError, UnsupportedModelError, WrongTypeError
from ..origins import Origin
from ..types import LayerSpec, ModelSpec
from .base import HeadConfig, ShiftHead

# With this as its argument, a stack is called by the DistributedDataParallel around it: see `averaging`.
FORWARD_BEGINS = object()


class ShiftStack(nn.Module):
    """Shift heads by decoder layer. `stack[3]` is the head of layer 3; `stack.layers` lists the layers with a head.

    `parameters()` are exactly the learnable parameters. The model is not part of the stack.

    Args:
        head: The registered head class.
        config: Its options.
        spec: The spec of the model, which gives the sizes of the heads.
        origin: The model they are made for; None: not known.

    Raises:
        ShapeError: the config is of another class, or `config.layers` names a layer twice or one that the model lacks.
        UnsupportedModelError: a chosen layer lacks a site of the head. If `config.layers` is None, layers that lack the
            site (linear attention in a hybrid decoder) get no head, and the error comes only if no layer is left.
    """

    def __init__(
        self, head: type[ShiftHead], config: HeadConfig, spec: ModelSpec, origin: Origin | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, head.config_class):
            raise ShapeError(f"{head.__name__} takes a {head.config_class.__name__}, found a {type(config).__name__}")
        self.name = head.name
        self.config = config
        self.spec = spec
        self.origin = origin
        heads = [head(config, layer) for layer in _choose(config, spec)]
        fitting = [h for h in heads if not _missing(h)]
        if not fitting or (config.layers is not None and len(fitting) < len(heads)):
            at_fault = next(h for h in heads if _missing(h))
            raise UnsupportedModelError(
                f"{head.__name__} edits {', '.join(_missing(at_fault))}, which layer {at_fault.layer.index} "
                f"({at_fault.layer.path}) doesn't have; it has {at_fault.layer.offer()}"
            )
        self.heads = nn.ModuleDict({str(h.layer.index): h for h in fitting})

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers that have a head, in order."""
        return tuple(int(index) for index in self.heads)

    def __getitem__(self, layer: int) -> ShiftHead:
        head = self.heads[str(layer)]
        assert isinstance(head, ShiftHead)
        return head

    def __iter__(self) -> Iterator[ShiftHead]:
        return (self[layer] for layer in self.layers)

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, *args: object, **kwargs: object) -> list[Tensor]:
        """A stack is not called. It acts in the model that it is patched into.

        Raises:
            PatchStateError: always.
        """
        if args and args[0] is FORWARD_BEGINS:
            return [x.view_as(x) for x in self.parameters() if x.requires_grad]
        raise PatchStateError("a ShiftStack is not called; put it into a model with mimic_core.patch(model, shifts)")


def check_stack(shifts: object) -> ShiftStack:
    """The stack, which may be inside DistributedDataParallel.

    Raises:
        WrongTypeError: it is no stack.
    """
    inner = shifts.module if isinstance(shifts, DistributedDataParallel) else shifts
    if not isinstance(inner, ShiftStack):
        raise WrongTypeError(
            f"a ShiftStack is needed, found {type(inner).__name__}: make one with mimic_core.build_shifts or "
            f"mimic_core.load_shifts"
        )
    return inner


def _choose(config: HeadConfig, spec: ModelSpec) -> list[LayerSpec]:
    if config.layers is None:
        return list(spec.layers)
    known = len(spec.layers)
    if not config.layers or len(set(config.layers)) < len(config.layers) or not set(config.layers) <= set(range(known)):
        raise ShapeError(
            f"layers should be distinct indices from 0 to {known - 1} ({spec.model_type} has {known} decoder layers), "
            f"or None for all; found {list(config.layers)}"
        )
    return [spec.layers[index] for index in sorted(config.layers)]


def _missing(head: ShiftHead) -> list[str]:
    return [site for site in head.edits() if site not in head.layer.sites]
