"""Run a text decoder once on a few tokens, and record which modules run, how often, and what attention gets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..edits import installed
from ..edits.eager import Recipe
from ..edits.entry import Bystander, Entry, SiteEdit
from ..edits.frames import by_name
from ..edits.interface import SLOT, AttentionSlot
from ..edits.named import Called, Named, by_nobody, frames
from ..edits.signatures import reading
from ..edits.watch import shape_of_tokens
from ..errors import PatchStateError, UnsupportedModelError
from ..types import At
from .looking import Looking, followed, sizes_of

TOKENS = 4
"""Number of tokens of a probe. With one token it would be a decoding step."""

Example = Mapping[str, Any] | tuple[Any, ...]
"""Arguments of a model's forward: by name, or in their order."""

_OF_OTHERS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@dataclass(frozen=True)
class AttentionSeen:
    """One call of the attention interface. Or `own`: of a function by its name, or a recipe.

    `tokens` is b and t of the queries, `keys` the number of keys, `logits` as in `At`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tokens: tuple[int, int]
    keys: int
    logits: tuple[str, ...] = ()
    own: Recipe | Named | None = None


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
        begun: The module of each call, in the order in which they began.
        attention: The calls of the attention interface, and the attention of modules that don't ask it.
        crossed: Modules that got the states of an encoder or of images as an argument.
        odd: What was seen of attention that is not understood.
        tokens: b and t of what the model got.
        follows: Attention outside of the interface was looked for too.
    """

    outputs: dict[str, list[tuple[int, ...] | None]] = field(default_factory=dict)
    passed: dict[str, list[Passed]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    attention: dict[str, list[AttentionSeen]] = field(default_factory=dict)
    crossed: set[str] = field(default_factory=set)
    odd: dict[str, str] = field(default_factory=dict)
    tokens: tuple[int, int] = (1, TOKENS)
    follows: bool = False


_kept: WeakKeyDictionary[nn.Module, tuple[list[ref[nn.Module]], Example | None, Probe]] = WeakKeyDictionary()


def probe(model: nn.Module, decoder: nn.Module, example: Example | None = None, follows: bool = False) -> Probe:
    """Run `decoder`, or else `model`, on four tokens in eval mode without gradients, and record what runs.

    With an example, the model runs on that. Modules, their modes and torch's random state do not change. Edits that the
    model already has are off meanwhile. The result is kept as long as the model's modules and the example are the same.

    Args:
        follows: Look for attention outside of the interface too. This runs the decoder again, and slowly.

    Raises:
        UnsupportedModelError: neither runs on text without other inputs, or the model not on the example.
        PatchStateError: the model has edits, and they refuse the forward, or another thread is inside one of it.
    """
    modules = list(model.modules())
    before, of, seen = _kept.get(model, ([], None, None))
    if (
        seen is None
        or of is not example
        or (follows and not seen.follows)
        or len(before) != len(modules)
        or any(old() is not m for old, m in zip(before, modules, strict=True))
    ):
        with unedited(model):
            seen = _probe(model, decoder, example, follows)
        # Weakly: modules with edits hold the model, so it would never be collected.
        _kept[model] = [ref(m) for m in modules], example, seen
    return seen


def probe_attention(model: nn.Module, decoder: nn.Module, example: Example | None, paths: Iterable[str]) -> Probe:
    """`probe`, which looks for attention outside of the interface too if modules were not seen to attend."""
    seen = probe(model, decoder, example)
    return seen if all(map(seen.attention.get, paths)) else probe(model, decoder, example, follows=True)


def _probe(model: nn.Module, decoder: nn.Module, example: Example | None, follows: bool) -> Probe:
    tokens = (1, TOKENS) if example is None else _tokens_in(model, example)
    names = {module: name for name, module in model.named_modules(remove_duplicate=True)}
    inside = [m for m in decoder.modules() if m in names]
    found: list[Probe] = []

    @contextmanager
    def watch() -> Iterator[None]:
        found.append(Probe(tokens=tokens, follows=follows))
        with _watched(inside, names, found[-1], follows or may_attend_alone(model)):
            with followed(inside, tokens[0]) if follows else nullcontext({}) as own:
                yield
        _add(found[-1], {names[module]: runs for module, runs in own.items()})

    run_on_text(model, decoder, watch, example)
    return found[-1]


def _add(seen: Probe, followers: Mapping[str, list[Looking]]) -> None:
    """Add the attention that modules compute by themselves: that of the innermost modules that do."""
    asked = list(seen.attention)
    computes = {path: [one for run in runs for one in run.found] for path, runs in followers.items()}
    for path, calls in computes.items():
        if any(other.startswith(f"{path}.") or f"{path}.".startswith(f"{other}.") for other in asked):
            continue
        if calls and not any(computes[other] for other in computes if other.startswith(f"{path}.")):
            seen.attention[path] = [AttentionSeen(*one) for one in calls]
        elif odd := dict.fromkeys(word for run in followers[path] for word in run.odd):
            seen.odd[path] = "; ".join(odd)


def run_on_text(
    model: nn.Module,
    decoder: nn.Module,
    watch: Callable[[], AbstractContextManager[None]],
    example: Example | None = None,
) -> None:
    """Run `decoder`, or else `model`, on four tokens inside `watch()`. With an example, run `model` on that.

    Raises:
        UnsupportedModelError: neither runs on text without other inputs, or the model not on the example.
        PatchStateError: edits that the model already has refuse the forward.
    """
    errors = []
    for runner, args, kwargs in _texts(model, decoder) if example is None else [(model, *_like(model, example))]:
        try:
            # Not in inference mode, where tensors do not know whether they were written to.
            with watch(), _as_written(), _calm(model), torch.inference_mode(False), torch.no_grad():
                runner(*args, **kwargs)
        except PatchStateError:  # edits that are in it already refuse the forward: the model is not to blame
            raise
        except Exception as error:  # a model can raise anything on an input that it does not support
            errors.append(f"{type(runner).__name__}: {type(error).__name__}: {error}")
        else:
            return
    what = f"{TOKENS} tokens of text alone" if example is None else "the example"
    raise UnsupportedModelError(f"{type(model).__name__} does not run on {what} ({'; '.join(errors)})")


def _tokens_in(model: nn.Module, example: Example) -> tuple[int, int]:
    """b and t of an example."""
    args, kwargs = _like(model, example)
    given = by_name(type(model).forward, args, kwargs)
    shape = shape_of_tokens({name: given[name] for name in (*token_names(given), *given)})
    if shape is None or shape[0] == shape[1]:
        found = "no tensor of tokens [b t ...] comes first" if shape is None else f"[b t] is {list(shape[:2])}"
        raise UnsupportedModelError(f"the example must tell samples from tokens by their numbers, but {found}")
    ids = token_names(given)
    for name, x in given.items():
        if ids and isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 and x.shape[1] == shape[1]:
            raise UnsupportedModelError(
                f"attention to {name!r} of the example could not be told from attention to its tokens, because both "
                f"are {shape[1]}: give it another number of either"
            )
    return shape[0], shape[1]


def token_names(given: Mapping[str, Any]) -> list[str]:
    """The arguments that may be token ids [b t]: whole numbers. Images may come before them."""
    return [k for k, x in given.items() if isinstance(x, Tensor) and x.ndim == 2 and x.dtype == torch.long]


def _like(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example on the device and in the dtype that the model has now."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or weight is None:
            return x
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    if isinstance(example, Mapping):
        return (), {name: moved(x) for name, x in example.items()}
    return tuple(map(moved, example)), {}


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


def _texts(model: nn.Module, decoder: nn.Module) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """What may run on text, with its arguments."""
    size, device = _vocabulary(model, decoder)
    # Ids after the usual special ones: padding tokens would be masked.
    ids = torch.arange(5, 5 + TOKENS, device=device)[None] % size
    for runner in dict.fromkeys((decoder, model)):
        text = _text_for(runner, ids)
        if any(x is ids for x in text.values()):
            yield runner, (), text
    if "input_ids" not in inspect.signature(model.forward).parameters:
        yield model, (ids,), {}


def _text_for(runner: nn.Module, ids: Tensor) -> dict[str, Any]:
    device = ids.device
    text: dict[str, Any] = {
        "input_ids": ids,
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
        text["decoder_input_ids"] = ids
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


def _as_written() -> AbstractContextManager[Any]:
    """Run parts of a model uncompiled that were compiled by themselves: what they call then is not seen."""
    if "torch._dynamo.eval_frame" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


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


def may_attend_alone(model: nn.Module) -> bool:
    """Whether calls of torch's SDPA are looked for: not in the files of transformers, which has its interface."""
    return not type(model).__module__.startswith("transformers.")


class _Attends:
    """A module that runs: its calls of attention functions are recorded."""

    is_on = True

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, calls: list[AttentionSeen], odd: list[str]) -> None:
        self._module, self._given, self._calls, self._odd = module, (args, kwargs), calls, odd

    def attend(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = reading(called, self._module, args, kwargs, *self._given)
        with by_nobody():
            out = called.original(*args, **kwargs)
        if isinstance(call, str):
            self._odd.append(f"{called.kind} {call}")
            return out
        self._calls.append(AttentionSeen(*sizes_of(call, Named.seen(called, self._module))))
        return out


@contextmanager
def _watched(modules: list[nn.Module], names: dict[nn.Module, str], seen: Probe, alone: bool) -> Iterator[None]:
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
        if alone:
            frames().pop()

    def enters(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.begun.append(names[module])
        if any(kwargs.get(name) is not None for name in _OF_OTHERS):
            seen.crossed.add(names[module])
        if alone:
            path = names[module]
            found = own.setdefault(path, []), odd.setdefault(path, [])
            frames().append(_Attends(module, args, kwargs, *found))

    def attended(out: Tensor, at: At) -> None:
        b, h, t, d = at.query.shape
        call = AttentionSeen(h, at.key.shape[1], d, out.shape[-1], (b, t), at.key.shape[2], at.logits)
        seen.attention.setdefault(names[at.module], []).append(call)

    own: dict[str, list[AttentionSeen]] = {}
    odd: dict[str, list[str]] = {}
    depth = len(frames())
    release = Named.everywhere().retain(seen) if alone else lambda: None
    watch = Entry(SiteEdit(0, "attn_heads", attended), Bystander(), bit=1)
    hooks = [m.register_forward_hook(ran, with_kwargs=True) for m in modules]
    hooks += [m.register_forward_pre_hook(enters, with_kwargs=True) for m in modules]
    slots: list[tuple[nn.Module, AttentionSlot]] = []
    try:
        for m in modules:
            slot = m.__dict__.get(SLOT) or AttentionSlot()
            if slot.own:
                continue  # its edits are off, so its calls come here
            m.__dict__[SLOT] = slot
            slots.append((m, slot))
            slot.hold((*slot.entries, watch))
        yield
        # Transformers' functions call SDPA too.
        seen.attention.update({name: calls for name, calls in own.items() if calls and name not in seen.attention})
        seen.odd.update({name: "; ".join(dict.fromkeys(words)) for name, words in odd.items() if words})
    finally:
        release()
        del frames()[depth:]
        for hook in hooks:
            hook.remove()
        for m, slot in slots:
            slot.hold(tuple(e for e in slot.entries if e is not watch))
            if not slot.entries:
                del m.__dict__[SLOT]
                slot.release()
