"""The generic adapter: what it finds in families that are laid out in odd ways, and that looking changes nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

import mimic_core as mc
from mimic_core.adapters import GenericAdapter
from tests.support.snapshot import snapshot
from tests.zoo.tiny import tiny

ALL = mc.types.SITES
OUTSIDE = ("attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden")
ATTENTION = ("query", "key", "value", "lse", "attn_heads")


def spec_of(model: nn.Module) -> mc.ModelSpec:
    adapter = mc.adapter_for(model)
    assert type(adapter) is GenericAdapter
    return adapter.spec(model)


def sites_of(model_type: str) -> list[tuple[str, ...]]:
    return [layer.sites for layer in spec_of(tiny(model_type).model).layers]


def path_of(model: nn.Module, layer: int, site: Any) -> str:
    wanted = mc.adapter_for(model).module(model, layer, site)
    return next(name for name, module in model.named_modules() if module is wanted)


# --- what is found


@pytest.mark.parametrize(
    ("model_type", "attention", "mlp", "last"),
    [
        ("opt", "model.decoder.layers.0.self_attn", "model.decoder.layers.0.fc2", ""),
        ("gpt2", "transformer.h.0.attn", "transformer.h.0.mlp", ".c_proj"),  # dropout comes after it
        ("gpt_neox", "gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp", ".dense_4h_to_h"),
        ("llama4", "language_model.model.layers.0.self_attn", "language_model.model.layers.0.feed_forward", None),
        ("mixtral", "model.layers.0.self_attn", "model.layers.0.mlp", None),
        ("kosmos-2", "text_model.model.layers.0.self_attn", "text_model.model.layers.0.ffn", ".fc2"),
        ("bert", "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense", ""),
        ("blt", "model.global_transformer.layers.0.self_attn", "model.global_transformer.layers.0.mlp", ".down_proj"),
    ],
)
def test_where_outputs_are(model_type: str, attention: str, mlp: str, last: str | None) -> None:
    model = tiny(model_type, task="causal-lm" if model_type != "llama4" and model_type != "kosmos-2" else None).model
    assert path_of(model, 0, "attn_out") == attention
    assert path_of(model, 0, "mlp_out") == mlp
    if last is None:
        with pytest.raises(mc.UnsupportedModelError, match="no linear layer was seen to give the output of "):
            mc.hook(model, "mlp_hidden", lambda value, at: None, layers=[0])
    else:
        assert path_of(model, 0, "mlp_hidden") == f"{mlp}{last}"


def test_hidden_values_are_those_of_the_linear_layer_that_gives_the_output_untouched() -> None:
    """A wrapper such as LoRA's gets the same values, also while it is off. An output written to is another one."""
    model = tiny("gemma2").model
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    with adapted.disable_adapter():
        spec_of(adapted)
    assert path_of(adapted.get_base_model(), 0, "mlp_hidden") == "model.layers.0.mlp.down_proj"
    assert spec_of(adapted).layers[0].mlp_width == model.config.intermediate_size

    class InPlace(type(model.model.layers[1].mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mul_(1)

    other = tiny("gemma2").model
    mlp = InPlace(other.config).eval()
    other.model.layers[1].mlp = mlp
    assert ["mlp_hidden" in layer.sites for layer in spec_of(other).layers[:2]] == [True, False]


def test_hybrid_layers_say_why_they_have_no_attention() -> None:
    layers = spec_of(tiny("qwen3_next").model).layers
    linear = [layer for layer in layers if "query" not in layer.sites]
    assert linear
    assert len(linear) < len(layers)
    for layer in linear:
        assert set(layer.sites) >= {"mlp_out", "layer_out"}
        assert layer.missing.split("; ")[0] == "no softmax attention (Qwen3NextGatedDeltaNet)"
        assert (layer.heads, layer.head_dim) == (0, 0)
    model = tiny("qwen3_next").model
    with pytest.raises(
        mc.UnsupportedModelError, match=r"has .*mlp_hidden: no softmax attention \(Qwen3NextGatedDeltaNet\)"
    ):
        mc.hook(model, "query", lambda value, at: None, layers=[linear[0].index])


def test_cross_attention_layers_have_no_site() -> None:
    layers = spec_of(tiny("mllama").model).layers
    lacking = [layer for layer in layers if not layer.sites]
    assert [layer.missing for layer in lacking] == ["MllamaCrossAttentionDecoderLayer does not run on text alone"]


def test_attention_off_the_interface_is_followed() -> None:
    for model_type in ("falcon", "mpt", "bloom", "gpt_neo"):
        assert {layer.sites for layer in spec_of(tiny(model_type).model).layers} == {ALL}


def test_attention_that_cannot_be_followed_leaves_the_outputs() -> None:
    for model_type in ("reformer", "rwkv"):
        model = tiny(model_type).model
        for layer in spec_of(model).layers:
            assert set(layer.sites) <= set(OUTSIDE)
            assert {"mlp_out", "layer_out"} <= set(layer.sites)
            assert "Attention does not go through transformers' attention interface, and it can't be" in layer.missing
        with pytest.raises(mc.UnsupportedModelError, match="followed: no softmax of a product of two tensors was seen"):
            mc.build_shifts(model, "mimic", layers=(0,))
        assert mc.build_shifts(model, "live").layers == tuple(range(len(spec_of(model).layers)))


def test_sizes_are_those_of_the_tensors() -> None:
    layers = spec_of(tiny("deepseek_v3").model).layers
    config: Any = tiny("deepseek_v3").model.config
    assert {layer.head_dim for layer in layers} == {config.qk_nope_head_dim + config.qk_rope_head_dim}
    assert {layer.value_dim for layer in layers} == {config.v_head_dim}
    assert config.v_head_dim != config.qk_nope_head_dim + config.qk_rope_head_dim
    if "gemma4" in CONFIG_MAPPING:
        widths = {(layer.head_dim, layer.kv_heads) for layer in spec_of(tiny("gemma4").model).layers}
        assert len(widths) > 1, "full and sliding layers differ"


def test_a_layer_with_two_attention_modules_is_two() -> None:
    model = tiny("longcat_flash").model
    spec = spec_of(model)
    assert len(spec.layers) == 2 * len(model.model.layers)
    assert [set(ALL) - set(layer.sites) for layer in spec.layers[:2]] == [{"layer_out"}, {"layer_in"}]
    assert path_of(model, 1, "query") == "model.layers.0.self_attn.1"
    assert path_of(model, 1, "mlp_out") == "model.layers.0.mlps.1"


def test_a_module_of_several_layers_is_edited_in_the_layer_asked_for() -> None:
    """Blocks that several layers run: here the attention and MLP of layers 1 and 3."""
    case = tiny("gemma3_text")
    model, inputs = case.model, case.inputs()
    layers = model.model.layers
    layers[3].self_attn, layers[3].mlp = layers[1].self_attn, layers[1].mlp
    spec = spec_of(model)
    assert [set(layer.sites) for layer in spec.layers] == [set(ALL)] * len(layers)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def read(into: dict[int, Tensor]) -> None:
        with torch.no_grad(), mc.capture(model, ["layer_out", "query", "mlp_out"]) as seen:
            model(**inputs, use_cache=False)
        assert seen["query"].keys() == seen["mlp_out"].keys() == seen["layer_out"].keys()
        into.update(seen["layer_out"])

    read(before)
    for site in ("attn_heads", "mlp_out", "mlp_hidden"):
        for edited in (1, 3):
            ran = []

            def double(value: Tensor, at: mc.At, ran: list[int] = ran) -> Tensor:
                ran.append(at.layer)
                return 2 * value

            with mc.hook(model, site, double, layers=[edited]):
                read(after)
            assert ran == [edited]
            assert [torch.equal(before[n], after[n]) for n in before] == [n < edited for n in before]


def test_a_shared_module_under_gradient_checkpointing_is_refused() -> None:
    """Newer transformers run a layer again without its hooks, older ones with them."""
    case = tiny("gemma3_text")
    model, inputs = case.model.train(), case.inputs()
    layers = model.model.layers
    layers[3].self_attn = layers[1].self_attn
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()

    def gradient(checkpointing: bool) -> Tensor:
        torch.manual_seed(3)
        shifts = mc.build_shifts(model, "mimic", layers=(1,))
        (model.train if checkpointing else model.eval)()
        with mc.patch(model, shifts):
            model(**inputs, use_cache=False).logits.square().mean().backward()
        return shifts[1].vector.grad

    wanted = gradient(False)
    refused = ""
    try:
        torch.testing.assert_close(gradient(True), wanted)
    except mc.PatchStateError as error:
        refused = str(error)
    assert not refused or "a module that several layers share runs outside a forward of the model" in refused


def test_flattened_tokens_are_hidden_states_again() -> None:
    """OPT hands its last matrix all tokens of a batch in one row."""
    case = tiny("opt")
    model, inputs = case.model, case.inputs(padding="left")
    with mc.capture(model, "mlp_out") as seen:
        model(**inputs)
    with mc.capture(model, "mlp_out", where=inputs["attention_mask"].bool()) as chosen:
        model(**inputs)
    for layer, states in seen.states.items():
        assert states.shape == (*inputs["input_ids"].shape, 32)
        assert torch.equal(states[inputs["attention_mask"].bool()], chosen.states[layer])


def test_a_models_tuple_type_stays() -> None:
    case = tiny("reformer")
    with mc.patch(case.model, mc.build_shifts(case.model, "live", site="attn_out")):
        case.model(**case.inputs())


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_beyond_its_top_k(model_type: str) -> None:
    """Such forwards read the model's attention implementation for themselves: it has to stay what it was."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    case = tiny(model_type)
    model, inputs = case.model, case.inputs(length=24)
    indexers = [m for m in model.modules() if hasattr(m, "index_topk")]
    assert indexers
    logits = {}
    for top_k in (24, 2):
        for indexer in indexers:
            indexer.index_topk = top_k
        with torch.no_grad():
            logits[top_k] = model(**inputs, use_cache=False).logits
    assert not torch.allclose(logits[2], logits[24], atol=1e-3), "two keys of 24 are a choice"
    for head in ("mimic", "live"):
        shifts = mc.build_shifts(model, head)
        for name, p in shifts.named_parameters():
            if name.endswith("vector"):
                p.data.zero_()
        with torch.no_grad(), mc.patch(model, shifts):
            assert torch.equal(model(**inputs, use_cache=False).logits, logits[2])


def test_paths_without_a_config_are_sized_by_what_is_seen() -> None:
    class Paths(mc.PathAdapter):
        layers, config = "model.layers", "odd"

    model, falcon, bloom = tiny("gemma2").model, tiny("falcon").model, tiny("bloom").model
    rwkv = tiny("rwkv").model
    wanted = spec_of(model)
    for one in (model, falcon, bloom, rwkv):
        one.config.odd = SimpleNamespace()  # names neither a hidden size nor heads
    mc.register_adapter("gemma2")(Paths)
    assert mc.adapter_for(model).spec(model) == wanted
    paths = {"layers": "transformer.h", "attention": "self_attention", "down": "dense_4h_to_h"}
    for one in (falcon, bloom):
        own = spec_of(one)
        mc.register_adapter(one.config.model_type)(type("Own", (Paths,), paths))
        assert mc.adapter_for(one).spec(one) == own
        report = mc.testing.check_adapter(one)
        report.raise_for_failures()
        assert report["MimIC"].verdict == "passed"
    paths = {"layers": "rwkv.blocks", "attention": "attention", "mlp": "feed_forward", "down": "value"}
    mc.register_adapter("rwkv")(type("Own", (Paths,), paths))
    with pytest.raises(mc.UnsupportedModelError, match=r"blocks\.0\.attention does not go .*: leave them out of its"):
        mc.adapter_for(rwkv)


# --- looking changes nothing


@pytest.mark.parametrize("model_type", ["gemma3_text", "opt", "qwen3_next", "mllama"])
def test_looking_leaves_the_model_as_it_was(model_type: str) -> None:
    case = tiny(model_type)
    model = case.model
    model.train()
    some = next(m for m in model.modules() if isinstance(m, nn.Linear))
    some.eval()
    modes = [m.training for m in model.modules()]
    case.model(**case.inputs())  # transformers sets attributes in a first forward
    state, random = snapshot(model), torch.random.get_rng_state()
    spec_of(model)
    assert snapshot(model) == state
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_forward_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma3_text").model
    state = snapshot(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    state = snapshot(model)
    with pytest.raises(mc.UnsupportedModelError, match=r"RuntimeError: no such thing"):
        mc.adapter_for(model)
    assert snapshot(model) == state


def test_the_model_is_looked_at_once_and_again_when_it_has_changed() -> None:
    model = tiny("gemma3_text").model
    runs = []
    model.model.register_forward_hook(lambda *args: runs.append(1))
    first = spec_of(model)
    assert spec_of(model) == first
    assert len(runs) == 1
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert spec_of(model) == first
    assert len(runs) == 2
    assert path_of(model, 1, "mlp_out") == "model.layers.1.mlp"
    twin = copy.deepcopy(model)
    assert spec_of(twin) == first
    assert len(runs) == 3


def test_a_patched_model_can_be_looked_at() -> None:
    model = tiny("gemma3_text").model
    with mc.patch(model, mc.build_shifts(model, "mimic")):
        spec = spec_of(model)
        model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
        assert spec_of(model) == spec


# --- describe


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    mc.describe(tiny("gemma2").model)
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head == "Gemma2ForCausalLM (gemma2), by GenericAdapter"
    assert columns.split()[:3] == ["layer", "path", "hidden"]
    assert any("softcap 50, window " in row for row in rows)
    mc.describe(tiny("rwkv").model)
    assert "rwkv.blocks.0: RwkvSelfAttention does not go through transformers'" in capsys.readouterr().out
    mc.describe(tiny("idefics").model)
    out = capsys.readouterr().out
    assert "by IdeficsAdapter" in out
    assert "what is in the logits is not known: IdeficsForVisionText2Text does not run on 4 tokens of text" in out
