"""The models of random sequences: what is put into one, how it runs, and what a fresh one gives with the same edits."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

import mimic_core as mc
from mimic_core.heads import head_for_config
from tests.support.cases import BY_NAME, HEADS, SITE_OF_HEAD, as_dtype, fresh_model
from tests.support.snapshot import snapshot
from tests.zoo.tiny import tiny

Outcome = tuple[Any, ...]
GATED = tuple(name for name, x in HEADS.items() if getattr(x, "gate", False) or head_for_config(x).needs_lse)
"""The heads that read the LSE."""
_LAYERS = {
    "idefics2": "model.text_model.layers",
    "llava": "model.language_model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}
FAMILIES = (*BY_NAME, "gemma2", "gpt_oss", "opt", "gpt_neox")
UNWRAPPED = AttentionInterface.get_interface


class Interrupt(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


@dataclass(frozen=True)
class Put:
    """What is put into a model, described so that it can be put into another one.

    Attributes:
        kind: "stack", "hook" or "capture".
        name: The head in `HEADS`, or the function in `FUNCTIONS`.
        sites: Of a hook or a capture.
        layers: Of a hook or a capture; None means all.
        seed: Of the numbers of a stack.
        positions: The tokens on which a stack or a hook acts; None means those of the head's config.
    """

    kind: str
    name: str = ""
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    seed: int = 0
    positions: Any = None


@dataclass(eq=False)
class Active:
    """One edit in the model.

    Attributes:
        handle: A handle or a capture.
        stands: The module of layer 1 that PEFT replaces and that may itself be a site: OPT's `fc2`.
        off: The open `disabled()` of it.
    """

    what: Put
    handle: Any
    shifts: mc.ShiftStack | None
    stands: Any = None
    off: list[contextlib.ExitStack] = field(default_factory=list)

    @property
    def is_used_capture(self) -> bool:
        return self.what.kind == "capture" and any(self.handle._taken.values())


def _read(value: Tensor, at: mc.At) -> None:
    assert value.ndim > 1


def _double(value: Tensor, at: mc.At) -> Tensor:
    return value * 2


def _add_one(value: Tensor, at: mc.At) -> Tensor:
    return value + 1


def _read_lse(value: Tensor, at: mc.At) -> None:
    assert at.lse.ndim == 3


def _at_prompt_end(value: Tensor, at: mc.At) -> Tensor:
    return torch.where(at.prompt_end[..., None], value * 0.5, value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "read": _read,
    "double": _double,
    "add one": _add_one,
    "read the LSE": _read_lse,
    "at the prompt's end": _at_prompt_end,
}
SITES_OF = {
    "read": ("query", "key", "value", "lse", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in"),
    "double": ("query", "key", "value", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in"),
    "add one": ("query", "key", "value", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in"),
    "read the LSE": ("query", "attn_heads"),
    "at the prompt's end": ("attn_out", "mlp_out", "layer_out"),
}


@lru_cache
def _built(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its inputs: two samples, the second padded on the left."""
    if family in BY_NAME:
        case = BY_NAME[family]
        return fresh_model(case), case.inputs("left")
    made = tiny(family)
    model, inputs = made.model, made.inputs(padding="left")
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model, inputs


@lru_cache
def pristine(family: str) -> nn.Module:
    """A model that nobody changes. It has run in every way, because transformers then adds attributes."""
    model = _built(family)[0]
    for how in ways(family):
        run(model, family, how, [])
    return model


def inputs_of(family: str, other: bool = False) -> dict[str, Tensor]:
    """The inputs of a family; the other ones are the second sample alone, without its padding."""
    inputs = _built(family)[1]
    if not other:
        return inputs
    real = inputs["attention_mask"][1].bool()
    return {name: x[1:, real] if x.ndim > 1 and x.shape[1] == len(real) else x[1:] for name, x in inputs.items()}


def inner_of(outer: Any) -> Any:
    """A model without PEFT around it."""
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


def layers_of(outer: Any, family: str) -> tuple[Any, nn.Module]:
    """The decoder layers by their names, and the decoder."""
    path = _LAYERS.get(family, "model.layers")
    inner = inner_of(outer)
    return inner.get_submodule(path), inner.get_submodule(path.rpartition(".")[0])


