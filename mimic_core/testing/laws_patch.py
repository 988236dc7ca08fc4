"""Laws about patching and removing: nothing else changes, and nothing is left afterwards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_shifts, save_shifts
from ..edits.outputs import EditedForward
from ..errors import PatchStateError
from ..patch import hook, patch
from ..types import At, Site
from .laws_decoding import generated, variants
from .state import Snapshot
from .subject import EDITED_SITES, Subject, same_bits, zeroed
from .verdicts import BrokenLaw, NotApplicable, Raised, attempt


class Planted(Exception):  # noqa: N818 - it is not an error of the kit
    """An exception that a law raises on purpose."""


def adapter(s: Subject) -> str:
    """The model has an adapter whose spec can be read."""
    layers = s.spec.layers
    sites = {site for layer in layers for site in layer.sites}
    without = [f"{layer.index} ({layer.missing or 'no reason given'})" for layer in layers if not layer.sites]
    words = (
        f"{type(s.adapter).__name__}: {len(layers)} layers at {layers[0].path.rpartition('.')[0]}, {len(sites)} sites"
    )
    return words + (f"; no site in layers {', '.join(without)}" if without else "")


def forward(s: Subject) -> str:
    """The unpatched model runs on the inputs, twice with the same bits."""
    first = s.logits
    with torch.no_grad():
        if not same_bits(s.run(), first):
            raise BrokenLaw("two forwards of the unpatched model differ; in eval mode, nothing about it may be random")
    shape = list(first.shape)
    if not torch.isfinite(first).any():
        raise BrokenLaw(f"all logits {shape} of the unpatched model are NaN or infinite")
    return f"logits {shape}, inputs {', '.join(s.inputs)}"


def zero_shift(s: Subject) -> str:
    """With zero vectors, the logits equal those of the unpatched model bit for bit."""
    stacks = _some(zeroed(s.stacks()))
    batches = {"as given": s.inputs, **variants(s)}
    for name, inputs in batches.items():
        with torch.no_grad():
            plain = s.run(inputs)
            with s.patched(stacks):
                found = s.run(inputs)
        if not same_bits(found, plain):
            raise BrokenLaw(f"inputs {name}: {_furthest(s, stacks, inputs, plain)}")
    with _gradients_from_the_start(s):  # with gradients, other kernels may run
        plain = s.run().detach()
        with s.patched(stacks):
            found = s.run().detach()
    if not same_bits(found, plain):
        raise BrokenLaw(f"with gradients on: {(found - plain).abs().max():.1e} apart")
    return f"{', '.join(stacks)}; inputs {', '.join(batches)}"


def zero_shift_generates(s: Subject) -> str:
    """With zero vectors, generate gives the tokens and logits of the unpatched model bit for bit."""
    stacks = _some(zeroed(s.stacks()))
    wanted = generated(s)
    with s.patched(stacks):
        found = generated(s, fresh=True)
    if not torch.equal(found.tokens, wanted.tokens):
        raise BrokenLaw("other tokens were generated")
    for step, (a, b) in enumerate(zip(found.logits, wanted.logits, strict=True)):
        if not same_bits(a, b):
            raise BrokenLaw(f"the logits of step {step} are {(a - b).abs().max():.1e} apart")
    return f"{len(wanted.logits)} tokens"


def removal(s: Subject) -> str:
    """A removed or disabled patch leaves nothing: hooks, attributes, config and logits are the same as before."""
    stacks = _some(s.stacks())
    before = _settled(s)
    with s.patched(stacks):
        pass
    _unchanged(before, "patched and removed", attributes=True)
    with ExitStack() as disabled, torch.no_grad():
        handles = [patch(s.model, stack) for stack in stacks.values()]
        if same_bits(s.run(), s.logits):
            raise BrokenLaw(f"{', '.join(stacks)} change no logit while they are patched")
        for handle in handles:
            disabled.enter_context(handle.disabled())
        if not same_bits(s.run(), s.logits):
            raise BrokenLaw("inside handle.disabled() the logits are not the unpatched model's")
    with torch.no_grad():
        if same_bits(s.run(), s.logits):
            raise BrokenLaw("after handle.disabled() the shifts are gone")
        for handle in handles:
            handle.remove()
            handle.remove()
        _unchanged(before, "after a forward and removal")
        if not same_bits(s.run(), s.logits):
            raise BrokenLaw("after removal the logits are not the unpatched model's")
    return f"{', '.join(stacks)}"


def all_or_nothing(s: Subject) -> str:
    """A patch that fails midway leaves the model unchanged."""
    stacks = _some(s.stacks())
    tried = 0
    for name, stack in stacks.items():
        before = Snapshot(s.model)
        with _failing(at=None) as steps:
            patch(s.model, stack).remove()
        # In the middle of the sites, and at the last step.
        for at in sorted({len(steps) // 2, len(steps) - 1}):
            with _failing(at):
                try:
                    patch(s.model, stack)
                except Planted:
                    tried += 1
                else:
                    raise BrokenLaw(f"{name}: patching hid an error in step {at} of {len(steps)}")
            _unchanged(before, f"{name} failed in step {at} of {len(steps)}", attributes=True)
    with torch.no_grad():
        if not same_bits(s.run(), s.logits):
            raise BrokenLaw("after failed patches the logits are not the unpatched model's")
    return f"{tried} failures"


def exception_in_forward(s: Subject) -> str:
    """After an exception inside a forward, patches still work and can be removed completely."""
    stacks = _some(zeroed(s.stacks()))
    before = _settled(s)
    sites: list[Site] = []

    def fail(value: Tensor, at: At) -> None:
        raise Planted

    for site in EDITED_SITES:
        if not (layers := s.layers_with(site)):
            continue
        sites.append(site)
        with torch.no_grad(), s.patched(stacks):
            try:
                with hook(s.model, site, fail, layers=layers[-1:]):
                    s.run()
            except Planted:
                pass
            else:
                raise BrokenLaw(f"an exception at {site} of layer {layers[-1]} was not raised by the forward")
            if not same_bits(s.run(), s.logits):
                raise BrokenLaw(f"after an exception at {site} zero shifts change the logits")
        _unchanged(before, f"after an exception at {site}")
    with torch.no_grad():
        if not same_bits(s.run(), s.logits):
            raise BrokenLaw("after exceptions and removal the logits are not the unpatched model's")
    return f"at {', '.join(sites)}"


def never_reached(s: Subject) -> str:
    """A forward that does not reach a site raises PatchStateError instead of leaving it unshifted."""
    stacks = _some(s.stacks())
    bypassed: dict[str, nn.Module] = {}
    if layers := s.layers_with("attn_heads"):
        bypassed[f"attention of layer {layers[-1]}"] = s.module(layers[-1], "attn_heads")
    layer = s.spec.layers[stacks[list(stacks)[-1]].layers[-1]]
    block = s.inner.get_submodule(layer.path)
    if not isinstance(block, nn.ModuleList):
        bypassed[f"layer {layer.index}"] = block
    raised = []
    for name, module in bypassed.items():
        inside = set(module.modules())
        cut_off = {
            key: stack
            for key, stack in stacks.items()
            if any(s.module(head.layer.index, head.site) in inside - {module} for head in stack)
            or (key.startswith("MimIC") and any(s.module(head.layer.index, head.site) in inside for head in stack))
        }
        if not cut_off:
            continue
        with torch.no_grad(), _replayed(s, module):
            if isinstance(attempt(s.run), Raised):
                continue  # the model needs a side effect of the module, such as an update of the cache
            try:
                with s.patched(cut_off):
                    s.run()
            except PatchStateError:
                raised.append(name)
            else:
                raise BrokenLaw(f"with {name} bypassed, {', '.join(cut_off)} had no effect there, without an error")
    if not raised:
        raise NotApplicable("no site can be bypassed: each is a layer's output, or the model needs its module to run")
    return f"bypassed: {', '.join(raised)}"


def saved_and_loaded(s: Subject) -> str:
    """Saved and loaded shifts give the same logits; a patch does not change the model's state dict or saved config."""
    stacks = _some(s.stacks())
    with TemporaryDirectory() as folder, torch.no_grad():
        plain, keys = _config_bytes(s.inner, Path(folder, "plain")), list(s.model.state_dict())
        with s.patched(stacks):
            wanted = s.run()
            if list(s.model.state_dict()) != keys:
                raise BrokenLaw("the patched model's state dict has other keys")
            if _config_bytes(s.inner, Path(folder, "patched")) != plain:
                raise BrokenLaw("the patched model's saved config.json is different")
        loaded = {}
        for name, stack in stacks.items():
            save_shifts(stack, Path(folder, name))
            loaded[name] = load_shifts(Path(folder, name), s.model)
        with s.patched(loaded):
            if not same_bits(s.run(), wanted):
                raise BrokenLaw("loaded shifts give other logits")
    return f"{', '.join(stacks)}; {len(keys)} keys, config of {len(plain)} bytes"


