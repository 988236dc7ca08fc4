"""A fixture for what compiled.py and its neighbour need: a torch that can make one graph of a transformers model."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def compilable() -> None:
    """torch 2.6 can't make one graph of transformers' models, patched or not."""
    try:
        from tests.edits.compiled import LLAMA, text
        from tests.support.cases import fresh_model

        torch.compile(fresh_model(LLAMA), fullgraph=True, backend="eager")(**text(5), use_cache=False)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"the unpatched model doesn't compile with torch {torch.__version__}: {str(error)[:100]}")