def _lora(inner: nn.Module) -> LoraConfig:
    """LoRA at every linear module of the second layers, with an effect from the start. In all layers it takes long."""
    targets = [name for name, m in inner.named_modules() if isinstance(m, nn.Linear) and "layers.1." in name]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False)


def change_model(outer: Any, change: str) -> Any:
    """What users do to a model beside patching it. Returns the model to call."""
    inner = inner_of(outer)
    if change in DTYPES:
        outer.to(DTYPES[change])
    elif change == "LoRA":
        torch.default_generator.manual_seed(1)
        return get_peft_model(inner, _lora(inner)).eval()
    elif change == "no LoRA":
        return outer.unload()
    elif change == "no checkpointing":
        inner.gradient_checkpointing_disable()
        inner.eval()
    else:
        reentrant = change == "reentrant checkpointing"
        inner.train()
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inner.enable_input_require_grads()
    return outer


@lru_cache(maxsize=64)
def plain(family: str, history: tuple[str, ...]) -> Any:
    """A model that was changed like another one, and is never patched except for one comparison."""
    if not history:
        return copy.deepcopy(pristine(family))
    return change_model(copy.deepcopy(plain(family, history[:-1])), history[-1])


def put(model: nn.Module, what: Put) -> Any:
    """A handle, or a capture that has been entered."""
    if what.kind == "hook":
        return mc.hook(model, what.sites[0], FUNCTIONS[what.name], what.layers, what.positions or "all")
    return mc.capture(model, what.sites, layers=what.layers, grad=what.seed % 2 == 0).__enter__()


@lru_cache
def kept_stack(family: str, what: Put) -> mc.ShiftStack:
    """A stack that is never in a model."""
    config = HEADS[what.name] if what.positions is None else replace(HEADS[what.name], positions=what.positions)
    shifts = mc.build_shifts(pristine(family), config)
    draw = torch.Generator().manual_seed(what.seed)
    for parameter in shifts.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return shifts


def stack(family: str, what: Put) -> mc.ShiftStack:
    """A stack of its own for a model of the family."""
    return copy.deepcopy(kept_stack(family, what))


def take_out(what: Any) -> None:
    what.remove() if isinstance(what, mc.Handle) else what.__exit__(None, None, None)


def run(model: Any, family: str, how: str, stacks: list[mc.ShiftStack]) -> Outcome:
    """Run a model in one of the ways of `RUNS`: tensors, or that the library refused."""
    torch.default_generator.manual_seed(2)  # torch.manual_seed takes a millisecond
    dtype = next(model.parameters()).dtype
    inputs = as_dtype(inputs_of(family, other="other" in how), dtype)
    try:
        return ("gives", *RUNS[how](model, inputs, stacks))
    except mc.MimicError as error:
        return "refused", type(error).__name__


def _forward(model: Any, inputs: dict[str, Tensor], stacks: Any) -> Outcome:
    with torch.no_grad():
        return (model(**inputs, use_cache=False).logits,)


def _base(model: Any, inputs: dict[str, Tensor], stacks: Any) -> Outcome:
    inner = inner_of(model)
    with torch.no_grad():
        return (inner.base_model(**inputs, use_cache=False).last_hidden_state,)


def _cached(model: Any, inputs: dict[str, Tensor], stacks: Any) -> Outcome:
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        logits = [out.logits]
        for step in range(1, 3):
            ids = out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            more = {"attention_mask": mask, "position_ids": positions[:, -1:] + step, "use_cache": True}
            out = model(input_ids=ids, past_key_values=out.past_key_values, **more)
            logits.append(out.logits)
    return tuple(logits)


def _generate(model: Any, inputs: dict[str, Tensor], stacks: Any, **options: Any) -> Outcome:
    inputs = {name: x for name, x in inputs.items() if name != "position_ids"}
    kept = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **kept, **options)
    return out.sequences, *out.logits


def _generate_static(model: Any, inputs: dict[str, Tensor], stacks: Any) -> Outcome:
    return _generate(model, inputs, stacks, cache_implementation="static", disable_compile=True)


