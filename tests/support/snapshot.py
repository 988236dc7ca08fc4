"""What a model looks like, to be compared before and after: patches leave nothing behind."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AttentionInterface


def snapshot(model: nn.Module) -> Any:
    """All that patching could leave behind: attributes, hooks, config, state-dict keys, the attention interface."""
    hook_dicts = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    modules = {
        name: (sorted(m.__dict__), type(m), [len(m.__dict__[h]) for h in hook_dicts])
        for name, m in model.named_modules()
    }
    config = model.config.to_json_string()
    return modules, config, list(model.state_dict()), AttentionInterface.get_interface


def left_in(model: nn.Module) -> list[str]:
    """Attributes of ours in a model's modules."""
    return [f"{path}.{name}" for path, m in model.named_modules() for name in vars(m) if "mimic" in name]
