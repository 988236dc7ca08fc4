"""Laws about training a patched model: gradient checkpointing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchStateError
from ..heads import ShiftStack
from .laws_decoding import relative
from .subject import Subject
from .verdicts import BrokenLaw, NotApplicable, Raised, attempt


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
    if (apart := relative(own, plain)) > 10 * s.tolerance(0.0):
        raise NotApplicable(f"with checkpointing, the unpatched model's own gradients are {apart:.1e} apart")
    with _counting(modules) as calls:
        ran = attempt(partial(_gradients, s, stacks))
    if isinstance(ran, Raised):
        if reentrant and any(layer.run for layer in s.spec.layers) and isinstance(ran.error, PatchStateError):
            raise NotApplicable(f"refused, because the passes of a layer can't be told apart then: {ran}")
        raise ran.error
    logits, found = ran
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
    assert s.embedding is not None
    handle = s.embedding.register_forward_hook(lambda m, args, out: kept.append(out))  # pyright: ignore[reportArgumentType]
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