def _backward(model: Any, inputs: dict[str, Tensor], stacks: list[mc.ShiftStack]) -> Outcome:
    for module in (model, *stacks):
        module.zero_grad(set_to_none=True)
    logits = model(**inputs, use_cache=False).logits
    if not logits.requires_grad:
        return (logits,)
    logits.float().square().mean().backward()
    grads = [p.grad for one in (*stacks, model) for p in one.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return logits.detach(), *grads


RUNS: dict[str, Callable[[Any, dict[str, Tensor], list[mc.ShiftStack]], Outcome]] = {
    "forward": _forward,
    "other forward": _forward,
    "forward of the base model": _base,
    "cached forward": _cached,
    "generate": _generate,
    "generate, static cache": _generate_static,
    "backward": _backward,
}
_NOT_CACHED = ("idefics", "idefics2", "llava")


def ways(family: str) -> list[str]:
    """The runs that the unpatched model has."""
    missing = {"cached forward"} if family in _NOT_CACHED else set()
    return [how for how in RUNS if how not in missing | ({"generate, static cache"} if family == "idefics" else set())]


def edited_sites(what: Put) -> tuple[str, ...]:
    return what.sites if what.kind != "stack" else (SITE_OF_HEAD[what.name],) + ("mlp_out",) * ("mlp" in what.name)


def held(capture: mc.Capture) -> Any:
    """What a capture has taken; None if nothing."""
    try:
        return {site: dict(capture[site]) for site in capture._taken}
    except mc.PatchStateError:
        return None


def same(found: Any, wanted: Any) -> bool:
    """Whether two outcomes are the same, tensors bit for bit.

    Of two reasons to refuse a forward, positions and what the head needs of the attention, either may be told.
    """
    reasons = (("refused", "PatchStateError"), ("refused", "UnsupportedModelError"))
    if isinstance(wanted, tuple) and len(wanted) == 2 and isinstance(wanted[0], str) and wanted in reasons:
        return found in reasons
    if isinstance(wanted, Tensor):
        return isinstance(found, Tensor) and found.dtype == wanted.dtype and torch.equal(_bits(found), _bits(wanted))
    if isinstance(wanted, dict):
        return found is not None and found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted


def _bits(x: Tensor) -> Tensor:
    return x.detach().nan_to_num(nan=1e4) if x.is_floating_point() else x


def in_thread(work: Callable[[], Any]) -> Any:
    """What a function returns or raises in a thread of its own."""
    found: list[Any] = []
    error: list[BaseException] = []

    def begin() -> None:
        try:
            found.append(work())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(timeout=60)
    if error:
        raise error[0]
    return found[0]


def changes(before: Any, after: Any) -> list[Any]:
    """What two snapshots do not share."""
    apart = [(name, before[0].get(name), one) for name, one in after[0].items() if before[0].get(name) != one]
    return [*apart, *((a, b) for a, b in zip(before[1:], after[1:], strict=True) if a != b)]


def difference(found: Any, wanted: Any) -> str:
    """In words: how far two outcomes are apart."""
    if found is None or found[:1] != wanted[:1] or found[0] != "gives" or len(found) != len(wanted):
        return f"{_words(found)} and not {_words(wanted)}"
    pairs = [
        (a, b) for a, b in zip(found[1:], wanted[1:], strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)
    ]
    apart = [(a - b).abs().max().item() if a.shape == b.shape else a.shape for a, b in pairs]
    return f"{apart} apart"


def _words(outcome: Any) -> str:
    return str(outcome if outcome is None or outcome[0] != "gives" else outcome[0])


def off_and_on(handle: mc.Handle) -> None:
    with handle.disabled():
        pass


def here(work: Callable[[], Any]) -> Any:
    return work()


def check_refused(model: Any, shifts: mc.ShiftStack | None = None) -> None:
    """A stack, or a hook, can't be put into the model."""
    with pytest.raises(mc.PatchStateError):
        put(model, Put("hook", "double", ("query",))) if shifts is None else mc.patch(model, shifts)


def check_as_it_was(family: str, history: tuple[str, ...], model: Any) -> None:
    """A model is as one that was never patched."""
    apart = changes(snapshot(inner_of(plain(family, history))), snapshot(model))
    assert apart == [], f"the model is not as it was: {str(apart)[:2000]}"
