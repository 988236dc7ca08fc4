"""Laws about the sites: they are in their layers and complete, and an edit there has the right effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import parts_of
from ..capture import capture
from ..errors import PatchStateError
from ..patch import hook
from ..types import ATTENTION_SITES, At, LayerSpec, Site
from .oracle import Edit, Oracle, Place, Seen
from .passes import by_place
from .subject import Subject, same_bits
from .verdicts import BrokenLaw, NotApplicable


def own_layer(s: Subject) -> str:
    """Each site is in its layer of the spec, the layers run in order, and no two layers share an MLP or an output."""
    events = _events(s)
    begun = [module for what, module in events if what == "begin"]
    layers = list(dict.fromkeys(s.inner.get_submodule(layer.path) for layer in s.spec.layers))
    ran = [m for m in dict.fromkeys(begun) if m in layers]
    if ran != [m for m in layers if m in ran]:
        raise BrokenLaw(f"the layers run in another order than the spec's: {', '.join(_name(s, m) for m in ran)}")
    if any(layer.run for layer in s.spec.layers):
        # In its order of passes too.
        wanted = [key for key, _ in groupby(s.spec.layers, lambda layer: (layer.path, layer.run))]
        found = [s.names[module] for module in begun if module in layers]
        if found != [path for path, _ in wanted]:
            raise BrokenLaw(f"the passes run in another order than the spec's: {', '.join(found)}")
    owners: dict[tuple[nn.Module, Site, int], int] = {}
    for layer in s.spec.layers:
        block = s.inner.get_submodule(layer.path)
        inside = set(block.modules())
        for site in layer.sites:
            module = s.module(layer.index, site)
            where = f"{site} of layer {layer.index} is {_name(s, module)}"
            if module not in inside:
                raise BrokenLaw(f"{where}, not in {layer.path}")
            if (other := owners.setdefault((module, site, layer.run), layer.index)) != layer.index:
                raise BrokenLaw(f"{where}, which layer {other} has already")
            if site in ("layer_out", "layer_in") and module is not block:
                raise BrokenLaw(f"{where}, not the layer")
            if site in ATTENTION_SITES and module is not s.attention(layer):
                raise BrokenLaw(f"{where}; {_name(s, s.attention(layer))} is what calls the attention interface")
            if site not in ATTENTION_SITES and module not in begun:
                raise BrokenLaw(f"{where}, which does not run")
        _check_outputs(s, layer, events)
    return f"{len(owners)} sites"


def _check_outputs(s: Subject, layer: LayerSpec, events: list[tuple[str, nn.Module]]) -> None:
    """Check that `attn_out` ends after the attention call, that the module of `mlp_out` has no attention, and that the
    one of `mlp_hidden` is in it."""
    attends = s.attention(layer) if "query" in layer.sites else None
    if "mlp_out" in layer.sites:
        mlp = s.module(layer.index, "mlp_out")
        if "attn_out" in layer.sites and mlp is s.module(layer.index, "attn_out"):
            raise BrokenLaw(f"mlp_out and attn_out of layer {layer.index} are both {_name(s, mlp)}")
        if any(what == "attend" for what, _ in _during(events, mlp)):
            raise BrokenLaw(f"mlp_out of layer {layer.index} is {_name(s, mlp)}, inside which attention is called")
        if "mlp_hidden" in layer.sites and (down := s.module(layer.index, "mlp_hidden")) not in set(mlp.modules()):
            raise BrokenLaw(f"mlp_hidden of layer {layer.index} is {_name(s, down)}, not in {_name(s, mlp)}")
    if "attn_out" in layer.sites and attends is not None:
        out = s.module(layer.index, "attn_out")
        if events.index(("end", out)) < events.index(("attend", attends)):
            raise BrokenLaw(
                f"attn_out of layer {layer.index} is {_name(s, out)}, which ends before attention is called"
            )


def _during(events: list[tuple[str, nn.Module]], module: nn.Module) -> list[tuple[str, nn.Module]]:
    return events[events.index(("begin", module)) : events.index(("end", module))]


def _events(s: Subject) -> list[tuple[str, nn.Module]]:
    """The order in which layers and sites begin and end and attention is called, in an unpatched forward."""
    events: list[tuple[str, nn.Module]] = []
    watched = {s.inner.get_submodule(layer.path) for layer in s.spec.layers}
    watched |= {s.module(layer.index, site) for layer in s.spec.layers for site in layer.sites}
    called = {seen.module for seen in s.calls}

    def attends(value: Tensor, seen: Seen | None, module: nn.Module) -> Tensor:
        events.append(("attend", module))
        return value

    edits: dict[Place, Edit] = {(m, "query"): partial(attends, module=m) for m in called}
    hooks = [
        part.register_forward_pre_hook(partial(lambda m, part, args: events.append(("begin", m)), m))
        for m in watched
        for part in parts_of(m)
    ]
    hooks += [m.register_forward_hook(lambda m, args, out: events.append(("end", m))) for m in watched]
    try:
        with Oracle(edits), torch.no_grad():
            s.run()
    finally:
        for handle in hooks:
            handle.remove()
    return events


def coverage(s: Subject) -> str:
    """Every self-attention of the decoder is in the spec, or its layer says why not; none is called outside it."""
    inside = set(s.adapter.decoder(s.inner).modules())
    times = Counter(seen.module for seen in s.calls)
    called = [m for m in times if m in inside and m in s.textual]  # a vision tower can be inside the decoder
    known = {s.module(layer, "query") for layer in s.layers_with("query")}
    excused = {
        m
        for layer in s.spec.layers
        if layer.missing and "query" not in layer.sites
        for m in s.inner.get_submodule(layer.path).modules()
    }
    odd = [m for m in called if m not in known and m not in excused and not s.is_cross(m)]
    if odd:
        raise BrokenLaw(
            f"{', '.join(_name(s, m) for m in odd[:4])} attend{'s' if len(odd) == 1 else ''} inside the decoder but "
            f"{'is' if len(odd) == 1 else 'are'} not in the spec, and no layer says why"
        )
    never = [m for m in known if m not in times]
    if never:
        raise BrokenLaw(f"{_name(s, never[0])} has attention sites and never calls the attention interface")
    stray = [m for m in known if m not in inside]
    if stray:
        raise BrokenLaw(f"{_name(s, stray[0])} has attention sites and is outside the decoder")
    cross = sum(1 for m in called if s.is_cross(m) and m not in known)
    if not called:
        raise NotApplicable("nothing in the decoder calls the attention interface")
    excuses = sum(1 for m in called if m in excused and m not in known)
    return (
        f"{len(known)} of {len(called)} attention modules are sites, {cross} cross-attention, {excuses} with a reason"
    )


def decoder_only(s: Subject) -> str:
    """Modules that run before the layers (vision tower, connector) give the same bits; hooks are only in the layers."""
    stacks = s.stacks()
    blocks = [s.inner.get_submodule(layer.path) for layer in s.spec.layers]
    layers = {m for block in blocks for m in block.modules()}
    outside = [m for m in s.inner.modules() if m not in layers]

    def record() -> list[Tensor]:
        kept: list[Tensor] = []
        begun: list[bool] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not begun and isinstance(output, Tensor):
                kept.append(output.detach().clone())

        hooks = [m.register_forward_hook(keep) for m in outside]
        parts = [part for block in blocks for part in parts_of(block)]
        hooks += [part.register_forward_pre_hook(lambda m, args: begun.append(True)) for part in parts]
        try:
            with torch.no_grad():
                s.run()
        finally:
            for handle in hooks:
                handle.remove()
        return kept

    plain, before = record(), _marks(s.inner)
    with s.patched(stacks):
        marks = _marks(s.inner)
        touched = [m for m in s.inner.modules() if marks[m] != before[m]]
        shifted = record()
    stray = [m for m in touched if m not in layers and m not in (s.inner, s.adapter.decoder(s.inner))]
    if stray:
        raise BrokenLaw(f"{_name(s, stray[0])} was changed, but it is in no layer of the spec")
    if len(plain) != len(shifted) or not all(same_bits(a, b) for a, b in zip(plain, shifted, strict=True)):
        raise BrokenLaw("modules that run before the layers give other values in a patched forward")
    return f"{len(plain)} outputs before the layers, {len(touched)} modules touched"


def _marks(model: nn.Module) -> dict[nn.Module, tuple[Any, ...]]:
    """The attributes and hooks of each module that an edit can change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        m: (sorted(vars(m)), *(len(vars(m)[name]) for name in hooks), vars(m).get("forward")) for m in model.modules()
    }


