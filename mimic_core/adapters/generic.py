"""The generic adapter: it finds the sites of any text decoder by one small forward."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..types import ATTENTION_SITES, SITES, LayerSpec, ModelSpec, Site
from .base import is_of_transformers, name_of, text_config, text_decoder, unwrap
from .layers import ATTENTION_CLASS, layers_of, outputs_of, runs_layers, starts
from .probe import AttentionSeen, Example, Passed, Probe, probe
from .residual import adds_its_input

# Paths of the MLP in a layer, the most likely first. If none fits, the names of MLP classes are searched.
_MLP_PATHS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "fc2", "output.dense", "linear2")
_MLP_CLASS = re.compile(r"MLP|Mlp|FeedForward|FFN|MoE|Moe|MOE|Dense\w*ActDense")
# Classes that are not named as the reason why a layer has no attention: they do not mix tokens.
_PLAIN = re.compile(r"Norm|Dropout|Identity|Rotary|Embedding|Linear|Router|Activation|Module|Residual")
# The last projection of an MLP or of attention, for modules that add the residual themselves (BLOOM, MPT).
_LAST_PROJECTIONS = ("dense_4h_to_h", "down_proj", "dense", "out_proj", "o_proj")
_LINEAR_CLASS = re.compile(r"Linear|Conv1D")  # also those with quantised weights, and LoRA's
_FOR_ALL = "; for one head for all of them: adapter=mimic_core.GenericAdapter(share_passes=True)"


class GenericAdapter:
    """Finds the decoder's layers and their sites by running the decoder once on four tokens.

    An attention site is a module that calls transformers' attention interface exactly once, or torch's SDPA, or that
    computes attention by products and a softmax; the sizes are those of the tensors in it. An output site is a module
    that runs exactly once and returns hidden states. If a layer lacks sites, `LayerSpec.missing` says why. The result
    is kept as long as the model's modules are the same.

    Args:
        example: The arguments of the model's forward, by name or as a tuple in their order, if it does not run on token
            ids alone. Its tokens [b t ...] come first, or are called as in transformers, and b is not t.
        share_passes: A layer that runs several times in a forward is one layer of the spec: one head acts in all of its
            passes, and captures refuse it. Otherwise each pass is a layer of the spec, with a head of its own. Of a
            module that calls the interface several times (DiffLlama), one head acts in all calls.
    """

    def __init__(self, example: Example | None = None, share_passes: bool = False) -> None:
        self.share_passes = share_passes
        if isinstance(example, Mapping):
            self.example: Example | None = {name: _detached(x) for name, x in example.items()}
        else:
            self.example = None if example is None else tuple(map(_detached, example))

    def spec(self, model: nn.Module) -> ModelSpec:
        return self._layout(unwrap(model)).spec

    def decoder(self, model: nn.Module) -> nn.Module:
        model = unwrap(model)
        return model.get_submodule(self._known(model).decoder)

    def module(self, model: nn.Module, layer: int, site: Site) -> nn.Module:
        model = unwrap(model)
        return model.get_submodule(self._known(model).paths[layer][site])

    def _known(self, model: nn.Module) -> _Layout:
        """The layout that `spec` found last. Only `spec`, once a patch, checks whether modules have changed."""
        known = _layouts.get(model, {}).get(self.share_passes)
        return self._layout(model) if known is None else known[1]

    def _layout(self, model: nn.Module) -> _Layout:
        decoder = text_decoder(model)
        _check_not_fused(decoder)
        seen = probe(model, decoder, self.example)
        kept = _layouts.setdefault(model, {})
        before, layout = kept.get(self.share_passes, (None, None))
        if layout is None or before is not seen:
            seen, layout = self._looked_at(model, decoder, seen)
            kept[self.share_passes] = seen, layout
        return layout

    def _looked_at(self, model: nn.Module, decoder: nn.Module, seen: Probe) -> tuple[Probe, _Layout]:
        """The layout. If layers lack attention, it is looked for outside of the interface too."""
        error: UnsupportedModelError | None = None
        found: _Layout | None = None
        try:
            found = _find(model, decoder, seen, self.example, self.share_passes)
        except UnsupportedModelError as first:
            error = first
        if not seen.follows and (found is None or any("query" not in layer.sites for layer in found.spec.layers)):
            with suppress(UnsupportedModelError):
                seen = probe(model, decoder, self.example, follows=True)
                found = _find(model, decoder, seen, self.example, self.share_passes)
        if found is None:
            assert error is not None
            raise error
        return seen, found


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


@dataclass(frozen=True)
class _Layout:
    decoder: str
    spec: ModelSpec
    paths: tuple[dict[Site, str], ...]


# By model, and by whether its passes share their heads.
_layouts: WeakKeyDictionary[nn.Module, dict[bool, tuple[Probe, _Layout]]] = WeakKeyDictionary()


def _check_not_fused(decoder: nn.Module) -> None:
    fused = next((m for m in decoder.modules() if isinstance(m, nn.TransformerEncoderLayer)), None)
    if fused is not None and torch.backends.mha.get_fastpath_enabled():
        raise UnsupportedModelError(
            f"in eval mode, torch runs a {type(fused).__name__} as one kernel, on nested tensors if there is "
            f"padding, so its sites do not run: call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _find(model: nn.Module, decoder: nn.Module, seen: Probe, example: Example | None, share_passes: bool) -> _Layout:
    names = {module: name for name, module in model.named_modules()}
    layers = layers_of(decoder, seen, names)
    hidden_size = int(getattr(text_config(model), "hidden_size", 0))
    runs = {path: len(outputs_of(layer, seen, names)) for path, layer in layers}
    loops = any(n > 1 for n in runs.values())
    holders = Counter(m for path, layer in layers for m in layer.modules() for _ in range(max(runs[path], 1)))
    counted = _whose_output_counts(layer for _, layer in layers)
    adds = {} if is_of_transformers(model) else adds_its_input(model, decoder, counted, example)
    found: list[tuple[int, dict[str, Any], dict[Site, str]]] = []
    for path, layer in layers:
        one = _Layer(layer, path, hidden_size, seen, names, holders, adds, share_passes)
        # In the order in which they run, with one place for each pass.
        places = starts(path, seen) if loops else []
        for sizes, sites in one.parts():
            for run in range(one.runs if sites and not share_passes else 1):
                place = places[run] if run < len(places) else len(seen.begun)
                found.append((place, sizes | {"run": run}, sites))
    found.sort(key=lambda part: part[0] if loops else 0)
    if not any(sites for _, _, sites in found):
        raise UnsupportedModelError(
            f"no layer of {layers[0][0].rpartition('.')[0]} has a site: {found[0][1]['missing']}"
        )
    layer_specs = tuple(
        LayerSpec(index=index, **sizes, sites=tuple(s for s in SITES if s in sites))
        for index, (_, sizes, sites) in enumerate(found)
    )
    widths = Counter(spec.hidden_size for spec in layer_specs if spec.sites)
    spec = ModelSpec(name_of(model), widths.most_common(1)[0][0], layer_specs)
    above = runs_layers([path for path, _ in layers], names[decoder], seen)
    return _Layout(above, spec, tuple(sites for _, _, sites in found))


def _whose_output_counts(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers, and the modules inside that may be an attention or an MLP."""
    return [
        m
        for layer in layers
        for path, m in layer.named_modules()
        if not path
        or path in _MLP_PATHS
        or _MLP_CLASS.search(type(m).__name__)
        or ATTENTION_CLASS.search(type(m).__name__)
    ]


