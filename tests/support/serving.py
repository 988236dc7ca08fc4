"""Tiny models for vLLM, stacks for them, and the answers of transformers' own model with the stack patched in."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mimic_core as mc
import mimic_core.vllm as mv

# With log probabilities, vLLM compiles a function that counts, and the first answer of a process takes 15 seconds.
# Where there is no vLLM, other tests compile.
if find_spec("vllm") is not None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
# vLLM's attention on a CPU has heads of at least 32.
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA3: dict[str, Any] = {
    "initializer_range": 0.1,
    "sliding_window": 16,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
}
_GPT_OSS: dict[str, Any] = {
    "hidden_size": 128,
    "initializer_range": 0.1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "attn_implementation": "eager",
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# The class of transformers, and the options of its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.2, "residual_multiplier": 0.7}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", {"hidden_size": 128}),
    "qwen2": ("Qwen2ForCausalLM", {"hidden_size": 128}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA3),
    "gemma2": ("Gemma2ForCausalLM", {**_GEMMA3, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"}),
    "gpt2": ("GPT2LMHeadModel", {"hidden_size": 128, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 128, "ffn_dim": 96, "word_embed_proj_dim": 128, "num_key_value_heads": 4},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", _GPT_OSS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS),
}

STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mimic": ("mimic", {}),
    "other": ("mimic", {"layers": (1, 2)}),
    "shared": ("mimic", {"shared": True}),
    "vector": ("mimic", {"gate": False}),
    "both": ("mimic", {"mlp_vector": True}),
    "live": ("live", {"sigmoid": True}),
    "alive": ("live", {"sigmoid": True}),
    "layer": ("live", {"site": "layer_out", "sigmoid": True}),
    "out": ("live", {"site": "attn_out", "sigmoid": True}),
    "ia3": ("ia3", {}),
    "end": ("function_vector", {}),
    "ends": ("loreft", {"rank": 2, "positions": ("first", 3, "last", 7)}),
}
# Of each of them two stacks, so that tokens of one step have different numbers of the same kind.
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    f"{head}-{i}": (head, {})
    for head in ("attn_bias", "caa", "hyper_icl", "i2cl", "icv", "m2iv", "mlp_bias", "virtual_kv")
    for i in range(2)
}
# At some positions alone.
HEADS |= {f"{head}-{i}": (head, {}) for head in ("task_vector", "mtv") for i in range(2)}
HEADS |= {"last": ("mimic", {"positions": ("last", 20)}), "few": ("hyper_icl", {"positions": ("first", 5, "last", 5)})}
HEADS |= {"prompt": ("attn_bias", {"positions": "prompt"}), "generated": ("live", {"positions": "generated"})}
HEADS |= {"low-rank": ("virtual_kv", {"rank": 2}), "weighted": ("virtual_kv", {"learn_weight": True, "layers": (1,)})}
# Composed of several heads, of which one may be there alone in another stack.
_LAST = mc.MimICConfig(positions=("last", 20))
COMPOSED: dict[str, Any] = {
    "mimic-and-live": ["mimic", mc.LIVEConfig(sigmoid=True)],
    "query-and-gate": ["hyper_icl", "mimic"],
    "gate-and-pairs": ["mimic", "virtual_kv"],
    "twice": ["attn_bias", "attn_bias", mc.MlpBiasConfig(layers=(1,))],
    "at-the-end": [_LAST, mc.LoReFTConfig(rank=2, positions=("first", 3, "last", 7)), "mlp_bias"],
}
HEADS |= {name: (parts, {}) for name, parts in COMPOSED.items()}

LENGTH = 16
START = list(range(10, 102))  # two blocks of keys that prompts share, and most of a third


class Ask(NamedTuple):
    """A prompt, the stack it asks for, and the strength."""

    prompt: list[int]
    stack: str | None = None
    strength: float = 1.0


class Answer(NamedTuple):
    """Greedy tokens and their log probabilities."""

    tokens: list[int]
    logprobs: list[float]

    def apart(self, other: Answer) -> float:
        """How far apart the log probabilities are, at most."""
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


def model_at(path: Path, name: str, **options: Any) -> PreTrainedModel:
    """A tiny model with random weights, also saved at `path`."""
    torch.manual_seed(0)
    kind = getattr(transformers, MODELS[name][0])
    model = kind(kind.config_class(**{**TEXT, **MODELS[name][1], **options})).eval().requires_grad_(False)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(TEXT["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        path
    )
    return model


def quantise(path: Path) -> None:
    """Change a saved Llama to random weights of 4 bits, in the format of GPTQ."""
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        out, into = weights.pop(name).shape
        layer, groups = name.removesuffix("weight"), into // 32
        packed = torch.randint(-(2**31), 2**31, (into // 8, out), generator=generator).int()
        weights |= {f"{layer}qweight": packed, f"{layer}g_idx": (torch.arange(into) // 32).int()}
        weights[f"{layer}scales"] = torch.rand(groups, out, generator=generator) * 0.1
        weights[f"{layer}qzeros"] = torch.full((groups, out // 8), 0x77777777).int()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
    }
    (path / "config.json").write_text(json.dumps(config))


def lora_at(path: Path, model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A LoRA of all linear layers of a Llama, saved at `path`. Returns a copy of the model with it in the weights."""
    generator = torch.Generator().manual_seed(seed)
    merged, weights, names = copy.deepcopy(model), {}, set()
    for name, module in merged.named_modules():
        if name.endswith("_proj"):
            down = 0.2 * torch.randn(4, module.in_features, generator=generator)
            up = 0.2 * torch.randn(module.out_features, 4, generator=generator)
            weights |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += up @ down
            names.add(name.rpartition(".")[2])
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": sorted(names), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return merged


