"""Laws about using a patched model: cached decoding and padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import ShiftStack
from .batches import copied
from .laws_values import oracle_of
from .oracle import Oracle, Seen
from .passes import numbered
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
    """Samples alone, and together with padding on either side. `own` is its effect on the unpatched model.

    `together` has the inputs by side, and which of their tokens [b t] are not padding.
    """

    alone: list[dict[str, Any]]
    together: dict[str, tuple[dict[str, Any], Tensor]]
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
    if s.decode is None and (not callable(can) or not can()):
        return "the model has no generate of transformers, and no `decode` was given"
    if not s.batches.has_ids(s.inputs):
        return f"there are no {s.batches.tokens} to continue"
    errors = []
    padded = _padded(s)
    # What a decode of the caller does with padding is not known.
    left = None if isinstance(padded, str) or s.decode is not None else padded.together.get("left")
    prompts = [] if left is None else [left[0]]
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
    if s.decode is not None:
        ids = prompt[batches.tokens]
        tokens = batches.reworded(ids[:, :1]).repeat(1, _STEPS)
        with torch.no_grad():
            logits = s.decode(s.model, copied(prompt), tokens[:, 1:])
        return Generated(dict(prompt), tokens, logits.unbind(1))
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
    whole, prompt = numbered(full), numbered(decoding)  # the first calls of decoding are those of the prompt
    for place, call in prompt.items():
        query, last = call.query, call.query.shape[2] - 1
        if place in whole and whole[place].query.shape[2] == last + _STEPS:
            apart.append(relative(query[:, :, last], whole[place].query[:, :, last]))
    return max(apart)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of `b`. 0 for other shapes."""
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
        error = _padding_agreement(s, padded.alone, padded.together).logits
    if not error <= tolerance:
        with oracle_of(s, stacks):
            other = _padding_agreement(s, padded.alone, padded.together).logits
        _not_the_models_doing(other, tolerance)
        raise BrokenLaw(f"{error:.1e} apart (tolerance {tolerance:.0e}; unpatched {padded.own.logits:.1e})")
    only = f", on the {next(iter(padded.together))} only" if len(padded.together) == 1 else ""
    return f"difference {error:.1e} (tolerance {tolerance:.0e}){only}{words}"


def variants(s: Subject) -> dict[str, dict[str, Any]]:
    """Other inputs of the unpatched model: a sample alone, and all samples padded on the left."""
    padded = _padded(s)
    if isinstance(padded, str):
        return {}
    side, (inputs, _) = next(iter(padded.together.items()))
    return {"of one sample": padded.alone[0], f"padded on the {side}": inputs}


def _padded(s: Subject) -> Padded | str:
    if "padded" not in s.kept:
        s.kept["padded"] = _find_padded(s)
    return s.kept["padded"]


def _find_padded(s: Subject) -> Padded | str:
    if not s.batches.has_ids(s.inputs) or not (s.pad or s.batches.accepts("attention_mask")):
        return f"the model takes no {s.batches.tokens} with an attention_mask, and no `pad` was given"
    if s.inputs[s.batches.tokens].shape[0] < 2:
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
    together: dict[str, tuple[dict[str, Any], Tensor]] = {}
    for side in ("left", "right"):
        if s.pad is not None:
            padded = s.pad(alone, side)
        else:
            batch = s.batches.together(alone, side, positions)
            padded = batch, batch["attention_mask"].bool()
        if padded is not None:
            together[side] = dict(padded[0]), padded[1]
    if not together:
        raise NotApplicable("`pad` pads on neither side")
    rehearse(s, *alone, *(batch for batch, _ in together.values()))
    return Padded(alone, together, _padding_agreement(s, alone, together))


def _padding_agreement(
    s: Subject, alone: list[dict[str, Any]], batches: Mapping[str, tuple[dict[str, Any], Tensor]]
) -> Agreement:
    logits, queries = [], [0.0]
    with torch.no_grad():
        together = [(real, *_watched(s, batch)) for batch, real in batches.values()]
        for i, sample in enumerate(alone):
            wanted, seen = _watched(s, sample)
            for masks, rows, calls in together:
                real = masks[i]
                logits.append(s.gap(rows[i][real][None], wanted, wanted, {}).error)
                for place, call in calls.items():
                    if place in seen and call.query.shape[2] == len(real):
                        queries.append(relative(call.query[i][:, real], seen[place].query[0]))
    return Agreement(max(logits) if all(e == e for e in logits) else float("inf"), max(queries))


def _watched(s: Subject, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[tuple[nn.Module, int], Seen]]:
    with Oracle() as oracle:
        logits = s.run(inputs)
    return logits, numbered(oracle.seen)
