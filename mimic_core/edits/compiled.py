"""Support for torch.compile when edits are added or removed. `outputs.py` explains how a graph notices them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .outputs import below_edits


def asked_about(attention: nn.Module) -> list[nn.Module]:
    """The modules whose `forward` is checked by a graph that contains the attention call of `attention`.

    A graph can begin inside `attention`. Then it does not check `attention`, only the projections that it calls.
    """
    return [attention, *attention.children()]


def runs_compiled(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of a model runs in code made by torch.compile, as far as this is visible."""
    path = next((path for path, found in model.named_modules() if found is module), "")
    parts = path.split(".") if path else []
    return any(_is_compiled(model.get_submodule(".".join(parts[:n]))) for n in range(len(parts) + 1))


def _is_compiled(module: Any) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    return compiled or hasattr(below_edits(module), "_torchdynamo_orig_callable")
