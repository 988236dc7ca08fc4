"""What a shift head is: a config, and a module that edits one site (or a few) of one decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import UnknownNameError
from ..registry import Registry
from ..types import At, LayerSpec, Site

Edit = Callable[[Tensor, At], Tensor]


@dataclass(frozen=True)
class HeadConfig:
    """Options of a shift head. Subclass it (frozen) to add more; every field must be plain JSON data.

    Attributes:
        layers: Indices of the decoder layers to shift; None is all of them.
    """

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadConfig:
        """The config that `to_dict` described: JSON's lists are tuples again."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(f.name for f in fields(cls))


class ShiftHead(nn.Module):
    """Edits a site of one decoder layer; the only owner of learnable parameters.

    A subclass sets `site` (and `config_class`, if it has options), makes its parameters in `__init__` and returns the
    edited value from `forward`. Parameters are fp32 whatever the model's dtype; `forward` does its maths in fp32 and
    returns the dtype it was given.

    Attributes:
        name: The name it is registered under.
        site: The site `forward` edits.
        config_class: The dataclass of its options.
        needs_lse: `forward` reads `at.lse`, so attention should keep it.
        needs_prompt_end: `forward` reads `at.prompt_end`.
        needs_at: `forward` looks at its `At`; a head that doesn't is given None, which saves making one.
        is_gated_shift: At `attn_heads`, `forward` is `ops.gated_shift` with what `gated_shift` returns, and no more. It
            is then one call with attention, wherever that gives the same bits.
    """

    name: ClassVar[str]
    site: Site
    config_class: ClassVar[type[HeadConfig]] = HeadConfig
    needs_lse: bool = False
    needs_prompt_end: bool = False
    needs_at: bool = True
    is_gated_shift: bool = False

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.config = config
        self.layer = layer

    def forward(self, value: Tensor, at: At) -> Tensor:
        """The edited value: same shape, dtype and device as `value`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(value, at)")

    def edits(self) -> Mapping[Site, Edit]:
        """Which function edits which site. Override it to edit more than one."""
        return {self.site: self}

    def gated_shift(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vector, gate weight and gate bias on the query's device; asked for where `is_gated_shift` is True."""
        raise NotImplementedError(f"{type(self).__name__} has is_gated_shift and must define gated_shift(query)")

    def fused(self, at: At) -> Tensor | None:
        """Attention and shift in one, from `at.query`, `at.key`, `at.value`: [b t h e].

        Only asked for at `attn_heads`, in place of attention and `forward`; must equal them. None: there is no such
        form, `forward` is used.
        """
        return None

    def own(self, name: str) -> Tensor:
        """A parameter or buffer by name, 4 times as fast as by attribute: a decoded token feels it."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def extra_repr(self) -> str:
        return f"layer={self.layer.index}"


_HEADS: Registry[type[ShiftHead]] = Registry("shift head", group="mimic_core.heads")


def register_head(name: str) -> Callable[[type[ShiftHead]], type[ShiftHead]]:
    """Class decorator that makes a `ShiftHead` known by name to `build_shifts` and `load_shifts`.

    A package can also declare an entry point in the group `mimic_core.heads`.

    Raises:
        ValueError: the name belongs to another head.
    """

    def add(head: type[ShiftHead]) -> type[ShiftHead]:
        _HEADS.register(name)(head)
        head.name = name
        return head

    return add


def head_class(name: str) -> type[ShiftHead]:
    """The shift head registered under `name`.

    Raises:
        UnknownNameError: none is.
    """
    head = _HEADS.get(name)
    if "name" not in vars(head):  # it came by an entry point, without the decorator
        head.name = name
    return head


def head_for_config(config: HeadConfig) -> type[ShiftHead]:
    """The registered shift head whose own `config_class` this is.

    Raises:
        UnknownNameError: no registered head has it, or it is the plain `HeadConfig` heads without options share.
    """
    if type(config) is not HeadConfig:
        for name in _HEADS:
            if head_class(name).config_class is type(config):
                return head_class(name)
    raise UnknownNameError(
        f"no registered shift head has a config class of its own {type(config).__name__}; registered: "
        f"{', '.join(_HEADS)}; register the head, or name it: build_shifts(model, 'name')"
    )