def shapes(s: Subject) -> str:
    """A capture at each site has the shape of the spec."""
    refused = s.refused
    count = 0
    for site in _all_sites(s):
        layers = [i for i in s.layers_with(site) if site != "lse" or i not in refused]
        if not layers:
            continue
        for i, found in _captured(s, site, layers):
            layer = s.spec.layers[i]
            wanted = _shape(site, layer)
            if found.ndim != len(wanted) or any(
                w is not None and w != n for w, n in zip(wanted, found.shape, strict=True)
            ):
                words = " ".join("*" if n is None else str(n) for n in wanted)
                raise BrokenLaw(f"{site} of layer {i} is {list(found.shape)}, the spec says [{words}]")
            count += 1
    if not count:
        raise NotApplicable("the spec lists no site")
    return f"{count} tensors"


def _captured(s: Subject, site: Site, layers: list[int]) -> list[tuple[int, Tensor]]:
    """What a capture holds. It refuses layers that run several times: of these, what a hook sees."""
    try:
        with torch.no_grad(), capture(s.model, site, layers=layers) as seen:
            s.run()
        return [(i, seen[site][i]) for i in layers]
    except PatchStateError:
        passes: list[tuple[int, Tensor]] = []

        def watch(value: Tensor, at: At) -> None:
            passes.append((at.layer, value))

        with torch.no_grad(), hook(s.model, site, watch, layers=layers):
            s.run()
        if len(passes) == len(layers):
            raise
        return passes


