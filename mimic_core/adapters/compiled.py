"""Makes torch.compile notice edits that come and go.

A graph does not ask whether its modules have got hooks since it was made, nor what stands in their `__dict__`: a model
compiled before it is patched would stay unpatched without a word. What it does ask, of every module it calls, is
whether `forward` has been replaced in that very object. So an edited module gets its own class's forward there, as an
attribute of its own. The graphs of that model no longer fit, those of others do, and when the edits are gone the old
ones fit again.
"""

from __future__ import annotations

import sys
from itertools import count
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# What was put into a module's `__dict__` as its forward: there it is both, or somebody has replaced it since.
_MARK = "_mimic_core_mark"


def mark(module: nn.Module) -> None:
    """Let no graph fit that was made before this module was edited."""
    if _MARK not in module.__dict__ and "forward" not in module.__dict__:
        module.__dict__["forward"] = module.__dict__[_MARK] = MethodType(type(module).forward, module)
    elif not is_marked(module) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # somebody else has replaced it, and graphs ask for that one: all of them start over


def unmark(module: nn.Module) -> None:
    """Let the graphs of the unedited module fit again."""
    if is_marked(module):
        del module.__dict__["forward"]
    module.__dict__.pop(_MARK, None)


def asked_about(module: nn.Module, inside: bool) -> list[nn.Module]:
    """The modules that a graph asks about in which an edit runs, on a module's output or `inside` its forward.

    A graph may begin inside the module, which nobody calls there; its projections are called.
    """
    return [module, *module.children()] if inside else [module]


def is_marked(module: nn.Module) -> bool:
    """Whether `mark` has put a forward there, and it is still that one."""
    put = module.__dict__.get(_MARK)
    return put is not None and module.__dict__.get("forward") is put


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
    return compiled or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
