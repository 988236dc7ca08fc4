"""What torch.compile wants of edits that come and go; `outputs.py` says how its graphs notice them."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .outputs import below_edits


def asked_about(attention: nn.Module) -> list[nn.Module]:
    """The modules that a graph asks about in which an edit inside a module's attention runs.

    A graph may begin inside the module, which nobody calls there; its projections are called.
    """
    return [attention, *attention.children()]


def with_lasting_key(handle: RemovableHandle, module: nn.Module) -> RemovableHandle:
    """An always-called forward hook under the first free of the keys -1, -2, ...

    torch gives every hook a number of its own, and graphs ask for that of always-called ones: another stack of the same
    form would be compiled anew.
    """
    hooks, always = module._forward_hooks, module._forward_hooks_always_called
    key = next(key for key in count(-1, -1) if key not in hooks)
    hooks[key], always[key] = hooks.pop(handle.id), always.pop(handle.id)
    handle.id = key
    return handle


def runs_compiled(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of a model runs in code that torch.compile made, as far as can be seen."""
    path = next((path for path, found in model.named_modules() if found is module), "")
    parts = path.split(".") if path else []
    return any(_is_compiled(model.get_submodule(".".join(parts[:n]))) for n in range(len(parts) + 1))


def _is_compiled(module: Any) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    return compiled or hasattr(below_edits(module), "_torchdynamo_orig_callable")