def _settled(s: Subject) -> Snapshot:
    """The state after a forward of the unpatched model, which may keep masks or biases of this length."""
    with torch.no_grad():
        s.run()
    return Snapshot(s.model)


def _some(stacks: Mapping[str, Any]) -> Mapping[str, Any]:
    if not stacks:
        raise NotApplicable("the spec lists no site that a shift head edits")
    return stacks


def _furthest(s: Subject, stacks: Mapping[str, Any], inputs: Mapping[str, Any], plain: Tensor) -> str:
    words = []
    for name, stack in stacks.items():
        with torch.no_grad(), s.patched({name: stack}):
            apart = (s.run(inputs) - plain).abs().nan_to_num(float("inf")).max()
        if apart > 0:
            words.append(f"{name} moves the logits by {apart:.1e}")
    return "; ".join(words) or "only all shifts together move the logits"


def _unchanged(before: Snapshot, when: str, attributes: bool = False) -> None:
    if found := before.differences(attributes):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise BrokenLaw(f"{when}: {'; '.join(found[:3])}{more}")


def _config_bytes(model: nn.Module, folder: Path) -> bytes:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return repr(config).encode()
    try:
        config.save_pretrained(folder)
    except (TypeError, ValueError) as error:  # some configs cannot be saved, so compare their contents
        return f"{error} {json.dumps(config.to_dict(), default=repr, sort_keys=True)}".encode()
    return Path(folder, "config.json").read_bytes()


