"""Models of other packages, as they are installed: every law of the kit goes for them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

import mimic_core as mc

pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
SITES = ("query", "key", "value", "attn_heads", "lse", "attn_out", "mlp_out", "mlp_hidden")
LAWS = (*SITES, "own layer", "coverage", "decoder only", "MimIC", "LIVE", "zero shift", "removal", "never reached")
LAWS += ("saved and loaded", "zero shift generates", "cached decoding", "padding")


def passed(model: nn.Module, inputs: Any = None, **how: Any) -> set[str]:
    report = mc.testing.check_adapter(model, inputs, **how)
    report.raise_for_failures()
    return {row.law for row in report.rows if row.verdict == "passed"}


# --- x-transformers: a layer is a list of norms, attention or MLP, and what adds the residual

DECODERS: dict[str, dict[str, Any]] = {
    "rotary, grouped": {"rotary_pos_emb": True, "attn_kv_heads": 2},
    "rotary, grouped, flash": {"rotary_pos_emb": True, "attn_kv_heads": 2, "attn_flash": True},
    "ALiBi": {"alibi_pos_bias": True},
    "ALiBi, one key head, flash": {"alibi_pos_bias": True, "attn_one_kv_head": True, "attn_flash": True},
    "sinks, normed query": {"attn_qk_norm": True, "attn_head_learned_sink": True, "sandwich_norm": True},
}


def x_transformer(**options: Any) -> Any:
    package = pytest.importorskip(
        "x_transformers", reason="x-transformers is not installed; .ci/real_code.txt has what it needs"
    )
    torch.manual_seed(0)
    layers = package.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    return package.TransformerWrapper(num_tokens=61, max_seq_len=64, attn_layers=layers).eval().requires_grad_(False)


def x_decode(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
    x, cache = model(prompt["x"], return_intermediates=True)
    ids, steps = prompt["x"], [x[:, -1]]
    for one in new.split(1, dim=1):
        ids = torch.cat([ids, one], dim=1)  # of which only the last runs
        x, cache = model(ids, cache=cache, return_intermediates=True)
        steps.append(x[:, -1])
    return torch.stack(steps, dim=1)


def x_pad(samples: list[dict[str, Any]], side: str) -> tuple[dict[str, Any], Tensor]:
    ids = [s["x"][0] for s in samples]
    missing = max(map(len, ids)) - torch.tensor([len(one) for one in ids])
    place = torch.arange(max(map(len, ids)))
    if side == "left":
        x = nn.utils.rnn.pad_sequence([one.flip(0) for one in ids], batch_first=True).flip(1)
        return {"x": x, "seq_start_pos": missing}, place >= missing[:, None]
    real = place < len(place) - missing[:, None]
    return {"x": nn.utils.rnn.pad_sequence(ids, batch_first=True), "mask": real}, real


@pytest.mark.parametrize("kind", DECODERS)
def test_every_law_holds_for_x_transformers(kind: str) -> None:
    model = x_transformer(**DECODERS[kind])
    assert passed(model, decode=x_decode, pad=x_pad) >= set(LAWS)
    assert mc.build_shifts(model, "mimic").layers == (0, 2)
    assert mc.build_shifts(model, mc.LIVEConfig(site="mlp_out")).layers == (1, 3)


def test_a_part_that_runs_twice_in_x_transformers_is_refused() -> None:
    model = x_transformer(layers_execute_order=(0, 1, 0, 1, 2, 3))
    assert mc.build_shifts(model, "mimic").layers == (2,)
    with pytest.raises(mc.UnsupportedModelError, match="layer 0 .*runs 2 times in a forward"):
        mc.build_shifts(model, "mimic", layers=(0,))


# --- OpenFlamingo: a decoder of transformers, with gated cross-attention in each layer


class Vision(nn.Module):
    """CLIP, with what OpenFlamingo takes of open_clip's: what is pooled, and the tokens."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.clip(x)
        return out.pooler_output, out.last_hidden_state[:, 1:]


def flamingo(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Only its function that loads a CLIP needs that.
    if find_spec("open_clip") is None:
        monkeypatch.setitem(sys.modules, "open_clip", ModuleType("open_clip"))
    package = pytest.importorskip(
        "open_flamingo", reason="open_flamingo is not installed; .ci/real_code.txt has what it needs"
    )
    src = package.src
    torch.manual_seed(0)
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        language: Any = OPTForCausalLM(
            OPTConfig(vocab_size=61, max_position_embeddings=64, word_embed_proj_dim=32, **sizes)
        )
        layers = "model.decoder.layers"
    else:
        language = MptForCausalLM(MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=2, max_seq_len=64))
        layers = "transformer.blocks"
    src.utils.extend_instance(language, src.flamingo_lm.FlamingoLMMixin)
    language.set_decoder_layers_attr_name(layers)
    clip = nn.Module()
    clip.visual = Vision()
    model = package.Flamingo(clip, language, 60, 59, vis_dim=16, cross_attn_every_n_layers=1 if kind == "opt" else 2)
    model.perceiver = src.helpers.PerceiverResampler(dim=16, depth=1, dim_head=8, heads=2, num_latents=4)  # a small one
    for name, p in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(p, 0.7)  # at first it is 0, and images are not seen
    return model.eval().requires_grad_(False)


def flamingo_decode(model: Any, prompt: Any, new: Tensor) -> Tensor:
    """As its `generate`."""
    language, mask, past, steps = model.lang_encoder, prompt["attention_mask"], None, []
    language._use_cached_vision_x = True
    try:
        model._encode_vision_x(prompt["vision_x"])
        for ids in (prompt["lang_x"], *new.split(1, dim=1)):
            mask = mask if past is None else torch.cat([mask, torch.ones_like(ids)], dim=1)
            out = language(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits[:, -1])
    finally:
        language.clear_conditioned_layers()
        language._use_cached_vision_x = False
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("kind", ["opt", "mpt"])
def test_every_law_holds_for_open_flamingo(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flamingo(kind, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 58, (2, 9), generator=generator)
    ids[:, 1] = ids[:, 4] = model.media_token_id
    images = torch.randn(2, 2, 1, 3, 8, 8, generator=generator)
    inputs = {"vision_x": images, "lang_x": ids, "attention_mask": torch.ones_like(ids)}
    adapter = mc.GenericAdapter(example=inputs)
    assert passed(model, inputs, adapter=adapter, decode=flamingo_decode) >= {*LAWS, "layer_in", "layer_out"}
    names = {m: name for name, m in model.named_modules()}
    spec = mc.adapter_for(model, adapter).spec(model)
    paths = [names[adapter.module(model, layer.index, site)] for layer in spec.layers for site in layer.sites]
    assert len(paths) == 2 * len(mc.types.SITES)
    assert not any("cross_attn" in path or "vision" in path or "perceiver" in path for path in paths)
