"""Laws about the values of shifts: logits and gradients of whole stacks, compared with the oracle in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import ShiftStack
from ..types import LayerSpec
from .oracle import Edit, Oracle, Place, live_edit, mimic_edit
from .passes import by_place
from .state import as_it_was
from .subject import Baseline, Gap, Subject
from .verdicts import BrokenLaw, NotApplicable, Raised, attempt


@dataclass(frozen=True)
class Ground:
    """The model for the comparison: a copy in fp64, or the model itself.

    Attributes:
        logits: Those of the unpatched model.
        words: Which of the two models it is, and why.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    logits: Tensor
    baseline: Baseline
    words: str


def _ground(s: Subject) -> Ground:
    if "ground" not in s.kept:
        wide = attempt(lambda: _wide(s))
        if isinstance(wide, Raised):
            wide = Ground(s.inner, s.inputs, s.logits, s.baseline, f"in {s.dtype} (in fp64: {wide})")
        s.kept["ground"] = wide
    return s.kept["ground"]


def _wide(s: Subject) -> Ground:
    with torch.no_grad():
        logits = s.run(s.wide_inputs, s.wide)
        if logits.dtype != torch.float64:
            raise NotApplicable(f"logits are {logits.dtype}")
        if torch.isnan(logits).any() and not torch.isnan(s.logits).any():
            # Eager attention computes its softmax in fp32, where the lowest fp64 number of a mask becomes -inf.
            raise NotApplicable("rows that attend to nothing are NaN")
        return Ground(s.wide, s.wide_inputs, logits, s.look(s.wide, s.wide_inputs, logits), "in fp64")


def oracle_of(s: Subject, stacks: Mapping[str, ShiftStack]) -> Oracle:
    """The oracle with the stacks' parameters."""
    leaves = {name: p.detach() for name, p in _parameters(stacks).items()}
    return Oracle(_edits(s, s.inner, stacks, leaves), s.baseline.plain, s.baseline.reading)


def _parameters(stacks: Mapping[str, ShiftStack]) -> dict[str, nn.Parameter]:
    return {
        f"{key}: {head.layer.index} {name}": p
        for key, stack in stacks.items()
        for head in stack
        for name, p in head.named_parameters()
    }


def _edits(
    s: Subject, model: nn.Module, stacks: Mapping[str, ShiftStack], leaves: Mapping[str, Tensor]
) -> dict[Place, Edit]:
    edits: list[tuple[LayerSpec, Place, Edit]] = []
    for key, stack in stacks.items():
        for head in stack:
            p = {name: leaves[f"{key}: {head.layer.index} {name}"] for name, _ in head.named_parameters()}
            place = model.get_submodule(s.names[s.place(head.layer, head.site)])
            if head.site == "attn_heads":
                edit = mimic_edit(p["vector"], p.get("gate_weight"), p.get("gate_bias"))
            else:
                edit = live_edit(p["vector"], p["scale"])
            edits.append((head.layer, (place, head.site), edit))
    return by_place(s.spec, edits)


