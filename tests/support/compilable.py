"""A fixture for what compiled.py and its neighbour need: a torch that can make one graph of a transformers model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.cases import TEXT, Case, fresh_model


def llama(layers: int) -> Case:
    return Case("llama", lambda: LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": layers}, head_dim=24)))


# Tracing takes most of the time, and its time is that of the layers: two are as good as many, and where another test of
# the kind has two, one is enough.
LLAMA, SHALLOW = llama(2), llama(1)


def text(length: int, batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(length))}


@pytest.fixture(scope="session")
def compilable() -> None:
    """torch 2.6 can't make one graph of transformers' models, patched or not."""
    try:
        torch.compile(fresh_model(LLAMA), fullgraph=True, backend="eager")(**text(5), use_cache=False)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"the unpatched model doesn't compile with torch {torch.__version__}: {str(error)[:100]}")
