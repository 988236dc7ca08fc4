"""Types that all modules share: sites, the spec of a model, and `At`, the second argument of an edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .errors import PatchStateError, UnknownNameError, UnsupportedModelError
from .parallel import Parallel
from .positions import Positions, check_positions

Site = Literal[
    "query", "key", "value", "lse", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden"
]
"""A named place in a decoder layer. Shapes, with `b` batch, `t` query positions, `s` key positions,
`h` attention heads, `g` key/value heads, `d` head_dim, `c` hidden size, `f` width of the MLP:

| site | shape | what |
|---|---|---|
| `query` | b h t d | the query that attention gets: after RoPE and q norm, unscaled |
| `key`, `value` | b g s d | after RoPE, k norm and cache update, not repeated to h heads |
| `lse` | b h t | log-sum-exp of the attention logits, natural log; read only |
| `attn_heads` | b t h d | per attention head, before the output projection |
| `attn_out` | b t c | the attention module's output, before the residual addition |
| `mlp_out` | b t c | the MLP module's output, before the residual addition |
| `layer_out` | b t c | the decoder layer's output |
| `layer_in` | b t c | what the decoder layer gets; in layer 0, the embeddings after all that is done with them |
| `mlp_hidden` | b t f | what the last linear layer of the MLP gets: after the activation |
"""

SITES: tuple[Site, ...] = get_args(Site)
ATTENTION_SITES: tuple[Site, ...] = ("query", "key", "value", "lse", "attn_heads")
READ_ONLY_SITES: tuple[Site, ...] = ("lse",)
INPUT_SITES: tuple[Site, ...] = ("layer_in", "mlp_hidden")
"""The sites that are the first argument of their module. The others outside attention are the module's output."""
TOKEN_SITES: tuple[Site, ...] = tuple(site for site in SITES if site not in ("key", "value", "lse"))
"""The sites with one value for each token of the forward. Only there an edit can act at some positions."""


def check_token_site(site: Site) -> None:
    """Check that an edit at `site` can be limited to positions.

    Raises:
        PatchStateError: it is none of `TOKEN_SITES`.
    """
    if site not in TOKEN_SITES:
        raise PatchStateError(
            f"an edit at site {site!r} cannot be limited to positions: its value also holds the tokens of the cache; "
            f"positions are for {', '.join(TOKEN_SITES)}"
        )


def tokens_of(site: Site, value: Tensor) -> tuple[int, int]:
    """b and t of the value of one of `TOKEN_SITES`."""
    return value.shape[0], value.shape[2 if site == "query" else 1]


def check_site(name: object) -> Site:
    """Return `name` as a `Site`.

    Raises:
        UnknownNameError: there is no site of that name.
    """
    for site in SITES:
        if name == site:
            return site
    raise UnknownNameError(f"no site is called {name!r}; the sites of a decoder layer are: {', '.join(SITES)}")


@dataclass(frozen=True)
class LayerSpec:
    """The sizes of one decoder layer, and the sites it has.

    Attributes:
        index: Position in the decoder, from 0.
        path: Module path of the layer in the model it was read from.
        hidden_size: Width of the residual stream.
        heads: Number of attention heads; 0 if the layer has no self-attention.
        kv_heads: Number of key/value heads; it divides `heads`.
        head_dim: Width of a query or key head.
        value_dim: Width of a value head and of an attention head's output.
        sites: The sites of this layer. All can be read, and all but `lse` can be edited.
        missing: Why the layer lacks the other sites.
        mlp_width: Width of `mlp_hidden`; 0 if the layer lacks it.
        run: Which pass of the module at `path` this layer is, from 0, if each pass in a forward counts as a layer.
    """

    index: int
    path: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    sites: tuple[Site, ...]
    missing: str = field(default="", compare=False)
    mlp_width: int = 0
    run: int = 0

    def offer(self) -> str:
        """List the sites and why the others are missing, for an error message."""
        return f"{', '.join(self.sites) or 'no site'}{f': {self.missing}' if self.missing else ''}"


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model's text decoder, layer by layer."""

    model_type: str
    hidden_size: int
    layers: tuple[LayerSpec, ...]

    def misfit(self, other: ModelSpec) -> str | None:
        """Say why shift heads built for this spec do not fit `other`. None means that they fit."""
        if len(self.layers) != len(other.layers):
            return (
                f"{len(self.layers)} decoder layers ({self.model_type}), not {len(other.layers)} ({other.model_type})"
            )
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            known = ("mlp_width",) if ours.mlp_width and theirs.mlp_width else ()
            for size in ("hidden_size", "heads", "head_dim", "value_dim", "run", *known):
                if getattr(ours, size) != getattr(theirs, size):
                    return (
                        f"{size} {getattr(ours, size)} in layer {ours.index} ({self.model_type}), not "
                        f"{getattr(theirs, size)} ({other.model_type})"
                    )
        return None