def _all_sites(s: Subject) -> list[Site]:
    return list(dict.fromkeys(site for layer in s.spec.layers for site in layer.sites))


def _shape(site: Site, layer: LayerSpec) -> tuple[int | None, ...]:
    if site == "query":
        return None, layer.heads, None, layer.head_dim
    if site in ("key", "value"):
        return None, layer.kv_heads, None, layer.head_dim if site == "key" else layer.value_dim
    if site == "lse":
        return None, layer.heads, None
    if site == "attn_heads":
        return None, None, layer.heads, layer.value_dim
    return None, None, layer.mlp_width if site == "mlp_hidden" else layer.hidden_size


def site_law(site: Site) -> Callable[[Subject], str]:
    """The law of an edit at one site."""

    def check(s: Subject) -> str:
        layers = s.layers_with(site)
        if not layers:
            raise NotApplicable(_why_not(s))
        baseline = s.baseline
        tolerance = s.tolerance(baseline.error)
        with torch.no_grad():
            with hook(s.model, site, lambda value, at: _stretch(value, at.layer, site), layers=layers):
                found = s.run()
            edited = [s.spec.layers[i] for i in layers]
            edits = by_place(
                s.spec,
                [(one, (s.place(one, site), site), partial(_edit, layer=one.index, site=site)) for one in edited],
            )
            # Outside of attention, the model's own runs: the last bit of another may turn a choice of experts.
            plain = baseline.plain if site in ATTENTION_SITES else ()
            with Oracle(edits, plain, baseline.reading):
                wanted = s.run()
            gap = s.gap(found, wanted, s.logits)
            idle = []
            for i in layers if len(layers) > 1 else []:
                with hook(s.model, site, lambda value, at: _stretch(value, at.layer, site), layers=[i]):
                    if same_bits(s.run(), s.logits):
                        idle.append(str(i))
        if not gap.error <= tolerance:
            raise BrokenLaw(f"it differs from the oracle: {gap.words(tolerance)}")
        if idle:
            raise BrokenLaw(f"an edit at layer {', '.join(idle)} alone changes no logit")
        if not gap.effect > 10 * tolerance:
            raise BrokenLaw(f"the edits have almost no effect: {gap.words(tolerance)}")
        return f"{len(layers)} layers, {gap.words(tolerance)}"

    check.__doc__ = f"Edits at {site} change the logits as in the oracle, and an edit at any single layer changes them."
    return check


