"""The model under test, and properties of the unpatched model that several laws need, computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..adapters import AttentionAdapter, Handed, adapter_for, unwrap
from ..build import build_shifts
from ..errors import UnsupportedModelError
from ..heads import LIVEConfig, MimICConfig, ShiftStack
from ..patch import hook, patch
from ..types import ATTENTION_SITES, SITES, At, LayerSpec, ModelSpec, Site
from .batches import Batches, copied
from .oracle import READINGS, Oracle, Reading, Seen
from .passes import by_place, numbered, passes
from .verdicts import NotApplicable, Raised, attempt

OUTPUT_SITES: tuple[Literal["attn_out", "mlp_out", "layer_out"], ...] = ("attn_out", "mlp_out", "layer_out")
EDITED_SITES: tuple[Site, ...] = tuple(site for site in SITES if site != "lse")
MODULE_SITES: tuple[Site, ...] = tuple(site for site in SITES if site not in ATTENTION_SITES)
# The tolerance by dtype when the same logits are computed in two ways, relative to the largest logit. And the largest
# tolerance, for a model that is itself less exact.
_EXACT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_MOST = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
COPIED = 200_000_000
"""A model with more parameters is not copied: into fp64, or from a GPU."""


@dataclass(frozen=True)
class Gap:
    """The difference of two logits, and the effect of the edit on them, relative to the largest logit."""

    error: float
    effect: float

    def words(self, tolerance: float) -> str:
        return (
            f"difference {self.error:.1e} (tolerance {tolerance:.0e}), the edit moves the logits by {self.effect:.1e}"
        )


@dataclass(frozen=True)
class Baseline:
    """The unpatched model, run with the oracle.

    Attributes:
        plain: Modules whose attention is the softmax attention of the oracle.
        error: The difference between the oracle without edits and the model's logits.
        seen: The oracle's calls, by module and pass.
        sizes: Root mean square of each site's values, by layer and site.
    """

    plain: tuple[nn.Module, ...]
    reading: Reading
    error: float
    seen: Mapping[tuple[nn.Module, int], Seen]
    sizes: Mapping[tuple[int, Site], float]


Inputs = Mapping[str, Any]
Forward = Callable[[nn.Module, Inputs], Tensor]
Decode = Callable[[nn.Module, Inputs, Tensor], Tensor]
Pad = Callable[[list[dict[str, Any]], str], "tuple[Inputs, Tensor] | None"]


class Subject:
    """A frozen model in eval mode, with inputs (None means random text). Nothing here changes the model.

    The other arguments are those of `check_adapter`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | None,
        adapter: Handed = None,
        forward: Forward | None = None,
        decode: Decode | None = None,
        pad: Pad | None = None,
    ) -> None:
        self.model = model
        self.given = inputs
        self.handed, self.forward, self.decode, self.pad = adapter, forward, decode, pad
        self.kept: dict[str, Any] = {}
        """Results of laws that other laws use."""

    # From the adapter.

    @cached_property
    def inner(self) -> nn.Module:
        """The model without wrappers."""
        return unwrap(self.model)

    @cached_property
    def adapter(self) -> AttentionAdapter:
        return adapter_for(self.model)

    @cached_property
    def spec(self) -> ModelSpec:
        return self.adapter.spec(self.inner)

    def module(self, layer: int, site: Site, model: nn.Module | None = None) -> nn.Module:
        return self.adapter.module(self.inner if model is None else model, layer, site)

    @cached_property
    def names(self) -> dict[nn.Module, str]:
        return {m: name for name, m in self.inner.named_modules()}

    @cached_property
    def embedding(self) -> nn.Module | None:
        """The token embedding, as far as it is known."""
        found = attempt(lambda: cast(Any, self.inner).get_input_embeddings())
        if isinstance(found, nn.Module):
            return found
        return next((m for m in self.inner.modules() if isinstance(m, nn.Embedding)), None)

    def is_cross(self, module: nn.Module) -> bool:
        """Whether a module is cross-attention, by its attribute, its class name or its path, or by its keys."""
        if any(seen.module is module and seen.own and seen.key.shape[2] != seen.query.shape[2] for seen in self.calls):
            return True
        words = " ".join((type(module).__name__, *self.names.get(module, "").split(".")[-2:])).lower()
        named = any(word in words for word in ("cross", "encdec", "encoder_decoder", "encoder_attn", "enc_attn"))
        return bool(getattr(module, "is_cross_attention", False)) or named

    def layers_with(self, *sites: Site) -> list[int]:
        return [layer.index for layer in self.spec.layers if set(sites) <= set(layer.sites)]

    # From running the model.

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.inner, self.given)

    @property
    def inputs(self) -> dict[str, Any]:
        return self.batches.given

    def run(self, inputs: Mapping[str, Any] | None = None, model: nn.Module | None = None) -> Tensor:
        """Logits of a forward without a cache, or hidden states if the model has no head."""
        torch.manual_seed(0)
        options = {"use_cache": False} if self.batches.accepts("use_cache") else {}
        given = copied(self.inputs if inputs is None else inputs)
        if self.forward is not None:
            return self.forward(self.model if model is None else model, given)
        output = (self.model if model is None else model)(**given, **options)
        for name in ("logits", "last_hidden_state"):
            if isinstance(found := getattr(output, name, None), Tensor):
                return found
        found = output[0] if isinstance(output, tuple) else output
        if not isinstance(found, Tensor):
            raise NotApplicable(f"the model returns a {type(output).__name__} without logits")
        return found

    @cached_property
    def logits(self) -> Tensor:
        """Logits of the unpatched model on the given inputs."""
        with torch.no_grad():
            return self.run()

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    def tolerance(self, own_error: float, dtype: torch.dtype | None = None) -> float:
        """The tolerance for a model with the error `own_error`. Raises NotApplicable if that is too large."""
        dtype = self.dtype if dtype is None else dtype
        wanted = max(_EXACT.get(dtype, 1e-5), 30 * own_error)
        if not wanted <= _MOST.get(dtype, 1e-3):
            raise NotApplicable(f"without any shift, two ways to the same logits differ by {own_error:.1e} already")
        return wanted

    def gap(self, found: Tensor, wanted: Tensor, plain: Tensor, inputs: Mapping[str, Any] | None = None) -> Gap:
        """Compare real tokens, and only finite logits: some models mask tokens with -inf or a very low number."""
        real = self.batches.real(self.inputs if inputs is None else inputs)
        where = (plain.abs() < 1e9) & torch.isfinite(plain)
        if real is not None and real.shape == plain.shape[:2]:
            where = where & real[..., None]
        a, b, c = (x[where].double() for x in (found.detach(), wanted.detach(), plain.detach()))
        scale = max(float(c.abs().max()), 1e-30)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Gap(float("nan"), float("nan"))
        return Gap(float((a - b).abs().max()) / scale, float((b - c).abs().max()) / scale)

    # From the oracle, without the library.

    @cached_property
    def calls(self) -> list[Seen]:
        with Oracle() as oracle, torch.no_grad():
            self.run()
        return oracle.seen

    @cached_property
    def textual(self) -> set[nn.Module]:
        """The modules that attend to text: their queries change when the text changes."""
        name = self.batches.tokens
        if not self.batches.has_ids(self.inputs):
            return {seen.module for seen in self.calls}
        reworded = {**self.inputs, name: self.batches.reworded(self.inputs[name])}
        with Oracle() as oracle, torch.no_grad():
            found = attempt(partial(self.run, reworded))
        if isinstance(found, Raised) or len(oracle.seen) != len(self.calls):
            return {seen.module for seen in self.calls}
        pairs = zip(self.calls, oracle.seen, strict=True)
        return {a.module for a, b in pairs if not same_bits(a.query, b.query)}

    def attention(self, layer: LayerSpec) -> nn.Module:
        """The self-attention of a layer: the module inside it that calls the interface.

        If several entries of the spec belong to one layer, the first gets its first such module, and so on.
        """
        inside = set(self.inner.get_submodule(layer.path).modules())
        called = [m for m in dict.fromkeys(seen.module for seen in self.calls) if m in inside and not self.is_cross(m)]
        # Some models also use the interface for other states, such as the states of a token in earlier layers.
        of_tokens = {seen.module for seen in self.calls if seen.query.shape[::2] == self.logits.shape[:2]}
        called = [m for m in called if m in of_tokens] or called
        rank = [other.index for other in self._beside(layer)].index(layer.index)
        return called[rank] if rank < len(called) else self.module(layer.index, "query")

    def _beside(self, layer: LayerSpec) -> list[LayerSpec]:
        """The entries of the spec that are parts of the same layer, in the same pass."""
        return [other for other in self.spec.layers if (other.path, other.run) == (layer.path, layer.run)]

    def place(self, layer: LayerSpec, site: Site) -> nn.Module:
        """The module at which the oracle edits a site. Attention and layer are found without the adapter's `module`."""
        if site in ("layer_out", "layer_in") and len(self._beside(layer)) == 1:
            return self.inner.get_submodule(layer.path)
        return self.module(layer.index, site) if site in MODULE_SITES else self.attention(layer)

    @cached_property
    def baseline(self) -> Baseline:
        with torch.no_grad():
            return self.look(self.inner, self.inputs, self.logits)

    def look(self, model: nn.Module, inputs: Mapping[str, Any], logits: Tensor) -> Baseline:
        """Run the oracle without edits, on the model or a copy of it."""
        with_attention = [layer for layer in self.spec.layers if "query" in layer.sites]
        modules = [model.get_submodule(self.names[self.attention(layer)]) for layer in with_attention]
        sizes: dict[tuple[int, Site], float] = {}
        places: list[tuple[LayerSpec, nn.Module, Any]] = [
            (layer, self.module(layer.index, site, model), site)
            for layer in self.spec.layers
            for site in MODULE_SITES
            if site in layer.sites
        ]
        for layer, module in zip(with_attention, modules, strict=True):
            places += [(layer, module, site) for site in ATTENTION_SITES if site in EDITED_SITES]
        times = {module: passes(self.spec, layer) for layer, module, _ in places}
        threshold = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 3e-2
        caller = None if model is self.inner else model

        def read(plain: list[nn.Module], reading: Reading) -> Baseline:
            edits = (
                (layer, (module, site), partial(_record, sizes=sizes, layer=layer.index, site=site))
                for layer, module, site in places
            )
            records = by_place(self.spec, edits)
            with Oracle(records, plain, reading) as oracle:
                found = self.run(inputs, caller)
            error = self.gap(found, logits, logits, inputs).error
            really = {seen.module for seen in oracle.seen if seen.plain}
            return Baseline(
                tuple(m for m in plain if m in really), reading, error, numbered(oracle.seen, times), dict(sizes)
            )

        tried: list[Baseline] = []
        for reading in READINGS:
            tried.append(read(modules, reading))
            if tried[-1].error <= threshold:
                return tried[-1]
        best = min(tried, key=lambda b: b.error if b.error == b.error else float("inf"))
        fitting = [m for m in best.plain if read([m], best.reading).error <= threshold]
        return read(fitting, best.reading)

    @cached_property
    def refused(self) -> dict[int, str]:
        """The layers whose LSE the library refuses, with the message."""
        return self._lse[1]

    @cached_property
    def lse(self) -> dict[int, Tensor]:
        return self._lse[0]

    @cached_property
    def _lse(self) -> tuple[dict[int, Tensor], dict[int, str]]:
        found: dict[int, Tensor] = {}
        refused: dict[int, str] = {}

        def watch(value: Tensor, at: At) -> None:
            found[at.layer] = value.detach()

        layers = self.layers_with("lse")
        # All layers at once. If some are refused, one by one.
        for group in (layers, *([layer] for layer in layers)) if layers else ():
            try:
                with torch.no_grad(), hook(self.model, "lse", watch, layers=group):
                    self.run()
            except UnsupportedModelError as error:
                refused |= {layer: str(error) for layer in group if len(group) == 1 or len(layers) == 1}
            else:
                if group is layers:
                    break
        return {layer: x for layer, x in found.items() if layer not in refused}, refused

    # Shifts.

    def stacks(self, model: nn.Module | None = None) -> dict[str, ShiftStack]:
        """Stacks for all sites of the model, by name, with random parameters that have an effect.

        Vectors have half the norm of the value they are added to, and gates are 0.5 on average. All laws share the
        stacks of the model, so do not change them.
        """
        if model is None:
            if "stacks" not in self.kept:
                self.kept["stacks"] = self._fresh_stacks(self.model)
            return dict(self.kept["stacks"])
        return self._fresh_stacks(model)

    def _fresh_stacks(self, model: nn.Module) -> dict[str, ShiftStack]:
        gated = [layer for layer in self.layers_with("attn_heads", "lse") if layer not in self.refused]
        bare = [layer for layer in self.layers_with("attn_heads") if layer not in gated]
        found: dict[str, ShiftStack] = {}
        if gated:
            found["MimIC"] = build_shifts(model, MimICConfig(layers=tuple(gated)))
        if bare:
            found["MimIC without gate"] = build_shifts(model, MimICConfig(layers=tuple(bare), gate=False))
        for site in OUTPUT_SITES:
            if layers := self.layers_with(site):
                found[f"LIVE at {site}"] = build_shifts(model, LIVEConfig(layers=tuple(layers), site=site))
        generator = torch.Generator().manual_seed(5)
        for stack in found.values():
            for head in stack:
                self._randomize(dict(head.named_parameters()), head.layer, head.site, generator)
        return found

    def _randomize(self, p: dict[str, nn.Parameter], layer: LayerSpec, site: Site, generator: torch.Generator) -> None:
        sizes = self.baseline.sizes
        with torch.no_grad():
            p["vector"].copy_(torch.randn(p["vector"].shape, generator=generator))
            p["vector"].mul_(0.5 * sizes.get((layer.index, site), 1.0))
            if "scale" in p:
                p["scale"].fill_(1.0)
            if "gate_weight" in p:
                p["gate_weight"].copy_(torch.randn(p["gate_weight"].shape, generator=generator))
                p["gate_weight"].div_(layer.head_dim**0.5 * max(sizes.get((layer.index, "query"), 1.0), 1e-6))
                lse = self.lse[layer.index].double()
                finite = torch.isfinite(lse)
                middle = lse.where(finite, 0).sum((0, 2)) / finite.sum((0, 2)).clamp(min=1)
                p["gate_bias"].copy_(middle)

    @contextmanager
    def patched(self, stacks: Mapping[str, ShiftStack], model: nn.Module | None = None) -> Iterator[None]:
        with ExitStack() as exit_stack:
            for stack in stacks.values():
                exit_stack.enter_context(patch(self.model if model is None else model, stack))
            yield

    # A copy in fp64.

    @cached_property
    def wide(self) -> nn.Module:
        """A copy of the model in fp64. Raises NotApplicable if it is too large or its device has no fp64."""
        if sum(p.numel() for p in self.inner.parameters()) > COPIED:
            raise NotApplicable("the model is too large to be copied into fp64")
        if any(p.device.type in ("meta", "mps") for p in self.inner.parameters()):
            raise NotApplicable("its device has no fp64")
        return copy.deepcopy(self.inner).double().requires_grad_(False)

    @cached_property
    def wide_inputs(self) -> dict[str, Any]:
        return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in self.inputs.items()}


def zeroed(stacks: Mapping[str, ShiftStack]) -> Mapping[str, ShiftStack]:
    """Copies of the stacks, with zero vectors."""
    stacks = copy.deepcopy(dict(stacks))
    with torch.no_grad():
        for stack in stacks.values():
            for name, p in stack.named_parameters():
                if name.endswith("vector"):
                    p.zero_()
    return stacks


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit. NaN counts as equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _record(value: Tensor, seen: Seen | None, sizes: dict[tuple[int, Site], float], layer: int, site: Site) -> Tensor:
    """An edit that changes nothing and records the root mean square."""
    sizes[layer, site] = float(value.detach().double().square().mean().sqrt())
    return value