class _Layer:
    def __init__(
        self,
        layer: nn.Module,
        path: str,
        hidden_size: int,
        seen: Probe,
        names: dict[nn.Module, str],
        holders: Counter[nn.Module],
        adds: dict[nn.Module, bool | None],
        share_passes: bool,
    ) -> None:
        self.share_passes = share_passes
        self.layer, self.path, self.seen, self.names, self.holders, self.adds = layer, path, seen, names, holders, adds
        runs = outputs_of(layer, seen, names)
        self.runs, returned = len(runs), (runs or [None])[0]
        self.is_alike = len(set(runs)) == 1
        # Not always hidden states: some layers return several streams or a list. Their attention and MLP do not.
        self.returned = returned
        # Some models put learned tokens before the text.
        b, t = seen.tokens
        tokens = returned[1] if returned is not None and len(returned) == 3 else t
        width = hidden_size or (returned[-1] if returned else 0)
        self.states = (b, tokens, width)
        self.is_list = isinstance(layer, nn.ModuleList)
        self.returns_states = returned == self.states and bool(adds.get(layer, True)) and not self.is_list

    def parts(self) -> Iterator[tuple[dict[str, Any], dict[Site, str]]]:
        """Sizes and sites of the layer. If it has several attention modules, each with an MLP: those of each pair."""
        if not self.is_alike or (self.runs > 1 and self.is_list):
            odd = "as a list of parts" if self.is_list else "with outputs of several sizes"
            times = f"runs {self.runs} times in a forward, {odd}" if self.runs else "does not run on text alone"
            yield self._sizes(None, f"{type(self.layer).__name__} {times}"), {}
            return
        attention = [path for path in self._inside() if self._calls(path) and self._is_self_attention(path)]
        pairs = list(zip(attention, self._listed_mlps(attention), strict=False)) if len(attention) > 1 else []
        for n, (one, mlp) in enumerate(pairs):
            yield self._part(one, mlp, last=n == len(pairs) - 1, first=n == 0)
        if pairs:
            return
        mlp = self._mlp(attention)
        if len(attention) > 1:
            problem = f"{len(attention)} attention modules in one layer ({', '.join(attention)})"
            yield self._sizes(None, problem), self._others(None, mlp)
        else:
            yield self._part(attention[0] if attention else None, mlp)

    def _part(
        self, attention: str | None, mlp: str | None, last: bool = True, first: bool = True
    ) -> tuple[dict[str, Any], dict[Site, str]]:
        missing = []
        if attention is None:
            missing.append(self._why_no_attention(mlp))
        elif len(calls := self._calls(attention)) != self.holders[self.module(attention)] and not (
            self.share_passes and len(set(calls)) == 1 and not calls[0].own
        ):
            for_all = "" if any(call.own for call in calls) else _FOR_ALL
            missing.append(f"{attention} attends {len(calls)} times in a forward{for_all}")
            attention = None
        sites = self._others(attention or self._other_attention(), mlp, last, first)
        if attention is not None:
            sites |= dict.fromkeys(ATTENTION_SITES, f"{self.path}.{attention}")
        if mlp is None:
            missing.append("no module was seen to return the output of an MLP alone")
        down = sites.get("mlp_hidden", "").removeprefix(f"{self.path}.")
        if not down and mlp is not None:
            missing.append(f"no linear layer was seen to give the output of {mlp} alone, as with experts")
        if self.is_list:
            missing.append(f"a {type(self.layer).__name__} of parts has no input and output")
        elif not self.returns_states:
            odd = "what does not hold its input" if self.returned == self.states else self.returned or "no tensor"
            missing.append(f"{type(self.layer).__name__} returns {odd}, not [b t c] of a residual stream")
        sizes = self._sizes(attention, "; ".join(missing))
        return (sizes | {"mlp_width": (self._passed(down)[0].shape or (0,))[-1]} if down else sizes), sites

    def _others(self, attention: str | None, mlp: str | None, last: bool = True, first: bool = True) -> dict[Site, str]:
        """The sites outside the attention call. Of a layer with several pairs, its output is the last one's."""
        sites: dict[Site, str] = {}
        projected = None if attention is None else self._projected(attention)
        if projected is not None:
            sites["attn_out"] = f"{self.path}.{projected}"
        if mlp is not None:
            sites["mlp_out"] = f"{self.path}.{mlp}"
            if (down := self._down(mlp)) is not None:
                sites["mlp_hidden"] = f"{self.path}.{down}"
        if last and self.returns_states:
            sites["layer_out"] = self.path
        if first and self.returns_states and {call.shape for call in self._passed("")} == {self.states}:
            sites["layer_in"] = self.path
        return sites

    def _sizes(self, attention: str | None, missing: str) -> dict[str, Any]:
        sizes: dict[str, Any] = {"path": self.path, "hidden_size": self.states[2], "missing": missing}
        fields = ("heads", "kv_heads", "head_dim", "value_dim")
        if attention is None:
            return sizes | dict.fromkeys(fields, 0)
        call = self._calls(attention)[0]
        return sizes | {name: getattr(call, name) for name in fields}

    def module(self, path: str) -> nn.Module:
        """The module at a path from the layer."""
        return self.layer.get_submodule(path)

    def _inside(self) -> list[str]:
        return [path for path, _ in self.layer.named_modules() if path]

    def _calls(self, path: str) -> list[AttentionSeen]:
        return self.seen.attention.get(self.names[self.module(path)], [])

    def _is_self_attention(self, path: str) -> bool:
        module = self.module(path)
        if self.names[module] in self.seen.crossed or getattr(module, "is_cross_attention", False):
            return False
        # Some models also use the interface for other states, such as the states of a token in earlier layers.
        # And a call of SDPA with other keys than the tokens attends to other states.
        b, t, _ = self.states
        return all(call.tokens == (b, t) and not (call.own and call.keys != t) for call in self._calls(path))

    def _why_no_attention(self, mlp: str | None) -> str:
        crossed = next((path for path in self._inside() if self._calls(path)), None)
        if crossed is not None:
            return f"{type(self.module(crossed)).__name__} attends to an encoder's states too"
        other = self._other_attention()
        if other is not None:
            odd = self.seen.odd.get(self.names[self.module(other)], "no softmax of a product of two tensors was seen")
            kind = type(self.module(other)).__name__
            return f"{kind} does not go through transformers' attention interface, and it can't be followed: {odd}"
        for path in self._inside():
            kind = type(self.module(path)).__name__
            if self._ran(path) and not _PLAIN.search(kind) and not f"{path}.".startswith(f"{mlp}."):
                odd = self.seen.odd.get(self.names[self.module(path)])
                return f"no softmax attention ({kind})" + (f" that can be followed: {odd}" if odd else "")
        return "no attention"

    def _other_attention(self) -> str | None:
        named = (path for path in self._inside() if ATTENTION_CLASS.search(type(self.module(path)).__name__))
        return next((path for path in named if self._ran(path)), None)

    def _ran(self, path: str) -> bool:
        return self.names[self.module(path)] in self.seen.outputs

    def _returns_states(self, path: str) -> bool:
        """Whether a module returns hidden states without the residual, once for each layer that contains it."""
        try:
            module = self.module(path)
        except AttributeError:
            return False
        if "residual" in inspect.signature(module.forward).parameters or self.adds.get(module, False) is not False:
            return False
        b, t, c = self.states
        shapes = {self.states, (b * t, c)}
        found = self.seen.outputs.get(self.names[module], [])
        return len(found) == self.holders[module] and set(found) <= shapes

    def _mlp(self, attention: list[str]) -> str | None:
        """Path of the MLP: found by its name, or else the outermost module with a class name of an MLP."""
        outermost = sorted(self._inside(), key=lambda path: path.count("."))
        named = [p for p in outermost if _MLP_CLASS.search(type(self.module(p)).__name__) and p not in attention]
        within = [f"{p}.{last}" for p in named for last in _LAST_PROJECTIONS]
        # In a layer around the decoder's own one.
        around = attention[0].rpartition(".")[0] if len(attention) == 1 else ""
        within += [f"{around}.{path}" for path in _MLP_PATHS if around and path != "output.dense"]
        return next((path for path in (*_MLP_PATHS, *named, *within) if self._returns_states(path)), None)

    def _passed(self, path: str) -> list[Passed]:
        return self.seen.passed.get(self.names[self.module(path)], [])

    def _down(self, mlp: str) -> str | None:
        """Path of the linear layer whose output is that of the MLP, untouched: its argument are the hidden values."""
        wanted = [call.returned for call in self._passed(mlp)]
        inside = [path for path in self._inside() if f"{path}.".startswith(f"{mlp}.")]
        gives = [path for path in inside if wanted == [x.returned for x in self._passed(path)]]
        order = {name: n for n, name in enumerate(self.seen.passed)}
        found = min(gives, key=lambda path: order[self.names[self.module(path)]], default=None)
        if found is None or None in wanted or not _LINEAR_CLASS.search(type(self.module(found)).__name__):
            return None
        given, (b, t, _) = self._passed(found), self.states
        if any(x.shape is None or x.shape[:-1] not in ((b, t), (b * t,)) for x in given):
            return None
        # A wrapper of it, such as LoRA's, gets the same, and would compute its share from the argument without edits.
        return min(path for path in gives if f"{found}.".startswith(f"{path}.") and self._passed(path) == given)

    def _listed_mlps(self, attention: list[str]) -> list[str]:
        """The members of a list of MLPs, one for each attention module."""
        for path in self._inside():
            members = self.module(path)
            if isinstance(members, nn.ModuleList) and len(members) == len(attention):
                paths = [f"{path}.{n}" for n in range(len(members))]
                if all(_MLP_CLASS.search(type(m).__name__) for m in members) and all(map(self._returns_states, paths)):
                    return paths
        return []

    def _projected(self, attention: str) -> str | None:
        """Path of the module whose output is that of attention: after the projection, before the residual addition."""
        # In models like BERT, the projection is beside attention or inside it, followed by residual and norm.
        around = attention.rpartition(".")[0]
        beside = f"{around}.output.dense" if around else attention
        inside = (f"{attention}.{last}" for last in _LAST_PROJECTIONS)
        paths = [beside, f"{attention}.output.dense", attention, *inside]
        # Of another model it is known whether what holds the attention adds the residual.
        if around and self.adds.get(self.module(around)) is False:
            paths.append(around)
        return next((path for path in paths if self._returns_states(path)), None)
