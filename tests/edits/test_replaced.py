"""Modules replaced while a model is patched: the order of both does not change the result, or it is refused."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrizations, prune
from transformers import OPTConfig, OPTForCausalLM

import mimic_core as mc
from mimic_core.adapters.named import LlamaAdapter
from mimic_core.errors import PatchStateError
from tests.support.cases import BY_NAME, Case, fresh_model, logits_of, random_shifts
from tests.support.snapshot import snapshot


def _opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        init_std=0.2,
    )
    return OPTForCausalLM(config)


# Its MLP is not a module of its own: `mlp_out` is the output of the linear layer fc2, which PEFT replaces.
OPT = Case("opt", _opt)
LLAMA = BY_NAME["llama"]
FAMILIES = [OPT, LLAMA, BY_NAME["idefics"]]


def layers_of(model: Any) -> nn.ModuleList:
    return model.get_decoder().layers


def mlp_of(layer: nn.Module) -> str:
    return "fc2" if hasattr(layer, "fc2") else "mlp"


def last_linear(layer: Any) -> nn.Module:
    return layer.fc2 if hasattr(layer, "fc2") else layer.mlp.down_proj


def linear_layers(model: nn.Module) -> list[str]:
    return ["fc2" if hasattr(layers_of(model)[0], "fc2") else "down_proj", "q_proj"]


def each_layer(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def all_of(model: Any) -> None:
        for layer in layers_of(model):
            change(layer)

    return all_of


def mlps(make: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    return each_layer(lambda layer: setattr(layer, mlp_of(layer), make(getattr(layer, mlp_of(layer)))))


class Doubled(nn.Module):
    """Somebody's wrapper, with another output than that of the module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


class AsIs(ModelHook):
    """A hook of accelerate that changes nothing."""


def add_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 2, "target_modules": linear_layers(model), "init_lora_weights": False} | options)
    return get_peft_model(model, config).eval()


def add_ia3(model: Any) -> None:
    names = linear_layers(model)
    torch.manual_seed(1)
    get_peft_model(model, IA3Config(target_modules=names, feedforward_modules=names[:1], init_ia3_weights=False)).eval()


def add_loha(model: Any) -> None:
    torch.manual_seed(1)
    get_peft_model(model, LoHaConfig(r=2, target_modules=linear_layers(model), init_weights=False)).eval()


def replace_linear(model: Any) -> None:
    """As a library for quantization does, past `setattr`."""
    for layer in layers_of(model):
        for module in list(layer.modules()):
            for name, child in list(module._modules.items()):
                if child is last_linear(layer) and isinstance(child, nn.Linear):
                    new = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                    new.load_state_dict({key: x.bfloat16().float() for key, x in child.state_dict().items()})
                    module._modules[name] = new.eval().requires_grad_(False)


def swap_layers(model: Any) -> None:
    layers = layers_of(model)
    layers[0], layers[1] = layers[1], layers[0]


def replace_decoder(model: Any) -> None:
    decoder = model.get_decoder()
    torch.manual_seed(3)
    other = type(decoder)(decoder.config).eval().requires_grad_(False)
    parent, name = next((m, n) for m in model.modules() for n, c in m._modules.items() if c is decoder)
    setattr(parent, name, other)


def normalize_weights(layer: Any) -> None:
    torch.manual_seed(1)
    parametrizations.weight_norm(layer.self_attn.q_proj)
    parametrizations.spectral_norm(last_linear(layer))