def stack_at(path: Path, model: PreTrainedModel, name: str, seed: int = 0) -> mc.ShiftStack:
    """A stack with random numbers that change answers, also saved at `path`.

    They are not larger: attention that is very sharp multiplies rounding. At 0.3, vLLM with AVX2 gave one answer that
    was 1e-4 apart from fp64, with any LSE.
    """
    head, options = {**STACKS, **HEADS}.get(name, (name.partition("-")[0], {}))
    stack = mc.build_shifts(model, head, **options)
    generator = torch.Generator().manual_seed(seed)
    for key, x in [*stack.named_parameters(), *stack.named_buffers()]:
        x.data = torch.randn(x.shape, generator=generator) * (2.0 if "vector" in key else 0.2)
    mc.save_shifts(stack, path)
    return stack


def wanted(
    model: PreTrainedModel, stacks: Mapping[str, mc.ShiftStack], ask: Ask, length: int, **images: Tensor
) -> Answer:
    """What transformers' model answers with the stack patched in."""
    row = torch.tensor([ask.prompt])
    options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run() -> Answer:
        found = model.generate(row, **options, **images, output_logits=True, return_dict_in_generate=True)
        tokens = found.sequences[0, row.shape[1] :]
        logprobs = torch.stack([x[0].float() for x in found.logits]).log_softmax(-1)
        return Answer(tokens.tolist(), logprobs[torch.arange(length), tokens].tolist())

    if ask.stack is None:
        return run()
    with mc.patch(model, stacks[ask.stack], strength=ask.strength):
        return run()


def params(ask: Ask, length: int, **options: Any) -> Any:
    """vLLM's parameters for an ask."""
    from vllm import SamplingParams

    extra = None if ask.stack is None else {"shifts": ask.stack, "strength": ask.strength}
    fixed = {"temperature": 0, "max_tokens": length, "ignore_eos": True, "detokenize": False, "logprobs": 0}
    return SamplingParams(**{**fixed, **options}, extra_args=extra)


def answers(llm: Any, asks: Sequence[Ask], length: int) -> list[Answer]:
    """What vLLM answers to all of them in one batch."""
    prompts = [{"prompt_token_ids": ask.prompt} for ask in asks]
    found = llm.generate(prompts, [params(ask, length) for ask in asks], use_tqdm=False)
    return [answer_of(one.outputs[0]) for one in found]


def answer_of(output: Any) -> Answer:
    """Tokens and log probabilities of one of vLLM's outputs."""
    tokens = list(output.token_ids)
    return Answer(tokens, [x[token].logprob for x, token in zip(output.logprobs, tokens, strict=True)])


def assert_same(found: Answer, expected: Answer, what: object, tolerance: float = 1e-4) -> None:
    """Equal tokens, and equal log probabilities up to rounding."""
    assert found.tokens == expected.tokens, what
    apart = found.apart(expected)
    assert apart < tolerance, f"{what}: {apart}"


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """vLLM with a model in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    fixed = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256, "block_size": 32}
    llm = LLM(str(path), **{**fixed, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


class Served(NamedTuple):
    """An engine, and what transformers needs to give the same answers."""

    model: PreTrainedModel
    stacks: dict[str, mc.ShiftStack]
    llm: Any
    folder: Path

    def check(self, asks: Sequence[Ask]) -> None:
        """Compare the answers to all of them, in one batch."""
        for found, ask in zip(answers(self.llm, asks, LENGTH), asks, strict=True):
            assert_same(found, self.wanted(ask), ask[1:])

    def wanted(self, ask: Ask) -> Answer:
        """What transformers' model answers."""
        return wanted(self.model, self.stacks, ask, LENGTH)


@contextmanager
def served(folder: Path, name: str, stacks: Sequence[str], processes: bool = False, **options: Any) -> Iterator[Served]:
    """A tiny model and stacks, served.

    Args:
        processes: The engine has a process of its own.
    """
    model = model_at(folder / "model", name)
    made = {one: stack_at(folder / one, model, one, seed) for seed, one in enumerate(stacks)}
    if "quantization" in options:
        quantise(folder / "model")
    named = {one: folder / one for one in stacks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(processes)))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with engine(folder / "model", **mv.engine_args(named), **options) as llm:
            yield Served(model, made, llm, folder)
