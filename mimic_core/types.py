"""Words shared by every module: sites, specs of a model's layers, and what an edit is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .errors import PatchStateError, UnknownNameError, UnsupportedModelError

Site = Literal["query", "key", "value", "lse", "attn_heads", "attn_out", "mlp_out", "layer_out"]
"""A named place in a decoder layer. Shapes, with `b` batch, `t` query positions, `s` key positions,
`h` attention heads, `g` key/value heads, `d` head_dim, `c` hidden size:

| site | shape | what |
|---|---|---|
| `query` | b h t d | as attention sees it: after RoPE and q norm, unscaled |
| `key`, `value` | b g s d | after RoPE, k norm and cache update, not repeated to h heads |
| `lse` | b h t | log-sum-exp of the attention logits, natural log; read only |
| `attn_heads` | b t h d | per attention head, before the output projection |
| `attn_out` | b t c | the attention module's output, before the residual addition |
| `mlp_out` | b t c | the MLP module's output, before the residual addition |
| `layer_out` | b t c | the decoder layer's output |
"""

SITES: tuple[Site, ...] = get_args(Site)
ATTENTION_SITES: tuple[Site, ...] = ("query", "key", "value", "lse", "attn_heads")
READ_ONLY_SITES: tuple[Site, ...] = ("lse",)
PROMPT_SITES: tuple[Site, ...] = ("attn_heads", "attn_out", "mlp_out", "layer_out")


def check_site(name: object) -> Site:
    """`name` as a site.

    Raises:
        UnknownNameError: there is no such site.
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
        heads: Attention heads; 0 where the layer has no self-attention.
        kv_heads: Key/value heads; divides `heads`.
        head_dim: Width of a query or key head.
        value_dim: Width of a value head, so of an attention head's output.
        sites: The sites that can be read (all but `lse` can be edited).
        missing: Why the others can't, in words.
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

    def offer(self) -> str:
        """The sites there are and why the others aren't, for an error."""
        return f"{', '.join(self.sites) or 'no site'}{f': {self.missing}' if self.missing else ''}"


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model's text decoder, layer by layer."""

    model_type: str
    hidden_size: int
    layers: tuple[LayerSpec, ...]

    def misfit(self, other: ModelSpec) -> str | None:
        """Why shift heads sized for this spec don't fit another; None: they do."""
        if len(self.layers) != len(other.layers):
            return (
                f"{len(self.layers)} decoder layers ({self.model_type}), not {len(other.layers)} ({other.model_type})"
            )
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            for size in ("hidden_size", "heads", "head_dim", "value_dim"):
                if getattr(ours, size) != getattr(theirs, size):
                    return (
                        f"{size} {getattr(ours, size)} in layer {ours.index} ({self.model_type}), not "
                        f"{getattr(theirs, size)} ({other.model_type})"
                    )
        return None


@runtime_checkable
class AttentionAdapter(Protocol):
    """Maps a model family to its sites and sizes. Stateless; any class with these methods will do.

    An attention site (`query`, `key`, `value`, `lse`, `attn_heads`) is reached through transformers' attention
    interface, so its module must be the one that interface is handed. The other sites are the output of their module
    (the first element, where that is a tuple).
    """

    def spec(self, model: nn.Module) -> ModelSpec:
        """Sizes and sites of every decoder layer.

        Raises:
            UnsupportedModelError: the model is not laid out as the adapter expects.
        """
        ...

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module whose forward runs all decoder layers once."""
        ...

    def module(self, model: nn.Module, layer: int, site: Site) -> nn.Module:
        """The module a site belongs to."""
        ...


class Located(NamedTuple):
    """A model without its wrappers, its adapter, and what the adapter says of it: asked once, then handed on."""

    model: nn.Module
    adapter: AttentionAdapter
    spec: ModelSpec

    def module(self, layer: int, site: Site) -> nn.Module:
        """The module a site belongs to.

        Raises:
            UnsupportedModelError: there is no such layer, or it lacks the site.
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
        return self.adapter.module(self.model, layer, site)


