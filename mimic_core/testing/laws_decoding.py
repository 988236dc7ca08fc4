"""Laws about using a patched model: cached decoding, padding, gradient checkpointing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import ShiftStack
from .batches import copied
from .laws_values import oracle_of
from .oracle import Oracle, Seen
from .rehearsal import rehearse
from .subject import Gap, Subject
from .verdicts import BrokenLaw, NotApplicable, Raised, attempt

_STEPS = 4


@dataclass(frozen=True)
class Generated:
    """Greedy decoding of a few tokens.

    `prompt` has the arguments of generate, `tokens` [b n] the new tokens, `logits` those [b vocabulary] of each step.
    """

    prompt: dict[str, Any]
    tokens: Tensor
    logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class Padded:
    """Samples alone, and together with padding on either side. `own` is its effect on the unpatched model."""

    alone: list[dict[str, Any]]
    left: dict[str, Any]
    right: dict[str, Any]
    own: Agreement


def generated(s: Subject, fresh: bool = False) -> Generated:
    """The result of generate by the unpatched model, computed once. With `fresh`, by the model in its present state."""
    if "generated" not in s.kept:
        s.kept["generated"] = _first_that_generates(s)
    found: Generated | str = s.kept["generated"]
    if isinstance(found, str):
        raise NotApplicable(found)
    return _generate(s, found.prompt) if fresh else found


def _first_that_generates(s: Subject) -> Generated | str:
    can = getattr(s.inner, "can_generate", None)
    if not callable(can) or not can():
        return "the model has no generate"
    if "input_ids" not in s.inputs:
        return "there are no input_ids to continue"
    errors = []
    padded = _padded(s)
    prompts = [] if isinstance(padded, str) else [padded.left]
    prompts += [s.batches.samples(inputs)[0] for inputs in (s.inputs, s.batches.text())]
    for prompt in prompts:
        asked = {name: x for name, x in prompt.items() if name != "position_ids"}
        found = attempt(lambda asked=asked: rehearse(s, asked) or _generate(s, asked))
        if not isinstance(found, Raised):
            return found
        errors.append(str(found))
    return f"the unpatched model does not generate: {errors[-1]}"


def _generate(s: Subject, prompt: Mapping[str, Any]) -> Generated:
    torch.manual_seed(0)
    batches = s.batches
    # Special tokens in the answer, such as image placeholders and padding, would change the later full forward.
    barred = sorted({i for i in (*batches.special, batches.padding) if i < batches.vocabulary})
    model: Any = s.model
    with torch.no_grad():
        out = model.generate(
            **copied(prompt),
            max_new_tokens=_STEPS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            suppress_tokens=barred,
            pad_token_id=batches.padding,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Generated(dict(prompt), out.sequences[:, -len(out.logits) :], tuple(out.logits))


def cached_decoding(s: Subject) -> str:
    """Decoding with a cache gives the same logits as a full forward of the same tokens."""
    plain = generated(s)
    own, positions = _own_agreement(s, plain)
    tolerance = s.tolerance(own.logits)
    stacks, words = _stacks_for(s, own)
    with s.patched(stacks):
        found = generated(s, fresh=True)
        gap = _cached_gap(s, found, positions)
    with torch.no_grad():
        unshifted = _full(s, found, positions)
    effect = s.gap(torch.stack(found.logits, 1), unshifted, unshifted).error
    if not gap.error <= tolerance:
        with oracle_of(s, stacks):
            _not_the_models_doing(_cached_gap(s, generated(s, fresh=True), positions).error, tolerance)
        raise BrokenLaw(f"{gap.error:.1e} apart (tolerance {tolerance:.0e}; unpatched {own.logits:.1e})")
    if not effect > 10 * tolerance:
        raise BrokenLaw(f"the shifts move the decoded logits by {effect:.1e} only")
    return f"difference {gap.error:.1e} (tolerance {tolerance:.0e}), the shifts move the logits by {effect:.1e}{words}"


def _not_the_models_doing(error: float, tolerance: float) -> None:
    """Raise NotApplicable if the model also breaks the law when the oracle shifts it.

    A router or a top-k may choose differently after a difference in the last bit.
    """
    if not error <= tolerance:
        raise NotApplicable(f"the model itself breaks the law: shifted by the oracle, it is also {error:.1e} apart")


@dataclass(frozen=True)
class Agreement:
    """The difference between two runs of the unpatched model, in logits and in the queries of attention.

    The runs may count positions differently. This does not change attention, which depends only on distances, but it
    changes a gate, which reads rotated queries.
    """

    logits: float
    queries: float

    @property
    def of_positions(self) -> bool:
        return self.queries < 1e-3

    @property
    def rank(self) -> tuple[bool, bool, float]:
        return not self.logits < 1e-4, not self.of_positions, self.logits


def _stacks_for(s: Subject, own: Agreement) -> tuple[dict[str, ShiftStack], str]:
    """The stacks, without gates if positions are counted differently, and a note for the report."""
    stacks = s.stacks()
    if own.of_positions or "MimIC" not in stacks:
        return stacks, ""
    words = f"; without gate, which reads rotated queries: the unpatched model's differ by {own.queries:.1e}"
    return {name: stack for name, stack in stacks.items() if name != "MimIC"}, words


def _own_agreement(s: Subject, plain: Generated) -> tuple[Agreement, bool]:
    """The agreement of the unpatched model's cached decoding and full forward, and whether that gets positions."""
    with Oracle() as decoding:
        generated(s, fresh=True)
    found: dict[bool, Agreement] = {}
    gap: Gap | Raised | None = None
    for positions in (True, False) if s.batches.accepts("position_ids") else (False,):
        gap = attempt(lambda positions=positions: rehearse(s, _whole(s, plain, positions)))
        if gap is None:
            with Oracle() as full:
                gap = attempt(partial(_cached_gap, s, plain, positions))
            if not isinstance(gap, Raised) and gap.error == gap.error:
                found[positions] = Agreement(gap.error, _queries_apart(s, decoding.seen, full.seen))
    if not found:
        raise NotApplicable(f"the unpatched model does not run on what it generated: {gap}")
    best = min(found, key=lambda positions: found[positions].rank)
    return found[best], best


