"""bf16 models on processors without products of bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Widened(nn.Linear):
    """A frozen layer in bf16 that multiplies and adds its numbers in fp32, and rounds the result.

    That is what instructions for bf16 do, up to the order of the sum.
    """

    wide: Tensor

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.wide, bias).to(input.dtype)


def has_products() -> bool:
    """Whether torch multiplies bf16 with instructions for it. If not, answering a question takes six times as long."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen(model: Any) -> Any:
    """Let the linear layers of a frozen bf16 model multiply in fp32 if the processor has no products of bf16."""
    if not has_products():
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
                module.register_buffer("wide", module.weight.detach().float(), persistent=False)
                module.__class__ = _Widened
    return model
