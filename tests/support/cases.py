"""The case matrix: a tiny random model of every adapter's family, its inputs, and the heads every law is tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import mimic_core as mc
from mimic_core.heads import LoReFTHead, head_for_config
from mimic_core.heads.loreft import orthonormal
from mimic_core.types import ATTENTION_SITES

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _idefics() -> nn.Module:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    vision = {"embed_dim": 16, **{k: v for k, v in VISION.items() if k != "hidden_size"}}
    config = IdeficsConfig(
        **text | {"num_hidden_layers": 4},
        additional_vocab_size=2,
        cross_layer_interval=2,
        alpha_initializer="normal",
        alphas_initializer_range=0.5,
        alpha_type="vector",
        qk_layer_norms=True,
        use_resampler=False,
        vision_config=vision,
        tie_word_embeddings=False,
    )
    return IdeficsForVisionText2Text(config)


def _idefics2() -> nn.Module:
    perceiver = {
        "model_type": "idefics2_perceiver",
        "resampler_n_latents": 3,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
    }
    config = Idefics2Config(
        text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
        vision_config={"model_type": "idefics2_vision", "num_channels": 3, **VISION},
        perceiver_config=perceiver,
        image_token_id=126,
    )
    return Idefics2ForConditionalGeneration(config)


def _llava() -> nn.Module:
    config = LlavaConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        image_token_index=127,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


@dataclass(frozen=True)
class Case:
    """A model family: how to build it, and what a batch of two samples looks like."""

    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    image_ids: tuple[int, ...] = ()
    pixels: Callable[[int], dict[str, Tensor]] = field(default=lambda n: {}, repr=False)

    def __str__(self) -> str:
        return self.name

    def inputs(self, padding: str = "right") -> dict[str, Tensor]:
        """Two samples of 11 and 8 tokens, an image each where the model takes them; `padding` "right" or "left"."""
        generator = torch.Generator().manual_seed(7)
        rows = [
            torch.tensor([1, *self.image_ids, *torch.randint(3, 120, (n,), generator=generator).tolist()])
            for n in (10 - len(self.image_ids), 7 - len(self.image_ids))
        ]
        pads = [torch.zeros(11 - len(row), dtype=torch.long) for row in rows]
        order = [(row, pad) if padding == "right" else (pad, row) for row, pad in zip(rows, pads, strict=True)]
        ids = torch.stack([torch.cat(parts) for parts in order])
        return self._complete(ids, self.pixels(2))

    def sample(self, index: int) -> dict[str, Tensor]:
        """One sample of `inputs`, without padding."""
        ids = self.inputs()["input_ids"][index]
        pixels = {name: x[index : index + 1] for name, x in self.pixels(2).items()}
        return self._complete(ids[ids != 0][None], pixels)

    def longer(self, inputs: dict[str, Tensor], new_ids: Tensor) -> dict[str, Tensor]:
        """`inputs` with tokens appended."""
        pixels = {name: x for name, x in inputs.items() if name.startswith("pixel")}
        return self._complete(torch.cat([inputs["input_ids"], new_ids], dim=1), pixels)

    def _complete(self, ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = (ids != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **pixels}
        if self.name == "idefics":
            found["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.long)
        return found


def _pixels(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    def make(n: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(n, *shape, generator=torch.Generator().manual_seed(3))}

    return make


CASES = [
    Case("idefics", _idefics, (128, 129, 128), _pixels(1, 3, 16, 16)),
    Case("idefics2", _idefics2, (126, 126, 126), _pixels(1, 3, 16, 16)),
    Case("llava", _llava, (127, 127, 127, 127), _pixels(3, 16, 16)),
    # A head width that is not hidden / heads, and a window shorter than the text.
    Case("llama", lambda: LlamaForCausalLM(LlamaConfig(**TEXT, head_dim=24))),
    Case("mistral", lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=5))),
    Case("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT | {"num_key_value_heads": 4}))),
]
BY_NAME = {case.name: case for case in CASES}
ATTENTION = ("sdpa", "eager")


@lru_cache(maxsize=32)
def model_of(case: Case, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The case's model, frozen, in eval mode; shared by tests, so leave it as it was."""
    return fresh_model(case, attention, dtype)


