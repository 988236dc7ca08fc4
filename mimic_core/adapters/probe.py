"""Run a text decoder once on a few tokens, and record which modules run, how often, and what attention gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import is_not
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..edits import installed
from ..edits.entry import Bystander, Entry, SiteEdit
from ..edits.interface import SLOT, AttentionSlot
from ..errors import PatchStateError, UnsupportedModelError
from ..types import At

TOKENS = 4
"""Number of tokens of a probe. With one token it would be a decoding step."""

_OF_OTHERS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@dataclass(frozen=True)
class AttentionSeen:
    """One call of the attention interface. `tokens` is b and t of the queries, `logits` as in `At`."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tokens: tuple[int, int]
    logits: tuple[str, ...]


class Value(NamedTuple):
    """A tensor of a forward. Two are equal if they are the same numbers in the same memory, in whatever shape."""

    storage: int
    version: int
    numbers: int


class Passed(NamedTuple):
    """The first argument and the output of a call (of a tuple, its first element). None: no plain tensor."""

    shape: tuple[int, ...] | None
    given: Value | None
    returned: Value | None


@dataclass(eq=False)
class Probe:
    """The results of a probe, by module path in the model.

    Attributes:
        outputs: The shape of each call's output (of the first element of a tuple), in the order of calls. None if that
            is not a tensor.
        passed: What each call got and gave; the modules in the order in which they first ended.
        attention: The calls of the attention interface.
        crossed: Modules that got the states of an encoder or of images as an argument.
    """

    outputs: dict[str, list[tuple[int, ...] | None]] = field(default_factory=dict)
    passed: dict[str, list[Passed]] = field(default_factory=dict)
    attention: dict[str, list[AttentionSeen]] = field(default_factory=dict)
    crossed: set[str] = field(default_factory=set)


_kept: WeakKeyDictionary[nn.Module, tuple[list[nn.Module], Probe]] = WeakKeyDictionary()


def probe(model: nn.Module, decoder: nn.Module) -> Probe:
    """Run `decoder`, or else `model`, on four tokens in eval mode without gradients, and record what runs.

    Modules, their modes and torch's random state do not change. Edits that the model already has are off meanwhile. The
    result is kept as long as the model's modules are the same.

    Raises:
        UnsupportedModelError: neither runs on text without other inputs.
        PatchStateError: the model has edits, and they refuse the forward, or another thread is inside one of it.
    """
    modules = list(model.modules())[1:]  # without the model: a reference from the cached value would keep it alive
    before, seen = _kept.get(model, ([], None))
    if seen is None or len(before) != len(modules) or any(map(is_not, before, modules)):
        with unedited(model):
            seen = _probe(model, decoder)
        _kept[model] = modules, seen
    return seen


def _probe(model: nn.Module, decoder: nn.Module) -> Probe:
    names = {module: name for name, module in model.named_modules(remove_duplicate=True)}
    inside = [m for m in decoder.modules() if m in names]
    found: list[Probe] = []

    def watch() -> AbstractContextManager[None]:
        found.append(Probe())
        return _watched(inside, names, found[-1])

    run_on_text(model, decoder, watch)
    return found[-1]


def run_on_text(model: nn.Module, decoder: nn.Module, watch: Callable[[], AbstractContextManager[None]]) -> None:
    """Run `decoder`, or else `model`, on four tokens inside `watch()`.

    Raises:
        UnsupportedModelError: neither runs on text without other inputs.
        PatchStateError: edits that the model already has refuse the forward.
    """
    vocabulary = _vocabulary(model, decoder)
    errors = []
    for runner in dict.fromkeys((decoder, model)):
        try:
            # Not in inference mode, where tensors do not know whether they were written to.
            with watch(), _calm(model), torch.inference_mode(False), torch.no_grad():
                runner(**_text_for(runner, vocabulary))
        except PatchStateError:  # edits that are in it already refuse the forward: the model is not to blame
            raise
        except Exception as error:  # a model can raise anything on an input that it does not support
            errors.append(f"{type(runner).__name__}: {type(error).__name__}: {error}")
        else:
            return
    raise UnsupportedModelError(
        f"{type(model).__name__} does not run on {TOKENS} tokens of text alone ({'; '.join(errors)})"
    )