def _queries_apart(s: Subject, decoding: list[Seen], full: list[Seen]) -> float:
    """The largest relative difference between the queries of the last token of the prompt."""
    apart = [0.0]
    whole = {seen.module: seen.query for seen in full}
    prompt = {seen.module: seen.query for seen in reversed(decoding)}  # each module's first call
    for module, query in prompt.items():
        last = query.shape[2] - 1
        if module in whole and whole[module].shape[2] == last + _STEPS:
            apart.append(_relative(query[:, :, last], whole[module][:, :, last]))
    return max(apart)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.shape == b.shape else 0.0


def _full(s: Subject, decoded: Generated, positions: bool) -> Tensor:
    return s.run(_whole(s, decoded, positions))[:, -len(decoded.logits) :]


def _whole(s: Subject, decoded: Generated, positions: bool) -> dict[str, Any]:
    inputs = s.batches.longer(decoded.prompt, decoded.tokens[:, :-1])
    if positions and "attention_mask" in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def _cached_gap(s: Subject, decoded: Generated, positions: bool) -> Gap:
    with torch.no_grad():
        full = _full(s, decoded, positions)
    return s.gap(torch.stack(decoded.logits, 1), full, full)


def padding(s: Subject) -> str:
    """Padding on either side changes nothing for the real tokens."""
    padded = _padded(s)
    if isinstance(padded, str):
        raise NotApplicable(padded)
    tolerance = s.tolerance(padded.own.logits)
    stacks, words = _stacks_for(s, padded.own)
    with s.patched(stacks):
        error = _padding_agreement(s, padded.alone, padded.left, padded.right).logits
    if not error <= tolerance:
        with oracle_of(s, stacks):
            other = _padding_agreement(s, padded.alone, padded.left, padded.right).logits
        _not_the_models_doing(other, tolerance)
        raise BrokenLaw(f"{error:.1e} apart (tolerance {tolerance:.0e}; unpatched {padded.own.logits:.1e})")
    return f"difference {error:.1e} (tolerance {tolerance:.0e}){words}"


def variants(s: Subject) -> dict[str, dict[str, Any]]:
    """Other inputs of the unpatched model: a sample alone, and all samples padded on the left."""
    padded = _padded(s)
    return {} if isinstance(padded, str) else {"of one sample": padded.alone[0], "padded on the left": padded.left}


def _padded(s: Subject) -> Padded | str:
    if "padded" not in s.kept:
        s.kept["padded"] = _find_padded(s)
    return s.kept["padded"]


def _find_padded(s: Subject) -> Padded | str:
    if "input_ids" not in s.inputs or not s.batches.accepts("attention_mask"):
        return "the model takes no input_ids with an attention_mask"
    if s.inputs["input_ids"].shape[0] < 2:
        return "a single sample needs no padding; give two"
    best: Padded | None = None
    error = ""
    # Only text, if images cannot be assigned to samples.
    for inputs in (s.inputs, s.batches.text()):
        for positions in (True, False) if s.batches.accepts("position_ids") else (False,):
            found = attempt(lambda inputs=inputs, positions=positions: _pad(s, inputs, positions))
            if isinstance(found, Raised):
                error = str(found)
            elif best is None or found.own.rank < best.own.rank:
                best = found
            if best is not None and best.own.logits < 1e-5 and best.own.of_positions:
                return best
    return f"the unpatched model does not run on padded samples: {error}" if best is None else best


def _pad(s: Subject, inputs: Mapping[str, Any], positions: bool) -> Padded:
    alone = s.batches.samples(inputs)
    left, right = (s.batches.together(alone, side, positions) for side in ("left", "right"))
    rehearse(s, *alone, left, right)
    return Padded(alone, left, right, _padding_agreement(s, alone, left, right))