def fresh_model(case: Case, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(11)
    model = case.build()
    model.set_attn_implementation(attention)
    model.to(dtype).eval().requires_grad_(False)
    # transformers sets some attributes in a model's first forward; a test that compares attributes wants them there.
    logits_of(model, as_dtype(case.inputs(), dtype))
    return model


HEADS: dict[str, mc.HeadConfig] = {
    "mimic": mc.MimICConfig(),
    "mimic-all-keys": mc.MimICConfig(log_z2="all_keys"),
    "mimic-shared": mc.MimICConfig(shared=True),
    "mimic-vector-only": mc.MimICConfig(gate=False),
    "mimic-shared-vector-only": mc.MimICConfig(shared=True, gate=False),
    "mimic-and-mlp": mc.MimICConfig(mlp_vector=True),
    "mimic-one-layer": mc.MimICConfig(layers=(1,)),
    "live": mc.LIVEConfig(),
    "live-layer-out": mc.LIVEConfig(site="layer_out", sigmoid=True),
    "live-attn-out": mc.LIVEConfig(site="attn_out", learn_scale=False, scale_init=1.0),
    "task-vector": mc.TaskVectorConfig(layers=(1,)),
    "function-vector": mc.FunctionVectorConfig(),
    "attn-bias": mc.AttnBiasConfig(),
    "mlp-bias": mc.MlpBiasConfig(),
    "icv": mc.ICVConfig(scale=0.7),
    "caa": mc.CAAConfig(scale=2.0),
    "i2cl": mc.I2CLConfig(),
    "m2iv": mc.M2IVConfig(),
    "virtual-kv": mc.VirtualKVConfig(n=3),
    "virtual-kv-low-rank": mc.VirtualKVConfig(n=3, rank=2, learn_weight=True),
    "hyper-icl": mc.HyperICLConfig(rank=2),
    "ia3": mc.IA3Config(),
    "loreft": mc.LoReFTConfig(rank=2, positions="all"),
    "mtv": mc.MTVConfig(),
}
COMPOSED: dict[str, list[mc.HeadConfig]] = {"mimic+live": [mc.MimICConfig(), mc.LIVEConfig(site="layer_out")]}
LAW_HEADS = (*HEADS, *COMPOSED)
SITE_OF_HEAD = {name: getattr(config, "site", None) or head_for_config(config).site for name, config in HEADS.items()}
SITE_OF_HEAD |= dict.fromkeys(COMPOSED, "attn_heads")
# These act where the prompt ends, so a longer text is another prompt to them.
PROMPT_HEADS = ("task-vector", "function-vector", "mtv")
# These act on keys and values, so on all tokens.
UNLIMITED_HEADS = ("ia3",)


def random_shifts(model: nn.Module, head: str, scale: float = 0.5) -> mc.ShiftStack:
    """A stack with parameters large enough to change every logit."""
    shifts = mc.build_shifts(model, COMPOSED[head] if head in COMPOSED else HEADS[head])
    generator = torch.Generator().manual_seed(5)
    for p in [*shifts.parameters(), *(x for name, x in shifts.named_buffers() if name.endswith("vector"))]:
        p.data = scale * torch.randn(p.shape, generator=generator)
    for name, p in shifts.named_parameters():
        if name.endswith("gate_bias"):
            p.data += 2.0
        if name.endswith("u_k"):  # logits that are much larger than the model's own would enlarge its rounding
            p.data *= 0.3
    return shifts


def zero_vectors(shifts: mc.ShiftStack) -> mc.ShiftStack:
    for name, p in [*shifts.named_parameters(), *shifts.named_buffers()]:
        if name.endswith(("vector", ".weight", ".u_k")):
            p.data.zero_()
        elif name.endswith("scales"):  # of I2CL: of what is there, and of the vector
            p.data[0] = 1
        elif name.endswith(("key_scale", "value_scale", "mlp_scale")):
            p.data.fill_(1)
    for head in shifts:
        if isinstance(head, LoReFTHead):
            head.weight.data, head.bias.data = orthonormal(head.rotation.detach()), torch.zeros_like(head.bias)
    return shifts


def as_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def logits_of(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model(**inputs, use_cache=False, **options).logits


over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_heads = pytest.mark.parametrize("head", LAW_HEADS)
over_attention = pytest.mark.parametrize("attention", ATTENTION)


def over_attention_of(heads: Iterable[str] = LAW_HEADS) -> pytest.MarkDecorator:
    """Heads inside attention with every implementation of it, and those at an output with the first alone."""
    pairs = [(h, a) for h in heads for a in ATTENTION if a == ATTENTION[0] or SITE_OF_HEAD[h] in ATTENTION_SITES]
    return pytest.mark.parametrize(("head", "attention"), pairs)