def _vocabulary(model: nn.Module, decoder: nn.Module) -> tuple[int, torch.device]:
    for holder in (decoder, model):
        try:
            table = holder.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(weight := getattr(table, "weight", None), Tensor):
            device = weight.device
            return int(weight.shape[0]), device
    return 8, next((p.device for p in model.parameters()), torch.device("cpu"))


def _text_for(runner: nn.Module, vocabulary: tuple[int, torch.device]) -> dict[str, Any]:
    size, device = vocabulary
    # Ids after the usual special ones: padding tokens would be masked.
    ids = torch.arange(5, 5 + TOKENS, device=device) % size
    text: dict[str, Any] = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long, device=device),
    }
    taken = inspect.signature(runner.forward).parameters
    if device.type == "meta":
        # Weights not in memory yet. The mask of padding and that of packed samples are then looked into, which needs
        # numbers; without the first, and with a cache, there is neither.
        del text["attention_mask"]
    elif "use_cache" in taken:
        text["use_cache"] = False
    if "decoder_input_ids" in taken:
        text["decoder_input_ids"] = ids[None]
    everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return {name: x for name, x in text.items() if name in taken or everything}


@contextmanager
def unedited(model: nn.Module) -> Iterator[None]:
    """Switch the edits of the model off: a capture would hold these tokens, and a hook would be called with them."""
    with ExitStack() as off:
        for one in installed(*model.modules()):
            one.switch_off()
            off.callback(one.switch_on)
        yield


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and restore the mode of each module and the random state afterwards."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.random.fork_rng(enabled=not torch.compiler.is_compiling()):
            yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _watched(modules: list[nn.Module], names: dict[nn.Module, str], seen: Probe) -> Iterator[None]:
    alive: list[Any] = []  # a tensor that is gone could leave its memory to another

    def value(x: Any) -> Value | None:
        if type(x) is not Tensor or x.is_inference() or torch.compiler.is_compiling():
            return None
        alive.append(x)
        return Value(x.untyped_storage()._cdata, x._version, x.numel())

    def ran(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        shape = tuple(first.shape) if isinstance(first, Tensor) else None
        seen.outputs.setdefault(names[module], []).append(shape)
        given = args[0] if args else kwargs.get(next(iter(inspect.signature(module.forward).parameters), ""))
        of_given = tuple(given.shape) if isinstance(given, Tensor) else None
        seen.passed.setdefault(names[module], []).append(Passed(of_given, value(given), value(first)))

    def enters(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if any(kwargs.get(name) is not None for name in _OF_OTHERS):
            seen.crossed.add(names[module])

    def attended(out: Tensor, at: At) -> None:
        b, h, t, d = at.query.shape
        call = AttentionSeen(h, at.key.shape[1], d, out.shape[-1], (b, t), at.logits)
        seen.attention.setdefault(names[at.module], []).append(call)

    watch = Entry(SiteEdit(0, "attn_heads", attended), Bystander(), bit=1)
    hooks = [m.register_forward_hook(ran, with_kwargs=True) for m in modules]
    hooks += [m.register_forward_pre_hook(enters, with_kwargs=True) for m in modules]
    slots: list[tuple[nn.Module, AttentionSlot]] = []
    try:
        for m in modules:
            slot = m.__dict__.get(SLOT) or AttentionSlot()
            m.__dict__[SLOT] = slot
            slots.append((m, slot))
            slot.hold((*slot.entries, watch))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for m, slot in slots:
            slot.hold(tuple(e for e in slot.entries if e is not watch))
            if not slot.entries:
                del m.__dict__[SLOT]
                slot.release()
