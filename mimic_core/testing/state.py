"""Compare and restore everything that a patch could change in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..edits import interface
from ..edits.interface import SLOT

# The entries of a module's `__dict__` with its hooks, parameters and submodules.
_DICTS = frozenset(key for key, value in vars(nn.Module()).items() if isinstance(value, dict))
# Attributes that the laws change temporarily.
_SWITCHES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func", "forward")


class Snapshot:
    """The state of a model at one time."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.modeling_utils import AttentionInterface

        self._interface = AttentionInterface
        self._get_interface = AttentionInterface.get_interface
        self._sdpa = functional.scaled_dot_product_attention
        self._implementations = dict(AttentionInterface._global_mapping)
        self._model = model
        self._modules = [(name, m, type(m), _contents(m)) for name, m in model.named_modules()]
        self._parameters = [(p, p.requires_grad, p.grad, p._version) for p in model.parameters()]
        self._configs = [(config, dict(vars(config))) for config in _configs(model)]

    def differences(self, attributes: bool = False) -> list[str]:
        """List what has changed: hooks, attributes, parameters, configs, the attention interface.

        With `attributes`, also compare the values of plain attributes, which a forward itself can change.
        """
        found = []
        now = dict(self._model.named_modules())
        if list(now) != [name for name, *_ in self._modules]:
            found.append("the model has other modules")
        for name, m, kind, before in self._modules:
            where = name or "the model"
            if now.get(name) is not m or type(m) is not kind:
                found.append(f"{where} is another module")
                continue
            found += [f"{where}: {words}" for words in _changes(before, m, attributes)]
        if any(p._version != version for p, _, _, version in self._parameters):
            found.append("a parameter was written to")
        if any(p.requires_grad != wanted for p, wanted, _, _ in self._parameters):
            found.append("requires_grad of a parameter changed")
        found += [
            f"the config {type(config).__name__} changed" for config, before in self._configs if vars(config) != before
        ]
        # The wrap of another patched model may go meanwhile, when that model is collected.
        if self._interface.get_interface is not self._get_interface and not _wraps(self._get_interface):
            found.append("AttentionInterface.get_interface is another function")
        if functional.scaled_dot_product_attention is not self._sdpa:
            found.append("torch.nn.functional.scaled_dot_product_attention is another function")
        if self._interface._global_mapping != self._implementations:
            found.append("the attention implementations registered with AttentionInterface changed")
        return found

    def restore(self) -> None:
        """Restore this state, and remove everything else."""
        for _, m, _, before in self._modules:
            _put_back(m, before)
        for p, wanted, grad, _ in self._parameters:
            p.requires_grad_(wanted)
            p.grad = grad
        for config, before in self._configs:
            if vars(config) != before:
                vars(config).clear()
                vars(config).update(before)
        now = self._interface.get_interface
        # The library removes its own wrapper with the last slot. Another model may still need it.
        if now is not self._get_interface and not _wraps(now) and not _wraps(self._get_interface):
            self._interface.get_interface = self._get_interface
        if self._interface._global_mapping != self._implementations:
            self._interface._global_mapping.clear()
            self._interface._global_mapping.update(self._implementations)


def _wraps(get_interface: Callable[..., Any]) -> bool:
    """Whether it is the library's."""
    return get_interface.__module__ == interface.__name__


def _contents(module: nn.Module) -> dict[str, Any]:
    """The module's `__dict__`, with copies of its dicts of hooks, parameters and submodules."""
    own = dict(vars(module))
    own |= {key: dict(own[key]) for key in _DICTS if key in own}
    return own


def _changes(before: Mapping[str, Any], module: nn.Module, attributes: bool) -> list[str]:
    now = vars(module)
    found = [f"attribute {key} was added" for key in now if key not in before]
    for key, old in before.items():
        if key not in now:
            found.append(f"attribute {key} is gone")
        elif key in _DICTS:
            if not _same(old, now[key]):
                extra = len(now[key]) - len(old)
                found.append(f"{key} changed" + (f" ({extra:+d})" if extra else ""))
        elif attributes and now[key] is not old:
            found.append(f"attribute {key} changed")
    return found


def _same(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> bool:
    """Whether two dicts hold the same objects in the same order."""
    return (not old and not new) or (list(old) == list(new) and all(a is b for a, b in zip(old.values(), new.values())))  # noqa: B905


def _put_back(module: nn.Module, before: Mapping[str, Any]) -> None:
    own = vars(module)
    for key in [key for key in own if key not in before]:
        left = own.pop(key)
        if key == SLOT:
            left.release()
    for key, old in before.items():
        if key not in own:
            own[key] = old
        elif key in _DICTS:
            if not _same(old, own[key]):
                # Keep the dict object, because handles of hooks refer to it.
                own[key].clear()
                own[key].update(old)
        elif key in _SWITCHES:
            own[key] = old


def _configs(model: nn.Module) -> list[Any]:
    """All configs in the model, also those inside others."""
    found: dict[int, Any] = {}
    waiting = [vars(m).get("config") for m in model.modules()]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found or not hasattr(config, "model_type"):
            continue
        found[id(config)] = config
        waiting += [x for x in vars(config).values() if hasattr(x, "model_type")]
    return list(found.values())


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Freeze the model and set eval mode. Afterwards restore the model and torch's random state."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    before = Snapshot(model)
    with torch.random.fork_rng(devices=sorted(i for i in devices if i is not None)):
        try:
            for m in model.modules():
                m.training = False
            for p in model.parameters():
                p.requires_grad_(False)
            yield
        finally:
            before.restore()
