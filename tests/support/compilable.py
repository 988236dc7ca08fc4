"""What needs one graph of a transformers model: whether this torch can make it, small models, and ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
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


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def in_onnxruntime(model: nn.Module, ids: Tensor, folder: Path) -> Tensor:
    """The logits of a model that was exported to a file."""
    import onnxruntime

    program = torch.onnx.export(Logits(model), (ids,), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    return torch.from_numpy(found)