@runtime_checkable
class AttentionAdapter(Protocol):
    """Maps a model family to its sites and sizes.

    An adapter has no state. Any class with these methods is one. At an attention site (`query`, `key`, `value`, `lse`,
    `attn_heads`), `module` must return the module that the model passes to transformers' attention interface. At
    `INPUT_SITES`, the site is the first argument of the module that `module` returns. At the others, it is its output;
    if that is a tuple, its first element.
    """

    def spec(self, model: nn.Module) -> ModelSpec:
        """Sizes and sites of every decoder layer.

        Raises:
            UnsupportedModelError: the model does not have the modules that the adapter expects.
        """
        ...

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module whose forward runs all decoder layers once."""
        ...

    def module(self, model: nn.Module, layer: int, site: Site) -> nn.Module:
        """The module a site belongs to."""
        ...


class Located(NamedTuple):
    """A model without its wrappers, its adapter, the spec that the adapter found, and how it is split.

    `own` says how attention goes in layers where it does not ask transformers' interface: where it calls a function by
    name, or how it was seen to compute.
    """

    model: nn.Module
    adapter: AttentionAdapter
    spec: ModelSpec
    parallel: Parallel | None = None
    own: Mapping[int, Any] = MappingProxyType({})

    def module(self, layer: int, site: Site) -> nn.Module:
        """The module a site belongs to.

        Raises:
            UnsupportedModelError: there is no such layer, or the layer lacks the site.
        """
        layers = self.spec.layers
        if not 0 <= layer < len(layers):
            raise UnsupportedModelError(
                f"layer {layer} was asked for; {type(self.model).__name__} has decoder layers 0 to {len(layers) - 1}"
            )
        if site not in layers[layer].sites:
            raise UnsupportedModelError(
                f"site {site!r} was asked for; layer {layer} ({layers[layer].path}) has {layers[layer].offer()}"
            )
        module = self.adapter.module(self.model, layer, site)
        return unwrapped(module) if site in ATTENTION_SITES else module


# What wrappers whose output is that of the module inside call it: torch.compile, activation checkpointing, FSDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(module: Any) -> Any:
    """The module inside wrappers with the same output. It calls the attention interface, and they do not."""
    while module is not None:
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


class AttentionView(ABC):
    """The arguments of one attention call. `At` gives access to it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scale: float

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """See `At.is_causal`."""

    @property
    @abstractmethod
    def lse(self) -> Tensor:
        """See `At.lse`."""

    @property
    @abstractmethod
    def lse_all_keys(self) -> Tensor:
        """See `At.lse_all_keys`."""

    @property
    @abstractmethod
    def logits(self) -> tuple[str, ...]:
        """See `At.logits`."""


class ForwardView(ABC):
    """The forward in which an edit runs. `At` gives access to it."""

    @property
    def is_guess(self) -> bool:
        """Whether the whole row was taken for the prompt because nobody said more."""
        return False

    @property
    def has_mask(self) -> bool:
        """Whether the caller gave the positions of all edits."""
        return False

    @abstractmethod
    def tokens(self, positions: Positions, b: int, t: int, device: torch.device) -> Tensor:
        """See `At.positions`. The mask is [b t] on `device`."""

    @abstractmethod
    def chosen(self, positions: Positions | Tensor, b: int, t: int, device: torch.device) -> Tensor | None:
        """The tokens [b t] on which an edit with these positions acts. None means all of them."""