def stack_law(kind: str) -> Callable[[Subject], str]:
    """The law of a whole stack: "MimIC", or "LIVE" at all its sites together."""

    def check(s: Subject) -> str:
        ground = _ground(s)
        if ground.model is s.inner:
            return on_ground(s, ground)
        with as_it_was(ground.model):
            return on_ground(s, ground)

    def on_ground(s: Subject, ground: Ground) -> str:
        stacks = {key: stack for key, stack in s.stacks(ground.model).items() if key.startswith(kind)}
        if not stacks:
            raise NotApplicable("no layer has a site for it")
        if "MimIC" in stacks:
            _needs_plain(s, stacks["MimIC"], ground)
        tolerance = s.tolerance(ground.baseline.error, ground.logits.dtype)
        # A softmax or norm in fp32 inside an fp64 model causes larger differences in gradients than in logits.
        slack = max(tolerance, min(1e-3, 1000 * ground.baseline.error))
        if ground.logits.dtype != torch.float64:
            slack = max(100 * tolerance, 1e-3)
        if ground.model is s.inner:
            stacks = copy.deepcopy(stacks)
        for stack in stacks.values():
            stack.to(ground.logits.dtype)
        gap, gradients = _compare(s, ground, stacks)
        if not gap.error <= tolerance:
            raise BrokenLaw(f"{ground.words}: logits {gap.words(tolerance)}")
        if not gap.effect > 10 * tolerance:
            raise BrokenLaw(f"{ground.words}: the shifts have almost no effect: {gap.words(tolerance)}")
        worst, name = max(((error, name) for name, error in gradients.items()), default=(0.0, ""))
        if not worst <= slack:
            raise BrokenLaw(f"{ground.words}: the gradient of {name} is {worst:.1e} off (tolerance {slack:.0e})")
        words = f"{', '.join(stacks)} {ground.words}: logits {gap.words(tolerance)}"
        words += f"; {len(gradients)} gradients {worst:.1e} (tolerance {slack:.0e})"
        return words + _refusals(s, kind)

    check.__doc__ = f"{kind} gives the logits and gradients of its formula in a second implementation."
    return check


def _needs_plain(s: Subject, stack: ShiftStack, ground: Ground) -> None:
    for head in stack:
        if ground.model.get_submodule(s.names[s.attention(head.layer)]) not in ground.baseline.plain:
            raise NotApplicable(
                f"attention of layer {head.layer.index} is not the softmax of scaled, masked logits; see the row lse"
            )


def _refusals(s: Subject, kind: str) -> str:
    if kind != "MimIC" or not s.refused:
        return ""
    return f"; without gate where the LSE is refused ({', '.join(map(str, s.refused))})"


def _compare(s: Subject, ground: Ground, stacks: Mapping[str, ShiftStack]) -> tuple[Gap, dict[str, float]]:
    own = _parameters(stacks)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    with s.patched(stacks, ground.model):
        found = s.run(ground.inputs, _called(s, ground))
        if found.requires_grad:
            _loss(s, ground, found).backward()
    baseline = ground.baseline
    with Oracle(_edits(s, ground.model, stacks, leaves), baseline.plain, baseline.reading):
        wanted = s.run(ground.inputs, _called(s, ground))
        if wanted.requires_grad:
            _loss(s, ground, wanted).backward()
    gap = s.gap(found, wanted, ground.logits, ground.inputs)
    finite = [x.grad.abs().max() for x in leaves.values() if x.grad is not None and torch.isfinite(x.grad).all()]
    largest = max(map(float, finite), default=0.0)
    errors: dict[str, float] = {}
    for name, p in own.items():
        exact = leaves[name].grad
        if p.grad is None and exact is not None and exact.abs().max() > 0:
            raise BrokenLaw(f"{ground.words}: {name} gets no gradient")
        if largest == 0 or (exact is not None and not torch.isfinite(exact).all()):
            continue  # with the oracle too, the model has no gradient or NaN (Gemma 3n)
        # In some layers a site has no gradient, or only a rounding error. No gradient counts as zero.
        found_grad, wanted_grad = (torch.zeros_like(p) if x is None else x for x in (p.grad, exact))
        # Relative to its largest entry, unless that is a rounding error compared with other gradients.
        scale = max(float(wanted_grad.abs().max()), 1e-3 * largest)
        errors[name] = float((found_grad - wanted_grad).abs().nan_to_num(float("inf")).max()) / scale
    return gap, errors


def _called(s: Subject, ground: Ground) -> nn.Module | None:
    """None for the model itself, so that its wrappers are used too."""
    return None if ground.model is s.inner else ground.model


def _loss(s: Subject, ground: Ground, logits: Tensor) -> Tensor:
    """A weighted sum over the logits of real tokens."""
    where = (ground.logits.abs() < 1e9) & torch.isfinite(ground.logits)
    real = s.batches.real(ground.inputs)
    if real is not None and real.shape == logits.shape[:2]:
        where = where & real[..., None]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    return logits[where].mul(weights[where]).mean()
