"""Where the sites of a model are in vLLM's own modules."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..adapters import locate
from ..errors import UnsupportedModelError
from ..origins import Origin, origin_of
from ..types import Located, Site

# vLLM's classes whose answers were seen to be those of the patched model of transformers, by tests/serve.
TRIED = (
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "Idefics3ForConditionalGeneration",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "TransformersForCausalLM",  # model_impl="transformers"
)


# Modules of a layer that vLLM calls otherwise than transformers.
_OTHER_NAMES = {"mlp": "block_sparse_moe"}


class VLLMLayer(NamedTuple):
    """The modules of a decoder layer: vLLM's `Attention`, and those of the sites that it has."""

    attn: Any
    sites: dict[Site, nn.Module]


def known_to_transformers(vllm_config: Any) -> Located:
    """The model as transformers builds it, without its weights: its sizes and sites, and who it is.

    Raises:
        UnsupportedModelError: transformers has no class for it, or no adapter fits it.
    """
    from vllm.config import set_current_vllm_config

    config = copy.deepcopy(vllm_config.model_config.hf_config)
    # What looks at numbers, which are not there: the grouped product of experts, and a search for padding.
    config._experts_implementation = "batched_mm"
    config.pad_token_id = None
    # With model_impl="transformers" it is that of vLLM, which runs in no model but its own.
    config._attn_implementation = None
    (name, *_) = config.architectures or [""]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UnsupportedModelError(f"transformers has no class {name!r}, so the sites of this model are not known")
    # With model_impl="transformers", vLLM has changed this class: making one asks for the config of the engine.
    with torch.device("meta"), set_current_vllm_config(vllm_config):
        model = kind(config).eval()
    return locate(model)


def origin(model_config: Any, found: Located) -> Origin:
    """Who the model is: by the files of its weights, because vLLM fuses what transformers has apart."""
    names = {id(x): name for name, x in found.model.named_parameters()}
    files = _files(model_config)

    def read(x: Tensor) -> Tensor | None:
        name = names[id(x)]
        if name not in files:
            return None
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    return origin_of(found, read)


def _files(model_config: Any) -> dict[str, str]:
    """In which file each weight of a model is. Empty: there are no files in the format of safetensors."""

    def file(name: str) -> str | None:
        return cached_file(
            model_config.model, name, revision=model_config.revision, _raise_exceptions_for_missing_entries=False
        )

    if index := file("model.safetensors.index.json"):
        parts: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        paths = {part: file(part) for part in set(parts.values())}
        return {name: path for name, part in parts.items() if (path := paths[part])}
    whole = file("model.safetensors")
    if whole is None:
        return {}
    with safe_open(whole, "pt") as weights:
        return dict.fromkeys(weights.keys(), whole)


def layers_of(model: nn.Module, found: Located) -> list[VLLMLayer]:
    """The decoder layers of vLLM's model, in order.

    Raises:
        UnsupportedModelError: it was not tried, or its modules are not as expected.
    """
    name = type(model).__name__
    if name not in TRIED:
        raise UnsupportedModelError(
            f"stacks were not seen to be exact in vLLM's class {name}; those that were: {', '.join(TRIED)}"
        )
    if looped := next((spec.path for spec in found.spec.layers if spec.run), ""):
        raise UnsupportedModelError(
            f"{looped} runs several times in a forward, and a stack has heads for each pass: that was not tried in vLLM"
        )
    layers = []
    for spec in found.spec.layers:
        mine = _layer(model, found, spec.index)
        attn = mine.attn
        sizes = (attn.num_heads, attn.num_kv_heads, attn.head_size, attn.head_size_v)
        wanted = (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim)
        if sizes != wanted:
            raise UnsupportedModelError(
                f"layer {spec.index} has {wanted} heads, key heads, head and value widths in transformers, and {sizes} "
                f"in vLLM's {name}"
            )
        if name == "OPTForCausalLM":
            _scale_before(attn)
        layers.append(mine)
    return layers


def _scale_before(attn: Any) -> None:
    """Scale the query before attention, as transformers does in OPT, and not in it: heads read the scaled query."""
    inner, scale = attn.forward, attn.impl.scale
    attn.impl.scale = 1.0
    attn.forward = lambda query, *args, **kwargs: inner(query * scale, *args, **kwargs)


def _layer(model: nn.Module, found: Located, index: int) -> VLLMLayer:
    """The modules have the names that they have in transformers, whatever comes before those of the layers."""
    from vllm.model_executor.layers.attention import Attention

    inside = [
        (path.split("."), module)
        for path, module in model.named_modules()
        if isinstance(module, Attention) and module.attn_type == "decoder"
    ]
    paths = [(path, module) for path, module in inside if str(index) in path]
    if len(paths) != 1:
        raise UnsupportedModelError(
            f"layer {index} of vLLM's {type(model).__name__} has {len(paths)} modules that attend; one is needed"
        )
    path, attn = paths[0]
    at = path.index(str(index)) + 1
    layer = model.get_submodule(".".join(path[:at]))
    attention = model.get_submodule(".".join(path[:-1]))
    sites: dict[Site, nn.Module] = {"query": attn, "attn_heads": attn, "attn_out": attention, "layer_out": layer}
    if attn.kv_sharing_target_layer_name is None and hasattr(attn.impl, "do_kv_cache_update"):
        sites |= {"key": attn, "value": attn}
    theirs = found.model.get_submodule(found.spec.layers[index].path)
    names = {id(module): name for name, module in theirs.named_modules()}
    if "mlp_out" in found.spec.layers[index].sites:
        name = names.get(id(found.module(index, "mlp_out")), "")
        mlp = layer._modules.get(name) or layer._modules.get(_OTHER_NAMES.get(name, ""))
        if mlp is not None:
            sites["mlp_out"] = mlp
    if "mlp_hidden" in found.spec.layers[index].sites:
        down = dict(layer.named_modules()).get(names.get(id(found.module(index, "mlp_hidden")), ""))
        if down is not None:
            sites["mlp_hidden"] = down
    return VLLMLayer(attn, sites)


def edit_module(module: nn.Module, site: Site, edit: Callable[[Tensor], Tensor]) -> None:
    """Let the output of a module, or its input, go through `edit`, which gets the value of the site [n c]."""
    inner = module.forward

    def edited(value: Tensor) -> Tensor:
        # With model_impl="transformers", modules get all tokens as one sample [1 n c].
        return edit(value) if value.ndim == 2 else edit(value[0])[None]

    if site == "mlp_hidden":
        module.forward = lambda x, *args, **kwargs: inner(edited(x), *args, **kwargs)
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if isinstance(out, Tensor):
            return edited(out)
        if site == "layer_out" and isinstance(out, tuple) and len(out) == 2:
            # vLLM adds the residual in the next norm: the state of the layer is the sum of the two.
            hidden, residual = out
            return edit(hidden + residual), torch.zeros_like(residual)
        if isinstance(out, tuple) and out[1:] == (None,):  # a linear layer, with a bias that is not left to the caller
            return edited(out[0]), None
        raise UnsupportedModelError(f"vLLM's {type(module).__name__} returned {type(out).__name__}, not a tensor")

    module.forward = forward
