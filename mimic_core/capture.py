"""Record the activations at sites, for all tokens or only some."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .adapters import Handed, locate
from .edits import Installation, SiteEdit
from .errors import PatchStateError, ShapeError, UnknownNameError
from .patch import choose_layers
from .positions import Positions, check_mask, check_positions
from .types import TOKEN_SITES, At, Site, check_site

# Sites whose tensors have the axis of attention heads before that of the tokens.
_TOKENS_FIRST: dict[str, str] = {
    **dict.fromkeys(("query", "key", "value"), "b h t d -> b t h d"),
    "lse": "b h t -> b t h",
}


class Capture:
    """The activations of one forward: `capture["mlp_out"][5]` is that of layer 5. See `mimic_core.capture`.

    A capture of one site also has `states`, and the layer-wise losses take it directly.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Iterable[str],
        where: Bool[Tensor, "b t"] | Positions | None = None,
        layers: Iterable[int] | None = None,
        grad: bool = True,
        *,
        adapter: Handed = None,
    ) -> None:
        names: list[Site] = [check_site(s) for s in ([sites] if isinstance(sites, str) else sites)]
        if not names or len(set(names)) < len(names):
            raise UnknownNameError(f"capture needs distinct sites, at least one; found {names}")
        self._where: Tensor | Positions | None = check_where(where)
        self._samples: Tensor | None = None
        by_name = where is not None and not isinstance(where, Tensor)
        if by_name and (odd := [name for name in names if name not in TOKEN_SITES]):
            raise PatchStateError(
                f"where={where!r} is for {', '.join(TOKEN_SITES)}, but {', '.join(odd)} was asked for: give a mask"
            )
        self._grad = grad
        self._taken: dict[Site, dict[int, Tensor]] = {name: {} for name in names}
        self._found = locate(model, adapter)
        chosen = choose_layers(self._found, names, layers)
        keeps = where is None  # A selection is a copy.
        self._edits = [
            SiteEdit(layer, name, partial(self._take, name), needs_positions=by_name, keeps=keeps)
            for name in names
            for layer in chosen
        ]
        self._installation: Installation | None = None

    def __enter__(self) -> Capture:
        if self._installation is not None or any(self._taken.values()):
            raise PatchStateError("a capture can be entered only once; make a new one with mimic_core.capture(...)")
        self._thread = threading.get_ident()
        self._installation = Installation(self._found, self._edits, thread=self._thread)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installation is not None:
            self._installation.remove()

    def __getitem__(self, site: str) -> Mapping[int, Float[Tensor, ...]]:
        """The activations of a site, by layer.

        Raises:
            UnknownNameError: the capture does not record this site.
            PatchStateError: no forward has run.
        """
        if site not in self._taken:
            raise UnknownNameError(f"this capture holds {', '.join(self._taken)}, not {site!r}")
        taken = self._taken[check_site(site)]
        if not taken:
            raise PatchStateError(
                f"nothing was captured at {site!r}: run the model inside the `with`, in the same thread, and "
                f"uncompiled, because code made by torch.compile is not captured"
            )
        return taken

    @property
    def states(self) -> Mapping[int, Float[Tensor, ...]]:
        """The activations of a capture of one site, by layer.

        Raises:
            PatchStateError: the capture holds several sites, or no forward has run.
        """
        if len(self._taken) > 1:
            raise PatchStateError(f"this capture holds {', '.join(self._taken)}; choose one with capture[site]")
        return self[next(iter(self._taken))]

    @property
    def samples(self) -> Int[Tensor, " n"] | None:
        """The index of the sample each captured token comes from; None without `where`."""
        where = self._where
        return where.nonzero()[:, 0] if isinstance(where, Tensor) else self._samples

    def _take(self, site: Site, value: Tensor, at: At) -> None:
        installation = self._installation
        if threading.get_ident() != self._thread:
            return  # a forward of another thread
        run = None if installation is None else installation.state.here.run
        if run is None:
            return  # gradient checkpointing runs the layer a second time, in its backward
        taken = self._taken[site]
        if at.layer in taken:
            raise PatchStateError(
                f"this capture already holds {site!r} of layer {at.layer}: one capture is for one forward; open "
                f"another, or read every step of a generation with mimic_core.hook"
            )
        if self._grad and run.has_grad and not torch.is_grad_enabled():
            raise PatchStateError(
                f"the forward runs with gradients, layer {at.layer} without: with reentrant gradient checkpointing, or "
                f"in the first passes of a model that loops, the capture would have no gradient; use "
                f"gradient_checkpointing_kwargs={{'use_reentrant': False}}, or capture(..., grad=False)"
            )
        value = value if self._grad else value.detach()
        parallel = self._found.parallel
        if parallel is not None and parallel.splits(at.layer, site):
            value = parallel.whole(value, site)
        taken[at.layer] = self._select(site, value, at)

    def _select(self, site: Site, value: Tensor, at: At) -> Tensor:
        where = self._where
        if where is None:
            return value
        if not isinstance(where, Tensor):
            where = at.positions(where)
            self._samples = where.nonzero()[:, 0] if self._samples is None else self._samples
        tokens_first = rearrange(value, _TOKENS_FIRST[site]) if site in _TOKENS_FIRST else value
        if tokens_first.shape[:2] != where.shape:
            raise ShapeError(
                f"where is [b t] = {list(where.shape)}, site {site!r} of layer {at.layer} holds "
                f"{list(tokens_first.shape[:2])} tokens"
            )
        # Gradient checkpointing counts the tensors that a layer saves, and the second run has no capture. So these
        # hooks hide from it what the selection saves.
        with torch.autograd.graph.saved_tensors_hooks(_keep, _keep):
            return tokens_first[where.to(value.device)]


