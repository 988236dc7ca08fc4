"""The registry of adapters, and `PathAdapter`, which consists of module paths."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from torch import nn

from ..errors import UnsupportedModelError
from ..registry import Registry
from ..types import ATTENTION_SITES, SITES, AttentionAdapter, LayerSpec, ModelSpec, Site
from .probe import Example, Probe, probe_attention

ADAPTERS: Registry[type[AttentionAdapter]] = Registry("adapter", group="mimic_core.adapters")
A = TypeVar("A", bound="type[AttentionAdapter]")


def register_adapter(*model_types: str, for_class: str | type[nn.Module] | None = None) -> Callable[[A], A]:
    """Class decorator that registers an adapter for one or more `config.model_type`s, or for a class of models.

        @register_adapter(for_class="litgpt.model.GPT")

    Of several classes, the nearest one among the bases of the model's class counts, before its model type. A package
    can also declare an entry point in the group `mimic_core.adapters`, with the model type or the class as its name.

    Args:
        for_class: The class or its dotted name. The name does not import its module.

    Raises:
        ValueError: neither a model type nor a class is given, or one already has another adapter.
    """
    of_class = () if for_class is None else (for_class if isinstance(for_class, str) else dotted(for_class),)
    return ADAPTERS.register(*model_types, *of_class)  # pyright: ignore[reportReturnType]


def dotted(kind: type) -> str:
    """The name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_of(model: nn.Module) -> type:
    """The class of a model: `fully_shard` puts one of its own on top."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def name_of(model: nn.Module) -> str:
    """What a spec and a file call a model: by `config.model_type`, or else by its class."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type if isinstance(model_type, str) else dotted(class_of(model))


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is a `PreTrainedModel`, also one whose code came with its weights."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def text_config(model: nn.Module) -> Any:
    """The config of a transformers model's text decoder. None for others."""
    get: Any = getattr(getattr(model, "config", None), "get_text_config", None)
    return get(decoder=True) if callable(get) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT, DistributedDataParallel and `torch.compile` wrappers."""
    while True:
        if callable(get_base_model := getattr(model, "get_base_model", None)):
            model = cast(nn.Module, get_base_model())
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def text_decoder(model: nn.Module) -> nn.Module:
    """The text decoder according to transformers, or else the model itself."""
    get = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    if not isinstance(found, nn.Module) or found not in set(model.modules()):
        return model
    # In some models, get_decoder returns the matrix that turns hidden states into logits.
    return found if any(isinstance(m, nn.ModuleList) for m in found.modules()) else model


def parts_of(layer: nn.Module) -> list[nn.Module]:
    """The layer. Or its members, if it is a list without a forward: a norm, an attention or MLP, the addition."""
    return [m for m in layer if m is not None] if isinstance(layer, nn.ModuleList) else [layer]


class PathAdapter:
    """An adapter made of module paths: of the decoder's layers, and of attention and MLP in a layer.

    This is enough for a model whose attention goes through transformers' attention interface:

        @register_adapter("my_vlm")
        class MyVLM(PathAdapter):
            layers, attention, mlp = "model.language_model.layers", "self_attn", "mlp"

    It is enough for models that are not of transformers too, with fewer `sites` if their attention is not seen:

        @register_adapter(for_class="litgpt.model.GPT")
        class LitGPT(PathAdapter):
            layers, attention, mlp, down = "transformer.h", "attn", "mlp", "proj"

    Attributes:
        layers: Path of the decoder's list of layers in the model with its language-model head. It is also found in the
            base model without the head.
        attention: Path of the self-attention module in a layer.
        mlp: Path of the MLP module in a layer.
        down: Path of the last linear layer in the MLP, whose output is the MLP's. Layers without it lack `mlp_hidden`.
        sites: The sites of the family: fewer than all if its attention does not go through the interface.
        config: Path of the decoder's config in the model's config, if `config.get_text_config` gives another one.
        example: As in `GenericAdapter`, where the sizes are in no config and the model does not run on ids alone.
    """

    layers: ClassVar[str]
    attention: ClassVar[str] = "self_attn"
    mlp: ClassVar[str] = "mlp"
    down: ClassVar[str] = "down_proj"
    sites: ClassVar[tuple[Site, ...]] = SITES
    config: ClassVar[str] = ""
    example: Example | None = None

    def spec(self, model: nn.Module) -> ModelSpec:
        model = unwrap(model)
        config: Any = attrgetter(f"config.{self.config}")(model) if self.config else text_config(model)
        path = self._layers_path(model)
        layers = self._resolve(model, path)
        if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) == 0:
            raise UnsupportedModelError(
                f"{type(self).__name__} expects a non-empty ModuleList or Sequential at {path!r} of "
                f"{type(model).__name__}, found {type(layers).__name__}"
            )
        named = all(hasattr(config, name) for name in ("hidden_size", "num_attention_heads"))
        seen = None
        if not named:
            attends = set(self.sites) & set(ATTENTION_SITES)
            paths = [f"{path}.{index}.{self.attention}" for index in range(len(layers))] if attends else []
            seen = probe_attention(model, self.decoder(model), self.example, paths)
        specs = []
        members = list(layers)
        for index, layer in enumerate(members):
            # A module that is there several times has several passes.
            where, run = f"{path}.{members.index(layer)}", members[:index].count(layer)
            attention = self._attention_of(layer, where)
            sizes = _sizes_in(config, attention) if seen is None else self._sizes_seen(seen, where)
            specs.append(LayerSpec(index, where, *sizes, *self._hidden_of(layer), run))
        return ModelSpec(name_of(model), specs[0].hidden_size, tuple(specs))

    def decoder(self, model: nn.Module) -> nn.Module:
        model = unwrap(model)
        path = self._layers_path(model)
        found = None
        while found is None or isinstance(found, nn.ModuleList | nn.ModuleDict):  # these have no forward
            path = path.rpartition(".")[0]
            found = self._resolve(model, path)
        return found

    def module(self, model: nn.Module, layer: int, site: Site) -> nn.Module:
        model = unwrap(model)
        block = self._resolve(model, f"{self._layers_path(model)}.{layer}")
        if site in ("layer_out", "layer_in"):
            return block
        paths: dict[Site, str] = {"mlp_out": self.mlp, "mlp_hidden": f"{self.mlp}.{self.down}"}
        return self._resolve(block, paths.get(site, self.attention))

    def _layers_path(self, model: nn.Module) -> str:
        # The base model and the model with a head have the same type. The latter holds the former under this prefix.
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        bare = getattr(model, "base_model", None) is model
        return self.layers.removeprefix(prefix) if bare else self.layers

    def _hidden_of(self, layer: nn.Module) -> tuple[tuple[Site, ...], str, int]:
        """The sites of a layer, why it lacks others, and the width of `mlp_hidden`."""
        if "mlp_hidden" not in self.sites:
            return self.sites, "", 0
        width = getattr(dict(layer.named_modules()).get(f"{self.mlp}.{self.down}"), "in_features", None)
        if isinstance(width, int):
            return self.sites, "", width
        why = f"{self.mlp} has no linear layer {self.down}"
        return tuple(site for site in self.sites if site != "mlp_hidden"), why, 0

    def _attention_of(self, layer: nn.Module, path: str) -> nn.Module:
        attention = self._resolve(layer, self.attention)
        self._resolve(layer, self.mlp)
        if getattr(attention, "is_cross_attention", False):
            raise UnsupportedModelError(
                f"{path}.{self.attention} is cross-attention, but shifts are only for self-attention; set `attention` "
                f"to the path of the self-attention module"
            )
        return attention

    def _sizes_seen(self, seen: Probe, path: str) -> _Sizes:
        """The sizes of the tensors in a forward, for a config without the usual names."""
        shapes = seen.outputs.get(path, [])
        shape = shapes[0] if shapes else None
        if shape is None:
            raise UnsupportedModelError(f"{path} returned no tensor in a forward on text, so its size is unknown")
        if len(shape) != 3 or shape[0] != seen.tokens[0]:
            raise UnsupportedModelError(f"{path} returned {list(shape)} for b t = {list(seen.tokens)}, not [b t c]")
        calls = seen.attention.get(f"{path}.{self.attention}", [])
        if not calls and set(self.sites) & set(ATTENTION_SITES):
            raise UnsupportedModelError(
                f"{path}.{self.attention} does not go through transformers' attention interface, and can't be followed "
                f"({seen.odd.get(f'{path}.{self.attention}', 'it is not the innermost module that attends')}), so "
                f"{type(self).__name__} can't have {', '.join(ATTENTION_SITES)}: leave them out of its `sites`"
            )
        heads = (calls[0].heads, calls[0].kv_heads, calls[0].head_dim, calls[0].value_dim) if calls else (0, 0, 0, 0)
        return _Sizes(shape[-1], *heads)

    def _resolve(self, root: nn.Module, path: str) -> nn.Module:
        try:
            return root.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(self).__name__} expects a module at {path!r} of {type(root).__name__}, but there is none; "
                f"its children are {', '.join(name for name, _ in root.named_children())}"
            ) from error


class _Sizes(NamedTuple):
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def _sizes_in(config: Any, attention: nn.Module) -> _Sizes:
    hidden_size, heads_in_config = int(config.hidden_size), int(config.num_attention_heads)
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    head_dim = int(head_dim or hidden_size // heads_in_config)
    # The widths of the projections are reliable. A config may leave out sizes that follow from others.
    heads = _width(attention, "q_proj", heads_in_config * head_dim) // head_dim
    kv_in_config = int(getattr(config, "num_key_value_heads", None) or heads)
    kv_heads = _width(attention, "k_proj", kv_in_config * head_dim) // head_dim
    value_dim = _width(attention, "v_proj", kv_heads * head_dim) // kv_heads
    return _Sizes(hidden_size, heads, kv_heads, head_dim, value_dim)


def _width(attention: nn.Module, projection: str, otherwise: int) -> int:
    return int(getattr(getattr(attention, projection, None), "out_features", otherwise))