CHANGES: dict[str, Callable[[Any], object]] = {
    "lora": add_lora,
    "dora": lambda model: add_lora(model, use_dora=True),
    "lora merged": lambda model: add_lora(model).merge_and_unload(),
    "lora unloaded": lambda model: add_lora(model).unload(),
    "modules to save": lambda model: add_lora(model, modules_to_save=[mlp_of(layers_of(model)[0])]),
    "ia3": add_ia3,
    "loha": add_loha,
    "mlp wrapped": mlps(Doubled),
    "linear replaced": replace_linear,
    "layers checkpointed": lambda m: apply_activation_checkpointing(m, check_fn=lambda x: x in set(layers_of(m))),
    "attention checkpointed": lambda m: apply_activation_checkpointing(
        m, check_fn=lambda x: x in {layer.self_attn for layer in layers_of(m)}
    ),
    "layers swapped": swap_layers,
    "list of layers": lambda m: setattr(m.get_decoder(), "layers", nn.ModuleList(layers_of(m))),
    "mlp tied": lambda m: setattr(
        layers_of(m)[2], mlp_of(layers_of(m)[2]), getattr(layers_of(m)[0], mlp_of(layers_of(m)[0]))
    ),
    "attention tied": lambda m: setattr(layers_of(m)[2], "self_attn", layers_of(m)[0].self_attn),
    "decoder replaced": replace_decoder,
    "accelerate": each_layer(lambda layer: add_hook_to_module(getattr(layer, mlp_of(layer)), AsIs())),
    "parametrized": each_layer(normalize_weights),
    "pruned": each_layer(lambda layer: prune.l1_unstructured(last_linear(layer), "weight", 0.3)),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "eager": lambda m: m.set_attn_implementation("eager"),
}


def patched(model: nn.Module, what: str) -> mc.Handle:
    if what == "layer_out":
        return mc.hook(model, what, lambda value, at: value * (1.1 + at.layer / 8))
    return mc.patch(model, random_shifts(model, what))


def logits(model: nn.Module, case: Case) -> Tensor:
    dtype = next(model.parameters()).dtype
    return logits_of(model, {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.inputs().items()})


# Nothing stands at another place then, or only a wrapper whose output is that of the module inside.
ALLOWED = ("layers checkpointed", "attention checkpointed", "accelerate", "parametrized", "pruned", "bfloat16", "eager")


def _is_one_of_the_exhaustive(family: int, change: int, what: str) -> bool:
    """Each change meets each family and each edit. All of them meet OPT's edit at a module that PEFT replaces."""
    return what != ("mimic", "live", "layer_out")[(family + change) % 3] and (family, what) != (0, "live")


@pytest.mark.parametrize(
    ("case", "change", "what"),
    [
        pytest.param(case, change, what, marks=pytest.mark.exhaustive if _is_one_of_the_exhaustive(i, j, what) else ())
        for i, case in enumerate(FAMILIES)
        for j, change in enumerate(CHANGES)
        for what in ("mimic", "live", "layer_out")
    ],
    ids=str,
)
def test_before_the_patch_or_after_it(case: Case, change: str, what: str) -> None:
    """The same logits, or an error; and the same logits if it is patched again, as the error says."""
    plain, before, after = (fresh_model(case) for _ in range(3))
    CHANGES[change](plain)
    CHANGES[change](before)
    with patched(before, what):
        wanted = logits(before, case)
    assert not torch.allclose(wanted, logits(plain, case), atol=1e-3)
    handle = patched(after, what)
    logits(after, case)
    CHANGES[change](after)
    try:
        assert torch.equal(logits(after, case), wanted)
    except PatchStateError as error:
        assert change not in ALLOWED
        assert re.search("was replaced by .*remove its handle and patch again", str(error))  # noqa: PT017
    handle.remove()
    assert torch.equal(logits(after, case), logits(plain, case))
    with patched(after, what):
        assert torch.equal(logits(after, case), wanted)
    if change not in ("parametrized", "modules to save"):  # classes of their own, and copies of patched modules
        assert snapshot(after) == snapshot(plain)


def test_the_linear_layer_of_opt() -> None:
    """LoRA around the module of `mlp_out`: its share was added after the edit, or before it, as the order was."""
    model = fresh_model(OPT)
    handle = patched(model, "live")
    lora = add_lora(model)
    with pytest.raises(PatchStateError, match=r"layers\.0\.fc2, a Linear, was replaced by peft.*LoraModel|Linear"):
        logits(model, OPT)
    # OPT's sites are found by running it, which the patch refuses: not a model of an unsupported kind.
    with pytest.raises(PatchStateError, match=r"fc2, a Linear, was replaced by peft"), mc.capture(model, ["query"]):
        pass
    handle.remove()
    handle = patched(model, "live")
    shifted = logits(model, OPT)
    with lora.disable_adapter():
        assert not torch.equal(logits(model, OPT), shifted)
    lora.merge_and_unload()
    with pytest.raises(PatchStateError, match=r"fc2, a Linear, was replaced by torch"):
        logits(model, OPT)
    handle.remove()
    logits(model, OPT)