class At:
    """Where an edit runs. Every shift head and every hook function gets it as its second argument.

    Attributes:
        layer: Index of the decoder layer.
        site: The site that is edited.
        module: The module the site belongs to.
    """

    __slots__ = ("_attention", "_copies", "_forward", "_value", "layer", "module", "site")

    def __init__(
        self,
        layer: int,
        site: Site,
        module: nn.Module,
        attention: AttentionView | None = None,
        forward: ForwardView | None = None,
        value: Tensor | None = None,
        copies: bool = False,
    ) -> None:
        self.layer = layer
        self.site: Site = site
        self.module = module
        self._attention = attention
        self._forward = forward
        self._value = value
        self._copies = copies  # Whether `key` and `value` may be kept: they are views of the cache.

    def _seen(self, name: str) -> AttentionView:
        if self._attention is None:
            raise PatchStateError(
                f"`at.{name}` was asked for at site {self.site!r} of layer {self.layer}, which is outside the "
                f"attention call; it is available only at {', '.join(ATTENTION_SITES)}"
            )
        return self._attention

    def positions(self, positions: Positions) -> Bool[Tensor, "b t"]:
        """True at the tokens of this forward that `positions` names, such as "prompt" or ("last", 3).

        Inside `handle.at(positions=mask)`, it is that mask, for all names. It is available at all sites but `key`,
        `value` and `lse`, to functions of `hook` and to heads with `needs_prompt_end`.

        Raises:
            UnknownNameError: there are no such positions.
            PatchStateError: the forward does not say where its prompt ends, see `Handle.at`. Also at another site, in a
                head without `needs_prompt_end`, inside torch.compile, or when gradient checkpointing runs a layer
                again, because that is outside a forward.
            ShapeError: the attention mask of the decoder, or the mask that the caller gave, does not fit its tokens.
        """
        if self._forward is None or self._value is None or self.site not in TOKEN_SITES:
            raise PatchStateError(
                f"positions were asked for at site {self.site!r} of layer {self.layer}; they are available at "
                f"{', '.join(TOKEN_SITES)}, to functions of mimic_core.hook and heads with needs_prompt_end = True"
            )
        b, t = tokens_of(self.site, self._value)
        return self._forward.tokens(check_positions(positions), b, t, self._value.device)

    @property
    def prompt_end(self) -> Bool[Tensor, "b t"]:
        """True at the last token of each sample's prompt that is not padding: `positions("prompt_end")`."""
        return self.positions("prompt_end")

    @property
    def query(self) -> Float[Tensor, "b h t d"]:
        """After RoPE, q norm and earlier edits; unscaled."""
        return self._seen("query").query

    @property
    def key(self) -> Float[Tensor, "b g s d"]:
        """After RoPE, k norm, cache update and earlier edits; not repeated to h heads."""
        key = self._seen("key").key
        return key.clone() if self._copies else key

    @property
    def value(self) -> Float[Tensor, "b g s e"]:
        """After the cache update and earlier edits; not repeated to h heads."""
        value = self._seen("value").value
        return value.clone() if self._copies else value

    @property
    def mask(self) -> Any:
        """The mask that attention gets: None, bool (True = attend) or additive, broadcastable to b h t s."""
        return self._seen("mask").mask

    @property
    def scale(self) -> float:
        """Factor on query . key."""
        return self._seen("scale").scale

    @property
    def is_causal(self) -> bool:
        """Whether attention is causal if there is no mask."""
        return self._seen("is_causal").is_causal

    @property
    def lse(self) -> Float[Tensor, "b h t"]:
        """Log-sum-exp of the attention logits over the attended keys, in nats. -inf in a row that attends to no key."""
        return self._seen("lse").lse

    @property
    def lse_all_keys(self) -> Float[Tensor, "b h t"]:
        """The LSE over all keys, also masked ones. The published MimIC code uses this."""
        return self._seen("lse_all_keys").lse_all_keys

    @property
    def logits(self) -> tuple[str, ...]:
        """What the attention logits depend on besides scale, query, key and mask: a softcap, sinks, a window."""
        return self._seen("logits").logits


@runtime_checkable
class LayerStates(Protocol):
    """Hidden states by layer, the arguments of the layer-wise losses. A capture of one site has this form.

    `states` maps a layer to its selected tokens [n c], or to [b t c] if no tokens were selected. `samples` [n] is the
    sample each token comes from, or None if no tokens were selected.
    """

    @property
    def states(self) -> Mapping[int, Float[Tensor, ...]]: ...

    @property
    def samples(self) -> Int[Tensor, " n"] | None: ...