def _padding_agreement(s: Subject, alone: list[dict[str, Any]], *batches: dict[str, Any]) -> Agreement:
    logits, queries = [], [0.0]
    with torch.no_grad():
        together = [(batch["attention_mask"].bool(), *_watched(s, batch)) for batch in batches]
        for i, sample in enumerate(alone):
            wanted, seen = _watched(s, sample)
            for masks, rows, calls in together:
                real = masks[i]
                logits.append(s.gap(rows[i][real][None], wanted, wanted, {}).error)
                for module, query in calls.items():
                    if module in seen and query.shape[2] == len(real):
                        queries.append(_relative(query[i][:, real], seen[module][0]))
    return Agreement(max(logits) if all(e == e for e in logits) else float("inf"), max(queries))


def _watched(s: Subject, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[nn.Module, Tensor]]:
    with Oracle() as oracle:
        logits = s.run(inputs)
    return logits, {call.module: call.query for call in oracle.seen}


def checkpointing(s: Subject, reentrant: bool) -> str:
    """Gradient checkpointing changes neither logits nor gradients."""
    model: Any = s.inner
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise NotApplicable(f"{type(model).__name__} does not support gradient checkpointing")
    stacks = s.stacks()
    modules = [s.inner.get_submodule(layer.path) for layer in s.spec.layers]
    _switch_training(s.inner, modules)
    model.enable_input_require_grads()  # with reentrant checkpointing, gradients need an input that requires grad
    plain = attempt(partial(_gradient_of_embeddings, s))
    if isinstance(plain, Raised):
        raise NotApplicable(f"the unpatched model does not train: {plain}")
    with _counting(modules) as plain_calls:
        wanted_logits, wanted = _gradients(s, stacks)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _switch_training(s.inner, modules)
    own = attempt(partial(_gradient_of_embeddings, s))
    if isinstance(own, Raised):
        raise NotApplicable(f"the unpatched model does not train with checkpointing: {own}")
    if (apart := _relative(own, plain)) > 10 * s.tolerance(0.0):
        raise NotApplicable(f"with checkpointing, the unpatched model's own gradients are {apart:.1e} apart")
    with _counting(modules) as calls:
        logits, found = _gradients(s, stacks)
    again = sum(calls.values()) - sum(plain_calls.values())
    if again <= 0:
        raise NotApplicable("the model did not run any layer again")
    if (gap := s.gap(logits, wanted_logits, s.logits)).error > s.tolerance(0.0):
        raise BrokenLaw(f"logits are {gap.error:.1e} apart")
    worst, where = 0.0, ""
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        if name not in found:
            raise BrokenLaw(f"{name} has a gradient without checkpointing and none with it")
        # Relative to its largest entry, unless that is a rounding error compared with other gradients.
        scale = max(float(grad.abs().max()), 1e-2 * largest, 1e-30)
        worst, where = max((worst, where), (float((found[name] - grad).abs().max()) / scale, name))
    # If a part of the graph is missing, the difference is a tenth or more. Another order of summation gives 5e-4 at
    # most (Dory, which loops over its layers, in fp32; in fp64 it is 0).
    tolerance = 100 * s.tolerance(0.0)
    if not worst <= tolerance:
        raise BrokenLaw(f"the gradient of {where} is {worst:.1e} apart (tolerance {tolerance:.0e})")
    return f"gradients {worst:.1e} apart, {again} modules of layers ran again"


def checkpointing_non_reentrant(s: Subject) -> str:
    """Gradient checkpointing (non-reentrant) changes neither logits nor gradients."""
    return checkpointing(s, reentrant=False)


def checkpointing_reentrant(s: Subject) -> str:
    """Gradient checkpointing (reentrant) changes neither logits nor gradients."""
    return checkpointing(s, reentrant=True)


def _gradient_of_embeddings(s: Subject) -> Tensor:
    """The gradient of the unpatched model's embeddings, or zero if they have none."""
    kept: list[Tensor] = []
    model: Any = s.inner
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: kept.append(out))
    try:
        logits = s.run()
    finally:
        handle.remove()
    _loss(logits).backward()
    grads = [x.grad for x in kept if x.grad is not None]
    return torch.cat([grad.flatten() for grad in grads]) if grads else logits.new_zeros(1)


def _loss(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    return (logits.where(logits.abs() < 1e9, 0) * weights).mean()


def _switch_training(model: nn.Module, layers: list[nn.Module]) -> None:
    """Training mode only for modules that decide about checkpointing, to have no dropout and no running statistics."""
    for m in model.modules():
        m.training = m in layers or hasattr(m, "gradient_checkpointing")


def _gradients(s: Subject, stacks: Mapping[str, ShiftStack]) -> tuple[Tensor, dict[str, Tensor]]:
    for stack in stacks.values():
        stack.zero_grad()
    with s.patched(stacks):
        logits = s.run()
        _loss(logits).backward()
    parameters = [(f"{key} {n}", p) for key, stack in stacks.items() for n, p in stack.named_parameters()]
    return logits.detach(), {name: p.grad.clone() for name, p in parameters if p.grad is not None}


@contextmanager
def _counting(layers: list[nn.Module]) -> Iterator[Counter[nn.Module]]:
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any) -> None:
        calls[module] += 1

    hooks = [m.register_forward_pre_hook(count) for layer in layers for m in layer.modules() if m is not layer]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
