"""What a model gives with edits, found without `mimic_core.edits`: by torch's forward hooks and an attention function.

Edits are called one after another in the order in which they were put in. The functions of hooks and the formulas of
heads are the same as in the model under test. Where they are called, in which order and for which tokens is written a
second time here. The LSE is too, from its definition. So the bits are those of the library, except with heads that
read the LSE: these are compared by a tolerance, and their bits are those of a model that was patched once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mimic_core as mc
from tests.support.sequence_models import (
    FUNCTIONS,
    GATED,
    Outcome,
    Put,
    difference,
    held,
    inputs_of,
    kept_stack,
    layers_of,
    plain,
    put,
    run,
    same,
    stack,
    take_out,
)

Edits = tuple[Put, ...]
INSIDE = ("query", "key", "value", "lse", "attn_heads")


@dataclass(frozen=True)
class Edit:
    """One function at one site of one layer. `given`: the tokens that the caller names, whatever `positions` says."""

    layer: int
    site: str
    run: Callable[[Tensor, Any], Any]
    positions: Any = "all"
    given: Tensor | None = None

    @property
    def is_limited(self) -> bool:
        return self.given is not None or self.positions != "all"


class Seen:
    """What a function gets in place of `mc.At`."""

    def __init__(self, forwards: Forwards, edit: Edit, attention: dict[str, Any]) -> None:
        self.layer, self.site = edit.layer, edit.site
        self._forwards, self._edit = forwards, edit
        self.__dict__.update(attention)

    @property
    def prompt_end(self) -> Tensor:
        return self._forwards.chosen(self._edit, "prompt_end")

    @property
    def scale(self) -> float:
        return self.options.get("scaling", self.query.shape[-1] ** -0.5)

    @property
    def lse(self) -> Tensor:
        return log_sum_exp(self.module, self.query, self.key, self.mask, self.options)

    @property
    def lse_all_keys(self) -> Tensor:
        if any(self.options.get(name) is not None for name in ("softcap", "s_aux")):
            raise mc.UnsupportedModelError("the published code has neither")
        return log_sum_exp(self.module, self.query, self.key, None, {**self.options, "is_causal": False})


def log_sum_exp(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
    """The LSE of the logits of attention, from its definition."""
    t, s = query.shape[2], key.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query.double() @ key.double().mT) * options.get("scaling", query.shape[-1] ** -0.5)
    if softcap := options.get("softcap"):
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        mask = mask[..., :s]
        kept = mask if mask.dtype == torch.bool else mask > -1e4
        logits = logits.masked_fill(~kept, -torch.inf)
    elif t > 1 and (getattr(module, "is_causal", True) if options.get("is_causal") is None else options["is_causal"]):
        logits = logits.masked_fill(~torch.ones(t, s, dtype=torch.bool).tril(), -torch.inf)
    if (sinks := options.get("s_aux")) is not None:
        logits = torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], dim=-1)
    return logits.logsumexp(-1).to(query.dtype if query.dtype == torch.float64 else torch.float32)


class Forwards:
    """The forwards of one run of a model: which tokens each of them has, and which of these are in the prompt."""

    def __init__(self, family: str, how: str) -> None:
        self.how = how
        self.mask = inputs_of(family, other="other" in how)["attention_mask"].bool()
        self.count, self.inside, self.shape, self.has_grad = 0, False, (0, 0), False

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
        self.count, self.inside, self.shape = self.count + 1, True, tuple(tokens.shape[:2])
        self.has_grad = torch.is_grad_enabled()

    def end(self, *args: Any) -> None:
        self.inside = False

    def chosen(self, edit: Edit, positions: Any) -> Tensor:
        """The tokens [b t] of this forward that positions name."""
        if edit.given is not None:
            if edit.site in ("key", "value"):
                raise mc.PatchStateError("these hold the tokens of the cache too")
            return edit.given
        generates = self.how.startswith("generate")
        if not self.inside or (self.count > 1 and not generates) or (positions == "generated" and not generates):
            raise mc.PatchStateError("it is not known where the prompt ends")
        (rows, width), t = self.mask.shape, self.shape[1]
        end = width + self.count - 1
        prompt = torch.cat([self.mask, self.mask.new_zeros(rows, end - width)], dim=1)
        if positions == "generated":
            found = torch.arange(end).expand(rows, -1) >= width
        elif positions == "prompt":
            found = prompt
        else:
            pairs = [("last", 1)] if positions == "prompt_end" else [positions[:2], positions[2:]]
            counts = dict(pair for pair in pairs if pair)
            rank, left = prompt.cumsum(1), prompt.flip(1).cumsum(1).flip(1)
            found = prompt & ((rank <= counts.get("first", 0)) | (left <= counts.get("last", 0)))
        return found[:, end - t :]

    def apply(self, edit: Edit, value: Tensor, attention: dict[str, Any]) -> Tensor:
        new = edit.run(value.clone(), Seen(self, edit, attention))
        if new is None:
            new = value
        if not edit.is_limited:
            return new
        at = self.chosen(edit, edit.positions)
        at = at[:, None, :, None] if edit.site == "query" else at[..., None]
        return torch.where(at[..., None] if edit.site == "attn_heads" else at, new, value)

    def take(self, taken: dict[int, Tensor], grad: bool, value: Tensor, at: Seen) -> None:
        """What a capture does."""
        if not self.inside:
            return  # a checkpoint runs a layer again
        if at.layer in taken or (grad and self.has_grad and not torch.is_grad_enabled()):
            raise mc.PatchStateError("one capture, one forward; and no gradients where none are")
        taken[at.layer] = value.detach()


@contextmanager
def edited(model: Any, family: str, forwards: Forwards, edits: list[Edit]) -> Iterator[None]:
    """Inside, a model runs with edits, in their order."""
    layers, decoder = layers_of(model, family)
    at: dict[tuple[nn.Module, str], list[Edit]] = {}
    for edit in edits:
        layer = layers[edit.layer]
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        mlp = layer.mlp if hasattr(layer, "mlp") else layer.fc2
        module = {"layer_out": layer, "layer_in": layer, "mlp_out": mlp}.get(edit.site, attention)
        at.setdefault((module, edit.site), []).append(edit)

    def hook(module: nn.Module, args: Any, output: Any, ours: list[Edit]) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        shape = value.shape
        value = value.view(*forwards.shape, -1) if value.ndim == 2 else value
        for edit in ours:
            value = forwards.apply(edit, value, {})
        value = value.view(shape)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def feed(module: nn.Module, args: Any, ours: list[Edit]) -> Any:
        return (hook(module, (), args[0], ours), *args[1:])

    def attend(
        name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        found = {"query": query, "key": key, "value": value}
        seen = {"module": module, "mask": attention_mask, "options": options}
        for site in found:
            for edit in at.get((module, site), ()):
                found[site] = forwards.apply(edit, found[site], seen | found)
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        base = sdpa_attention_forward if name == "sdpa" else eager
        out, weights = base(module, *found.values(), attention_mask, **options)
        for edit in at.get((module, "lse"), ()):
            forwards.apply(edit, log_sum_exp(module, found["query"], found["key"], attention_mask, options), {})
        for edit in at.get((module, "attn_heads"), ()):
            out = forwards.apply(edit, out, seen | found)
        return out, weights

    hooks = [
        decoder.register_forward_pre_hook(forwards.begin, with_kwargs=True),
        decoder.register_forward_hook(forwards.end),
        *(
            module.register_forward_hook(partial(hook, ours=ours))
            for (module, site), ours in at.items()
            if site not in (*INSIDE, "layer_in")
        ),
        *(m.register_forward_pre_hook(partial(feed, ours=x)) for (m, site), x in at.items() if site == "layer_in"),
    ]
    for name in ("sdpa", "eager"):
        ALL_ATTENTION_FUNCTIONS[name] = partial(attend, name)  # in this object, not in the class
    try:
        yield
    finally:
        for name in ("sdpa", "eager"):
            del ALL_ATTENTION_FUNCTIONS[name]
        for one in hooks:
            one.remove()


def edits_of(family: str, what: Put, forwards: Forwards, depth: int, given: Tensor | None) -> tuple[list[Edit], Any]:
    """The edits of what is put into a model, and where they put what they take."""
    layers = range(depth) if what.layers is None else what.layers
    if what.kind == "stack":
        found = [
            Edit(head.layer.index, site, run, head.config.positions, given)
            for head in kept_stack(family, what)
            for site, run in head.edits().items()
        ]
        return found, None
    if what.kind == "hook":
        function = FUNCTIONS[what.name]
        return [
            Edit(layer, site, function, what.positions or "all", given) for site in what.sites for layer in layers
        ], None
    taken: dict[str, dict[int, Tensor]] = {site: {} for site in what.sites}
    grad = what.seed % 2 == 0
    return [
        Edit(layer, site, partial(forwards.take, taken[site], grad)) for site in what.sites for layer in layers
    ], taken


def by_torch(
    family: str, history: tuple[str, ...], edits: Edits, how: str, given: tuple[int, Tensor] | None = None
) -> tuple[Outcome, tuple[Any, ...]]:
    """What a model gives with edits, and what its captures hold. `given`: the tokens of one of the edits."""
    model, forwards = plain(family, history), Forwards(family, how)
    depth = len(layers_of(model, family)[0])
    made, taken = [], []
    for index, what in enumerate(edits):
        mask = given[1] if given is not None and given[0] == index else None
        found, into = edits_of(family, what, forwards, depth, mask)
        made += found
        taken += [] if into is None else [into]
    stacks = [kept_stack(family, what) for what in edits if what.kind == "stack"]
    with edited(model, family, forwards, made):
        outcome = run(model, family, how, stacks)
    return outcome, tuple({site: one for site, one in into.items() if one} or None for into in taken)


@lru_cache(maxsize=256)
def expected(family: str, history: tuple[str, ...], edits: Edits, how: str) -> tuple[Outcome, tuple[Any, ...]]:
    """What a model gives with edits, and what its captures hold.

    If the LSE enters it, the bits are those of a model into which the edits were put together. They are compared with
    those of torch here.
    """
    outcome, taken = by_torch(family, history, edits, how)
    if not any(reads_lse(what) for what in edits):
        return outcome, taken
    model, found, stacks = plain(family, history), [], []
    try:
        for what in edits:
            if what.kind == "stack":
                stacks.append(stack(family, what))
                found.append(mc.patch(model, stacks[-1]))
            else:
                found.append(put(model, what))
        together = run(model, family, how, stacks)
    finally:
        for one in found:
            take_out(one)
    held_together = tuple(held(one) for one in found if not isinstance(one, mc.Handle))
    check_close(family, history, how, together, outcome)
    return together, held_together


def reads_lse(what: Put) -> bool:
    """Whether the LSE enters what it gives: there the second formula has other bits."""
    return "lse" in what.sites or (what.kind == "stack" and what.name in GATED)


def check_close(family: str, history: tuple[str, ...], how: str, found: Outcome, wanted: Outcome) -> None:
    """Compare what has other bits than the second formula: the logits of tokens that are not padding, fp32 or fp64."""
    assert found[:1] == wanted[:1], f"{how}: {difference(found, wanted)}"
    if found[0] != "gives":
        assert same(found, wanted), f"{how}: {found} and not {wanted}"
    elif "forward" in how and not {"half", "bfloat16"} & set(history):
        real = inputs_of(family, other="other" in how)["attention_mask"].bool()
        for a, b in zip(found[1:], wanted[1:], strict=True):
            a, b = (a[real], b[real]) if a.shape[:2] == real.shape else (a, b)
            assert torch.equal(a.isfinite(), b.isfinite()), f"{how}: not finite in other places"
            a, b = (x.where(x.isfinite(), 0) for x in (a, b))
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item()), f"{how}: {(a - b).abs().max()}"