def _stretch(value: Tensor, layer: int, site: Site) -> Tensor:
    """An edit that no norm, softmax or symmetry undoes. It differs between layers and is the same for all tokens."""
    axis = 2 if site in ("query", "key", "value") else 1
    last = value.ndim - 1  # there are only two axes if a model flattens its tokens
    shape = [1 if i in (0, axis) and i < last else n for i, n in enumerate(value.shape)]
    generator = torch.Generator().manual_seed(17 + layer)
    factor = 1 + 0.5 * torch.randn(shape, generator=generator).to(value)
    return value * factor


def _edit(value: Tensor, seen: Seen | None, layer: int, site: Site) -> Tensor:
    return _stretch(value, layer, site)


def _why_not(s: Subject) -> str:
    reasons = list(dict.fromkeys(layer.missing for layer in s.spec.layers if layer.missing))
    return f"no layer has it{': ' + '; '.join(reasons) if reasons else ''}"


def lse(s: Subject) -> str:
    """The LSE is the log-sum-exp of the logits that attention used, or is refused."""
    layers = s.layers_with("lse")
    if not layers:
        raise NotApplicable(_why_not(s))
    refused = s.refused
    if len(refused) == len(layers):
        raise NotApplicable(f"refused: {next(iter(refused.values()))}")
    baseline = s.baseline
    worst = 0.0
    real = s.batches.real(s.inputs)
    for i, found in s.lse.items():
        module = s.attention(s.spec.layers[i])
        seen = baseline.seen.get((module, s.spec.layers[i].run))
        if module not in baseline.plain or seen is None or seen.lse is None:
            raise BrokenLaw(
                f"layer {i}: the attention of {_name(s, module)} is not the softmax of scaled, masked logits "
                f"(with it the model's logits are {baseline.error:.1e} off at best), yet an LSE is given"
            )
        wanted = seen.lse
        if found.shape != wanted.shape:
            raise BrokenLaw(f"layer {i}: LSE {list(found.shape)}, the oracle's is {list(wanted.shape)}")
        rows = torch.ones_like(wanted, dtype=torch.bool)
        if real is not None and real.shape == (wanted.shape[0], wanted.shape[2]):
            rows &= real[:, None]
        a, b = found.double()[rows], wanted.double()[rows]
        if not torch.equal(a == -torch.inf, b == -torch.inf):
            raise BrokenLaw(f"layer {i}: -inf is not where rows attend to nothing")
        a, b = a[b > -torch.inf], b[b > -torch.inf]
        if a.numel():
            worst = max(worst, float((a - b).abs().nan_to_num(float("inf")).max()) / max(1.0, float(b.abs().max())))
    # The queries of later layers have the rounding errors of earlier layers.
    tolerance = 10 * s.tolerance(baseline.error)
    if not worst <= tolerance:
        raise BrokenLaw(f"{worst:.1e} from the oracle's (tolerance {tolerance:.0e})")
    words = f"{len(s.lse)} layers, {worst:.1e} from the oracle's (tolerance {tolerance:.0e})"
    return words + (
        f"; refused in layers {', '.join(map(str, refused))}: {next(iter(refused.values()))}" if refused else ""
    )


def _name(s: Subject, module: nn.Module) -> str:
    name = s.names.get(module)
    return f"{type(module).__name__} (not in the model)" if name is None else name or "the model"