class AttentionView(ABC):
    """What attention saw in one call; reached through `At`."""

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
    """What is known of the forward an edit runs in; reached through `At`."""

    @abstractmethod
    def prompt_end(self, value: Tensor) -> Tensor:
        """See `At.prompt_end`; `value` is the site's, of which the sizes and the device are taken."""


class At:
    """Where an edit runs: the second argument of every shift head and hook function.

    Attributes:
        layer: Index of the decoder layer.
        site: The site being edited.
        module: The module the site belongs to.
    """

    __slots__ = ("_attention", "_forward", "_value", "layer", "module", "site")

    def __init__(
        self,
        layer: int,
        site: Site,
        module: nn.Module,
        attention: AttentionView | None = None,
        forward: ForwardView | None = None,
        value: Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.site: Site = site
        self.module = module
        self._attention = attention
        self._forward = forward
        self._value = value

    def _seen(self, name: str) -> AttentionView:
        if self._attention is None:
            raise PatchStateError(
                f"`at.{name}` was asked for at site {self.site!r} of layer {self.layer}, which is outside the "
                f"attention call; it is there only at {', '.join(ATTENTION_SITES)}"
            )
        return self._attention

    @property
    def prompt_end(self) -> Bool[Tensor, "b t"]:
        """True at the last token of each sample's prompt, padding aside; nowhere while a cache is continued.

        It is there at `attn_heads`, `attn_out`, `mlp_out` and `layer_out`, for functions of `hook` and heads with
        `needs_prompt_end`. A forward that continues a cache with tokens in it is taken for decoding.

        Raises:
            PatchStateError: asked for at another site, by a head without `needs_prompt_end`, inside torch.compile, or
                where gradient checkpointing runs a layer again, which is outside any forward.
            ShapeError: the attention mask given to the decoder doesn't fit its tokens.
        """
        if self._forward is None or self._value is None or self.site not in PROMPT_SITES:
            raise PatchStateError(
                f"`at.prompt_end` was asked for at site {self.site!r} of layer {self.layer}; it is there at "
                f"{', '.join(PROMPT_SITES)}, for functions of mimic_core.hook and heads with needs_prompt_end = True"
            )
        return self._forward.prompt_end(self._value)

    @property
    def query(self) -> Float[Tensor, "b h t d"]:
        """After RoPE, q norm and earlier edits; unscaled."""
        return self._seen("query").query

    @property
    def key(self) -> Float[Tensor, "b g s d"]:
        """After RoPE, k norm, cache update and earlier edits; not repeated to h heads."""
        return self._seen("key").key

    @property
    def value(self) -> Float[Tensor, "b g s e"]:
        """After the cache update and earlier edits; not repeated to h heads."""
        return self._seen("value").value

    @property
    def mask(self) -> Any:
        """The attention's own mask: None, bool (True = attend) or additive, broadcastable to b h t s."""
        return self._seen("mask").mask

    @property
    def scale(self) -> float:
        """Factor on query . key."""
        return self._seen("scale").scale

    @property
    def is_causal(self) -> bool:
        """Whether a missing mask means causal."""
        return self._seen("is_causal").is_causal

    @property
    def lse(self) -> Float[Tensor, "b h t"]:
        """Log-sum-exp of the attention logits over the attended keys, in nats; -inf where a row attends to none."""
        return self._seen("lse").lse

    @property
    def lse_all_keys(self) -> Float[Tensor, "b h t"]:
        """The same over all keys, masked ones included: what the published MimIC code uses."""
        return self._seen("lse_all_keys").lse_all_keys

    @property
    def logits(self) -> tuple[str, ...]:
        """What enters the attention logits beside scale, query and key, in words: a softcap, sinks, a window, ..."""
        return self._seen("logits").logits


@runtime_checkable
class LayerStates(Protocol):
    """Hidden states by layer, as the layer-wise losses take them; a one-site capture is one.

    `states` maps a layer to its tokens [n c] (or [b t c] where nothing was selected); `samples`
    [n] names the sample each token came from, None where nothing was selected.
    """

    @property
    def states(self) -> Mapping[int, Float[Tensor, ...]]: ...

    @property
    def samples(self) -> Int[Tensor, " n"] | None: ...