def test_copies_look_at_their_own_modules() -> None:
    model = fresh_model(OPT)
    handle = patched(model, "live")
    shifted = logits(model, OPT)
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    add_lora(twin)
    assert torch.equal(logits(model, OPT), shifted)
    assert torch.equal(logits(loaded, OPT), shifted)
    with pytest.raises(PatchStateError, match="was replaced by"):
        logits(twin, OPT)
    for one in mc.handles(twin):
        one.remove()
    assert not mc.handles(twin)
    logits(twin, OPT)
    handle.remove()
    assert torch.equal(logits(loaded, OPT), shifted)


def test_a_copy_of_a_part_is_not_patched() -> None:
    model = fresh_model(LLAMA)
    handles = [patched(model, what) for what in ("mimic", "live", "layer_out")]
    shifted = logits(model, LLAMA)
    layer: Any = layers_of(model)[1]
    copies = [copy.deepcopy(layer), copy.deepcopy(layer.mlp), copy.deepcopy(layer.self_attn)]
    assert not any(mc.handles(part) for part in copies)
    x = torch.randn(1, 2, 32)
    assert torch.equal(copies[1](x), copies[0].mlp(x))
    assert not torch.equal(copies[1](x), layer.mlp(x))
    assert torch.equal(logits(model, LLAMA), shifted)
    for handle in handles:
        handle.remove()
    assert torch.equal(copies[1](x), layer.mlp(x))


@pytest.mark.parametrize("change", ["layer deleted", "layer added", "one layer twice", "cut"])
def test_other_layers_are_refused(change: str) -> None:
    model: Any = fresh_model(LLAMA)
    handle = patched(model, "live")
    shifted = logits(model, LLAMA)
    layers = layers_of(model)
    others = {
        "layer deleted": [layers[0], layers[2]],
        "layer added": [layers[1], *layers],
        "one layer twice": [layers[0], layers[1], layers[0]],
        "cut": layers[:2],
    }[change]
    model.model.layers = nn.ModuleList(others)
    with pytest.raises(PatchStateError, match="was replaced by"):
        logits(model, LLAMA)
    model.model.layers = layers  # what is put back runs again
    assert torch.equal(logits(model, LLAMA), shifted)
    handle.remove()


def test_one_layer_twice_has_a_head_for_each_place() -> None:
    """As in a model with a copy of the layer there. An adapter that does not say so is refused."""
    model, other = fresh_model(LLAMA), fresh_model(LLAMA)
    layers_of(model)[2] = layers_of(model)[0]
    layers_of(other)[2] = copy.deepcopy(layers_of(other)[0])
    before = snapshot(model)
    outs = []
    for one in (model, other):
        torch.manual_seed(0)
        handle = patched(one, "live")
        outs.append(logits(one, LLAMA))
        handle.remove()
    assert torch.equal(*outs)
    assert snapshot(model) == before

    class Silent(LlamaAdapter):
        def spec(self, model: Any) -> mc.ModelSpec:
            found = super().spec(model)
            return replace(found, layers=tuple(replace(layer, run=0) for layer in found.layers))

    with pytest.raises(PatchStateError, match="layers 0 and 2 are the same module"):
        mc.patch(model, mc.build_shifts(model, "live", adapter=Silent), adapter=Silent)


@pytest.mark.newest
@pytest.mark.parametrize("way", ["in place", "submodule"])
def test_compiled_code_is_no_way_around(way: str, no_shape_checks: None) -> None:
    model: Any = fresh_model(OPT)
    handle = patched(model, "live")
    if way == "in place":
        model.compile(backend="eager")
    else:
        for layer in layers_of(model):
            layer.self_attn = torch.compile(layer.self_attn, backend="eager")  # the same output, so the edits stay
    with torch.no_grad():
        shifted = logits(model, OPT)
        add_lora(model)
        with pytest.raises(PatchStateError, match="replaced|compile"):
            logits(model, OPT)
        handle.remove()
    torch.compiler.reset()
    assert not torch.equal(logits(model, OPT), shifted)