def check_where(where: object) -> Tensor | Positions | None:
    """Return `where`, if it is None, a bool mask or positions."""
    if where is None or isinstance(where, Tensor):
        return None if where is None else check_mask(where, "where")
    return check_positions(where)


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def capture(
    model: nn.Module,
    sites: str | Iterable[str],
    where: Bool[Tensor, "b t"] | Positions | None = None,
    layers: Iterable[int] | None = None,
    grad: bool = True,
    *,
    adapter: Handed = None,
) -> Capture:
    """Record the activations of one or more sites during one forward, as a context manager.

        with mimic_core.capture(model, "mlp_out", where=query_tokens) as seen:
            model(**inputs)
        seen["mlp_out"][0]      # [n c] of layer 0, for the n tokens chosen by `where`

    The capture holds the value after the edits that were installed before it was opened. The model's later writes do
    not reach it: at every site but `lse`, one copy is made of the tensor, or of the tokens that `where` chooses. It
    records only the thread that opened it. In a tensor-parallel model, each process gets the heads of all.

    Args:
        sites: One or several of `mimic_core.types.SITES`.
        where: The tokens to keep: a mask, or positions such as "prompt_end" (see `mimic_core.positions.Positions`).
            Only these are copied. The token axis comes first, with the samples in order: `mlp_out` [n c], `attn_heads`
            and `query` [n h d], `lse` [n h]. None keeps the whole tensor of the site.
        layers: Which decoder layers; None means all that have the sites.
        grad: False detaches the tensors. With True they carry gradient if the forward does.
        adapter: See `adapter_for`.

    Raises:
        UnknownNameError: there is no such site, or no such positions.
        ShapeError: `where` is a tensor, but not a bool mask [b t]. The forward raises it if `where` does not fit its
            tokens.
        UnsupportedModelError: no adapter fits, or a layer lacks a site.
        PatchStateError: `where` names positions, and a site is `key`, `value` or `lse`. The forward raises it if it
            does not say where its prompt ends, see `Handle.at`.

    A second forward inside the same capture raises PatchStateError.
    """
    return Capture(model, sites, where, layers, grad, adapter=adapter)
