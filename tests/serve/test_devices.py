"""On a GPU, heads of a served batch make no tensor on the CPU and wait for nothing. Fake tensors need no GPU for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mimic_core as mc
from mimic_core.types import ATTENTION_SITES
from mimic_core.vllm import paged
from mimic_core.vllm.batch import Heads, Step, Tokens
from tests.support import serving

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or VERSION < (2, 15), reason="fake tensors need CUDA's driver"
)

GPU = torch.device("cuda")


def test_heads_stay_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = serving.model_at(tmp_path, "llama")
    monkeypatch.setattr("mimic_core.ops.native.ops_for", lambda _: None)  # they ask the driver
    # A page-locked copy needs the driver, too.
    monkeypatch.setattr(
        "mimic_core.vllm.batch._ready",
        lambda found, device: torch.zeros(found.shape, dtype=torch.from_numpy(found).dtype, device=device),
    )
    of_one_head = {name: x for name, x in {**serving.STACKS, **serving.HEADS}.items() if name not in serving.COMPOSED}
    for head, options in of_one_head.values():
        whole, part = (mc.build_shifts(model, head, **{**options, **more}) for more in ({}, {"layers": (1,)}))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for one in (whole, part):
                one.requires_grad_(False)._apply(lambda x, mode=mode: mode.from_tensor(x).to(GPU))
            positions = whole.config.positions
            tokens = Tokens(16, positions, GPU)
            counts, starts = np.array([1, 5]), np.array([3, 0])
            step = Step(counts, starts, starts if positions == "generated" else starts + counts)
            for rows in ([0, 0], [0, 1], [0, -1]):
                tokens.begin(np.array(rows), np.ones(2), step)
                assert tokens.is_active
                assert all(x.device.type == "cuda" for x in tokens.of(6))
                for layer in whole.layers:
                    for site in whole[layer].edits():
                        heads = Heads([whole, part], layer, site, model, tokens)
                        query = torch.empty(6, 4, 32, device=GPU, dtype=torch.bfloat16)
                        value = query.clone() if site in ("query", "attn_heads") else query[:, :2]
                        if site not in ATTENTION_SITES:
                            spec = whole.spec.layers[layer]
                            width = spec.mlp_width if site == "mlp_hidden" else spec.hidden_size
                            value = torch.empty(6, width, device=GPU, dtype=torch.bfloat16)
                        impl = SimpleNamespace(scale=0.2)
                        attention = paged.Attention(impl, query, query, None, kept=[])
                        attention._lse = torch.empty(6, 4, device=GPU)
                        edited = heads(value, attention)
                        assert (edited.device.type, edited.shape, edited.dtype) == ("cuda", value.shape, value.dtype)
