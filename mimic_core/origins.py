"""Which model a stack was made for: its name, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .types import Located, ModelSpec

# Of how many tensors, and of how many numbers of each, a fingerprint is made: milliseconds for any model.
_TENSORS, _NUMBERS = 16, 1024


@dataclass(frozen=True)
class Origin:
    """The model that a stack was made for.

    Attributes:
        model_type: `config.model_type`, or the class of a model that has none.
        name_or_path: What it was loaded from; empty: unknown.
        fingerprint: Of the weights of its decoder layers. None if some were not in memory.
        adapter: The class of the adapter that found its sites, if the model has no `config.model_type`.
    """

    model_type: str
    name_or_path: str
    fingerprint: str | None
    adapter: str = ""

    def misfit(self, other: Origin) -> str | None:
        """How another model differs, in words. None means that it is the same one, as far as is known."""
        if self.model_type != other.model_type:
            return f"model type {self.model_type!r}, not {other.model_type!r}"
        if self.adapter != other.adapter:
            return f"its sites were those of {self.adapter or 'no adapter'}, not of {other.adapter or 'no adapter'}"
        known = self.fingerprint is not None and other.fingerprint is not None
        if known and self.fingerprint != other.fingerprint:
            return f"the weights of {self.name_or_path or 'a model without a name'!r}, and this model's weights differ"
        return None


def origin_of(found: Located, read: Callable[[Tensor], Tensor | None] | None = None) -> Origin:
    """The origin of a located model, whether it has a head on or not.

    Its fingerprint is the same for fp32 and bf16 copies of the same weights, and on every device. Parameters that PEFT
    has added are left out. So are those that are sharded or quantised by a class of their own.

    Args:
        read: Gives the numbers of a parameter that are somewhere else than in the model; None: nowhere.
    """
    model, spec = found.model, found.spec
    typed = isinstance(getattr(getattr(model, "config", None), "model_type", None), str)
    name = str(getattr(model, "name_or_path", "") or "")
    adapter = "" if typed else type(found.adapter).__name__
    return Origin(spec.model_type, name, _fingerprint(model, spec, read), adapter)


def _fingerprint(model: nn.Module, spec: ModelSpec, read: Callable[[Tensor], Tensor | None] | None) -> str | None:
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return None  # each process has a slice
    layers = ((f"{layer.index:06}", model.get_submodule(layer.path)) for layer in spec.layers)
    weights = sorted(
        ((f"{index}.{name}", x) for index, layer in layers for name, x in _weights(layer)), key=lambda named: named[0]
    )
    if not weights or (read is None and any(x.device.type == "meta" for _, x in weights)):
        return None
    found = hashlib.sha256(f"{len(weights)} tensors".encode())
    count = min(_TENSORS, len(weights))
    for i in range(count):
        # The first, the last, and others between.
        name, x = weights[i * (len(weights) - 1) // max(1, count - 1)]
        there = x if read is None else read(x)
        if there is None or there.shape != x.shape:
            return None
        numbers = there.detach().reshape(-1)
        numbers = numbers[:: max(1, len(numbers) // _NUMBERS)][:_NUMBERS].to("cpu", torch.float32).bfloat16()
        found.update(f"{name} {list(x.shape)}".encode())
        found.update(numbers.view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def _weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A layer's own floating-point parameters. PEFT names those it has added, and wraps others as `base_layer`."""
    added: set[str] = set()
    for path, module in layer.named_modules():
        names = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        added |= {f"{path}.{name}." for name in names}
    for name, x in layer.named_parameters():
        if type(x) is nn.Parameter and x.is_floating_point() and not any(f"{name}.".startswith(one) for one in added):
            yield name.replace(".base_layer.", "."), x
