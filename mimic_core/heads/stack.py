"""A stack: one shift head for each chosen decoder layer. It is what is trained, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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
    def parts(self) -> tuple[ShiftStack, ...]:
        """The stacks of a stack that was built of several heads; otherwise itself."""
        return (self,)

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

    def save_pretrained(
        self, path: str | os.PathLike[str], *, license: str | None = None, training: str | None = None
    ) -> None:
        """Write the stack to a directory, as `mimic_core.save_shifts`, with a model card in its `README.md`.

        A `README.md` that is there is not replaced.

        Args:
            license: For the card: an identifier of the Hub, such as "apache-2.0".
            training: For the card: how the stack was trained, as Markdown.

        Raises:
            CheckpointError: as `save_shifts`.
        """
        files.save_pretrained(self, path, license=license, training=training)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        training: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add shifts",
        token: str | bool | None = None,
    ) -> str:
        """Upload the two files of `mimic_core.save_shifts` and a model card to the Hugging Face Hub.

        The card names the base model, if that has a name on the Hub: the Hub then lists this repository under it. A
        card that is there is not replaced. Repository and branch are created if they do not exist.

        Args:
            license, training: As in `save_pretrained`.
            private: Whether a new repository is private. None: what your account does by default.
            revision: The branch.
            token: None: that of `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: as `save_shifts`. Errors of the Hub are those of huggingface_hub.
        """
        return files.push_to_hub(
            self,
            repo_id,
            license=license,
            training=training,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
        )

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], model: nn.Module, **options: Any) -> ShiftStack:
        """`mimic_core.load_shifts`, with its options (`revision`, `strict`, `token`, `cache_dir`)."""
        return files.load(source, model, **options)

    def forward(self, *args: object, **kwargs: object) -> list[Tensor]:
        """A stack is not called. It acts in the model that it is patched into.

        Raises:
            PatchStateError: always.
        """
        if args and args[0] is FORWARD_BEGINS:
            return [x.view_as(x) for x in self.parameters() if x.requires_grad]
        raise PatchStateError("a ShiftStack is not called; put it into a model with mimic_core.patch(model, shifts)")


def single(shifts: object, what: str) -> ShiftStack:
    """The stack, of one kind of heads.

    Raises:
        WrongTypeError: it is none, or composed of several.
    """
    stack = check_stack(shifts)
    if stack.parts[0] is not stack:
        raise WrongTypeError(f"{what} takes a stack of one head, found {stack.name!r}: give its parts, shifts.parts[0]")
    return stack


# What saves and loads stacks: `mimic_core.checkpoint` puts it here, because an import only points down.
files: Any = None


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
