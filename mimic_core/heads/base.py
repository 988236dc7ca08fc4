"""The base classes of shift heads and their configs, and the registry of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from ..errors import UnknownNameError
from ..positions import Positions, check_positions
from ..registry import Registry
from ..types import At, LayerSpec, Site

Edit = Callable[[Tensor, At], Tensor]


@dataclass(frozen=True)
class HeadConfig:
    """Options of a shift head. A subclass (a frozen dataclass) adds more. Every field must be plain JSON data.

    Attributes:
        layers: Indices of the decoder layers to shift; None means all of them.
        positions: The tokens on which the head acts; see `mimic_core.positions.Positions`.

    Raises:
        UnknownNameError: there are no such positions.
    """

    layers: tuple[int, ...] | None = None
    positions: Positions = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", check_positions(self.positions))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadConfig:
        """The config of a dict made by `to_dict`. Lists become tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(f.name for f in fields(cls))


class Taken(NamedTuple):
    """How a vector of a head is taken from activations, by `mimic_core.estimate`.

    Attributes:
        name: The parameter or buffer that is filled.
        site: The site that is read.
        of: "mean", or "component": the first principal component of all layers together, about zero, of length 1, and
            on the side of the mean. Each layer gets its part.
        pairs: Of the second text's activations minus the first's, instead of one text's.
    """

    name: str
    site: Site
    of: Literal["mean", "component"] = "mean"
    pairs: bool = False


class ShiftHead(nn.Module):
    """A module with learnable parameters that edits a site of one decoder layer.

    A subclass sets `site` (and `config_class`, if it has options). It makes its parameters in `__init__` and returns
    the edited value from `forward`. Parameters are fp32, whatever the dtype of the model. `forward` computes in fp32
    and returns the dtype of its argument.

    Attributes:
        name: The name under which the head is registered.
        site: The site that `forward` edits.
        config_class: The dataclass of its options.
        needs_lse: `forward` reads `at.lse`, so attention should keep the LSE.
        needs_prompt_end: `forward` reads `at.prompt_end` or `at.positions`. A head whose formula is the same for all
            tokens does not need it: its config says on which it acts.
        needs_at: `forward` reads its `At`. If False, it gets None, which saves time.
        is_gated_shift: `site` is `attn_heads`, and `forward` is exactly `ops.gated_shift` with the parameters that
            `gated_shift` returns. Attention and shift are then one call, wherever that gives the same bits.
        takes_samples: All edits also work if each parameter, as `own` returns it, has one more axis in front: one value
            for each sample. In a `StackSet`, such heads run once for a batch. Others run once for each stack.
        per_head: Names of the parameters whose first axis is all attention heads. With it a head says that its formula
            is the same for each attention head. In a tensor-parallel model each process then runs it on its own ones,
            with its slice of these parameters, and `layer.heads` is their number. None: the formula needs all heads.
            Other parameters stay whole, but parameters of modules in the head are not known, so these are refused.
        taken: What `mimic_core.estimate` fills, and from which activations.
    """

    name: ClassVar[str]
    site: Site
    config_class: ClassVar[type[HeadConfig]] = HeadConfig
    needs_lse: bool = False
    needs_prompt_end: bool = False
    needs_at: bool = True
    is_gated_shift: bool = False
    takes_samples: bool = False
    per_head: tuple[str, ...] | None = None
    taken: tuple[Taken, ...] = ()

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.config = config
        self.layer = layer

    def forward(self, value: Tensor, at: At) -> Tensor:
        """Return the edited value, of the same shape, dtype and device as `value`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(value, at)")

    def edits(self) -> Mapping[Site, Edit]:
        """The function for each site. Override this to edit several sites."""
        return {self.site: self}

    def gated_shift(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vector, gate weight and gate bias on the query's device. Needed if `is_gated_shift` is True."""
        raise NotImplementedError(f"{type(self).__name__} has is_gated_shift and must define gated_shift(query)")

    def addition(self) -> Mapping[str, Tensor | None] | None:
        """The parameters, if `site` is the output of a module and `forward` is exactly `ops.norm_preserving_add` with
        `vector` and `scale` of these. It is then called at once. None: the head does something else.
        """
        return None

    def fused(self, at: At) -> Tensor | None:
        """Attention and shift in one call, from `at.query`, `at.key`, `at.value`: [b t h e].

        Called only at `attn_heads`, instead of attention and `forward`. It must give the same result. If it returns
        None, attention and `forward` run.
        """
        return None

    def constant(self) -> Mapping[Site, Tensor] | None:
        """The vector of each site, if all the head does is to add these: then `mimic_core.merge` takes it.

        It is [h e] at `attn_heads`, and [c] at `attn_out` and `mlp_out`. None: the head does something else.
        """
        return None

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Fill the parameters and buffers that `taken` names; called without gradient."""
        for name, x in values.items():
            own = self.own(name)
            own.copy_(x.view_as(own))

    def own(self, name: str) -> Tensor:
        """A parameter or buffer by name. This is 4 times faster than the attribute, which matters in decoding."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def extra_repr(self) -> str:
        return f"layer={self.layer.index}"


def reading(head: ShiftHead, parameters: Mapping[str, Tensor | None], **changes: Any) -> ShiftHead:
    """The same head, but `own` finds these parameters in place of its own. Attributes can differ too."""
    twin = object.__new__(type(head))
    twin.__dict__ = {**head.__dict__, **changes, "_parameters": parameters}
    return twin


_HEADS: Registry[type[ShiftHead]] = Registry("shift head", group="mimic_core.heads")


def register_head(name: str) -> Callable[[type[ShiftHead]], type[ShiftHead]]:
    """Class decorator that registers a `ShiftHead` under a name, for `build_shifts` and `load_shifts`.

    A package can also declare an entry point in the group `mimic_core.heads`.

    Raises:
        ValueError: another head has the name.
    """

    def add(head: type[ShiftHead]) -> type[ShiftHead]:
        _HEADS.register(name)(head)
        head.name = name
        return head

    return add


def head_class(name: str) -> type[ShiftHead]:
    """The shift head registered under `name`.

    Raises:
        UnknownNameError: there is none.
    """
    head = _HEADS.get(name)
    if "name" not in vars(head):  # from an entry point, without the decorator
        head.name = name
    return head


def head_for_config(config: HeadConfig) -> type[ShiftHead]:
    """The registered shift head with this `config_class`.

    Raises:
        UnknownNameError: there is none, or the class is `HeadConfig`, which all heads without options share.
    """
    if type(config) is not HeadConfig:
        for name in _HEADS:
            if head_class(name).config_class is type(config):
                return head_class(name)
    raise UnknownNameError(
        f"no registered shift head has {type(config).__name__} as its own config class; registered: "
        f"{', '.join(_HEADS)}; register the head, or name it: build_shifts(model, 'name')"
    )