@contextmanager
def _gradients_from_the_start(s: Subject) -> Iterator[None]:
    """Inside the `with`, embeddings require gradients, so that everything after them runs as in training."""
    if s.embedding is None:
        yield
        return
    # Not a leaf, because models write images into it.
    handle = s.embedding.register_forward_hook(lambda m, args, out: out.detach().requires_grad_().clone())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _failing(at: int | None) -> Iterator[list[nn.Module]]:
    """Inside the `with`, the step `at` of a patch fails. Gives the modules of the steps."""
    claim, steps = EditedForward.claim, []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> EditedForward:
        steps.append(module)
        if len(steps) - 1 == at:
            raise Planted
        return claim(module, *args, **kwargs)

    EditedForward.claim = counted
    try:
        yield steps
    finally:
        EditedForward.claim = staticmethod(claim)


@contextmanager
def _replayed(s: Subject, module: nn.Module) -> Iterator[None]:
    """Inside the `with`, the module's forward runs nothing and returns its outputs of an unpatched forward."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, output: outputs.append(output))
    try:
        s.run()
    finally:
        handle.remove()
    if not outputs:
        raise NotApplicable(f"the forward of {type(module).__name__} does not run")
    before: Callable[..., Any] | None = vars(module).get("forward")
    again = itertools.cycle(outputs)
    vars(module)["forward"] = lambda *args, **kwargs: next(again)
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before
