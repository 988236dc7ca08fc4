"""Where the sites of each family are, by hand; bare models and wrappers; adapters of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, LlamaConfig, LlamaForSequenceClassification

import mimic_core as mc
from mimic_core import adapters
from mimic_core.edits.interface import SLOT
from mimic_core.edits.outputs import below_edits
from tests.support.cases import (
    BY_NAME,
    CASES,
    TEXT,
    Case,
    fresh_model,
    logits_of,
    model_of,
    over_cases,
    over_heads,
    random_shifts,
    zero_vectors,
)
from tests.support.snapshot import snapshot

LLAMA = BY_NAME["llama"]
ATTENTION_SITES = ("query", "key", "value", "lse", "attn_heads")
ALL_SITES = (*ATTENTION_SITES, "attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden")

# layers, their path, attention heads, key/value heads, head_dim, value_dim; by hand, from the configs of the cases.
SIZES: dict[str, tuple[int, str, int, int, int, int]] = {
    "idefics": (4, "model.layers", 4, 4, 8, 8),
    "idefics2": (3, "model.text_model.layers", 4, 2, 8, 8),
    "llava": (3, "model.language_model.layers", 4, 2, 8, 8),
    "llama": (3, "model.layers", 4, 2, 24, 24),
    "mistral": (3, "model.layers", 4, 2, 8, 8),
    "qwen2": (3, "model.layers", 4, 4, 8, 8),
}
HIDDEN, MLP_WIDTH = 32, 48


def spec_by_hand(name: str, cut: str = "") -> mc.ModelSpec:
    count, path, heads, kv_heads, head_dim, value_dim = SIZES[name]
    path = path.removeprefix(cut)
    layers = [
        mc.LayerSpec(i, f"{path}.{i}", HIDDEN, heads, kv_heads, head_dim, value_dim, ALL_SITES, "", MLP_WIDTH)
        for i in range(count)
    ]
    return mc.ModelSpec(name, HIDDEN, tuple(layers))


def bare_of(model: nn.Module) -> nn.Module:
    bare = model.base_model
    assert isinstance(bare, nn.Module)
    assert bare is not model
    return bare


def hidden_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).last_hidden_state


@over_cases
def test_spec(case: Case) -> None:
    model = model_of(case)
    adapter = mc.adapter_for(model)
    assert adapter.spec(model) == spec_by_hand(case.name)
    path = SIZES[case.name][1]
    assert adapter.decoder(model) is model.get_submodule(path.removesuffix(".layers"))
    for index in range(SIZES[case.name][0]):
        layer = model.get_submodule(f"{path}.{index}")
        wanted = dict.fromkeys((*ATTENTION_SITES, "attn_out"), layer.self_attn)
        wanted |= {"mlp_out": layer.mlp, "mlp_hidden": layer.mlp.down_proj, "layer_in": layer, "layer_out": layer}
        assert {site: adapter.module(model, index, site) for site in ALL_SITES} == wanted


def test_every_adapter_has_a_case() -> None:
    by_the_kit = {"blt", "pi0"}  # in test_matrix.py, as far as the laws go for them
    assert set(adapters.base.ADAPTERS) - by_the_kit == {case.name for case in CASES} == set(SIZES)


def assert_patchable(model: nn.Module, inputs: dict[str, Tensor], head: str, read: Any = hidden_of) -> None:
    plain = read(model, inputs)
    state = snapshot(model)  # after a forward: transformers puts some hooks of its own in during the first
    shifts = random_shifts(model, head)
    with mc.patch(model, shifts):
        assert not torch.allclose(read(model, inputs), plain, atol=1e-3)
        zero_vectors(shifts)
        assert torch.equal(read(model, inputs), plain)
    assert torch.equal(read(model, inputs), plain)
    assert snapshot(model) == state


@pytest.mark.parametrize("head", ["mimic", "live", "mimic-and-mlp"])
@over_cases
def test_a_bare_model_can_be_patched(case: Case, head: str) -> None:
    bare = bare_of(model_of(case))
    assert mc.adapter_for(bare).spec(bare) == spec_by_hand(case.name, cut="model.")
    assert_patchable(bare, case.inputs(), head)


@over_cases
def test_a_model_made_bare_can_be_patched(case: Case) -> None:
    bare = AutoModel.from_config(model_of(case).config).eval().requires_grad_(False)
    assert type(bare) is type(bare_of(model_of(case)))
    assert mc.adapter_for(bare).spec(bare) == spec_by_hand(case.name, cut="model.")
    assert_patchable(bare, case.inputs(), "mimic")


@pytest.mark.parametrize(
    ("name", "inner", "kind"),
    [("idefics2", "model.text_model", "mistral"), ("llava", "model.language_model", "qwen2")],
)
def test_the_text_decoder_inside_can_be_patched_alone(name: str, inner: str, kind: str) -> None:
    """It is a model with a type of its own; patched, it shifts the model around it as patching that would."""
    case = BY_NAME[name]
    model, inputs = model_of(case), case.inputs()
    decoder = model.get_submodule(inner)
    found, wanted = mc.adapter_for(decoder).spec(decoder), spec_by_hand(name, cut=f"{inner}.")
    assert found == replace(wanted, model_type=kind)
    shifts = random_shifts(model, "mimic-and-mlp")
    with mc.patch(model, shifts):
        outside = logits_of(model, inputs)
    for part in (bare_of(model), decoder):
        with mc.patch(part, shifts):
            assert torch.equal(logits_of(model, inputs), outside)


def test_another_head_on_the_same_decoder() -> None:
    torch.manual_seed(11)
    model = LlamaForSequenceClassification(LlamaConfig(**TEXT, head_dim=24)).eval().requires_grad_(False)
    assert mc.adapter_for(model).spec(model) == spec_by_hand("llama")
    assert_patchable(model, LLAMA.sample(0), "mimic", logits_of)


@over_heads
def test_gated_cross_attention_of_idefics_is_no_site(head: str) -> None:
    model = model_of(BY_NAME["idefics"])
    crossing = {name for name, m in model.named_modules() if getattr(m, "is_cross_attention", False)}
    assert crossing == {"model.gated_cross_attn_layers.0.cross_attn", "model.gated_cross_attn_layers.1.cross_attn"}

    def marked() -> set[str]:
        edited = {name for name, m in model.named_modules() if below_edits(m) is None}
        return edited | {name for name, m in model.named_modules() if SLOT in m.__dict__ or m._forward_hooks}

    assert marked() == set()
    with mc.patch(model, random_shifts(model, head)), mc.capture(model, ALL_SITES):
        found = marked()
    inside = {f"model.layers.{i}{part}" for i in range(4) for part in ("", ".self_attn", ".mlp", ".mlp.down_proj")}
    assert found == inside | {"", "model"}


class Wrapped(nn.Module):
    """Not one of the wrappers that are looked through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not built in")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@over_cases
def test_wrappers_are_looked_through(case: Case, process_group: None) -> None:
    model = fresh_model(case).requires_grad_(True)
    compiled = torch.compile(model, backend="eager")
    parallel = DistributedDataParallel(model)
    both = torch.compile(parallel, backend="eager")
    for wrapped in (compiled, parallel, both):
        assert isinstance(wrapped, nn.Module)
        assert adapters.unwrap(wrapped) is model
        assert mc.adapter_for(wrapped).spec(wrapped) == spec_by_hand(case.name)
        assert mc.build_shifts(wrapped, "mimic").spec == spec_by_hand(case.name)
        handle = mc.patch(wrapped, random_shifts(model, "mimic"))
        assert sum(SLOT in m.__dict__ for m in model.modules()) == SIZES[case.name][0]
        handle.remove()
    with pytest.raises(mc.UnsupportedModelError, match="Wrapped does not run on 4 tokens of text alone"):
        mc.adapter_for(Wrapped(model))
    with pytest.raises(mc.UnsupportedModelError, match="a DataParallel is a wrapper that is not looked into"):
        mc.adapter_for(nn.DataParallel(model))


def model_of_type(model_type: str, case: Case = LLAMA) -> nn.Module:
    model = fresh_model(case)
    model.config.model_type = model_type  # pyright: ignore[reportAttributeAccessIssue]
    return model


class Renamed(mc.PathAdapter):
    layers = "model.layers"


def test_a_model_without_adapter_is_told_what_to_write(monkeypatch: Any) -> None:
    model = model_of_type("tiny_vlm")
    monkeypatch.setattr(model.model.layers[0], "forward", lambda states, *rest, **more: states.no_such_thing)
    state = snapshot(model)
    asks = [
        lambda: mc.adapter_for(model),
        lambda: mc.build_shifts(model, "mimic"),
        lambda: mc.patch(model, random_shifts(model_of(LLAMA), "mimic")),
        lambda: mc.capture(model, "mlp_out"),
        lambda: mc.hook(model, "mlp_out", lambda value, at: value),
    ]
    for ask in asks:
        with pytest.raises(mc.UnsupportedModelError) as caught:
            ask()
        message = str(caught.value)
        assert (
            "no adapter is registered for model type 'tiny_vlm', class transformers.models.llama.modeling_llama.Llama"
            "ForCausalLM, and its sites can't be" in message
        )
        assert "LlamaForCausalLM does not run on 4 tokens of text alone (LlamaModel: AttributeError: " in message
        assert "@mimic_core.register_adapter('tiny_vlm') on a PathAdapter subclass with the paths of" in message
    assert snapshot(model) == state


@pytest.mark.parametrize("head", ["mimic", "live", "mimic-and-mlp"])
def test_an_adapter_of_ones_own(head: str, tmp_path: Path) -> None:
    assert mc.register_adapter("tiny_vlm", "tiny_vlm_moe")(Renamed) is Renamed
    registered = adapters.base.ADAPTERS
    assert registered.get("tiny_vlm") is registered.get("tiny_vlm_moe") is Renamed
    model = model_of_type("tiny_vlm")
    assert isinstance(mc.adapter_for(model), Renamed)
    assert mc.adapter_for(model).spec(model) == replace(spec_by_hand("llama"), model_type="tiny_vlm")
    assert_patchable(model, LLAMA.inputs(), head, logits_of)
    bare = bare_of(model)
    assert mc.adapter_for(bare).spec(bare).layers == spec_by_hand("llama", cut="model.").layers
    mc.save_shifts(random_shifts(model, head), tmp_path)
    assert mc.load_shifts(tmp_path, model).spec.model_type == "tiny_vlm"


def test_an_adapter_may_name_fewer_sites() -> None:
    """For a family whose attention doesn't go through the interface."""
    mc.register_adapter("tiny_vlm")(type("Outside", (Renamed,), {"sites": ("mlp_out", "layer_out")}))
    model = model_of_type("tiny_vlm")
    assert {layer.sites for layer in mc.adapter_for(model).spec(model).layers} == {("mlp_out", "layer_out")}
    assert_patchable(model, LLAMA.inputs(), "live", logits_of)
    lacks = r"which layer 0 \(model\.layers\.0\) doesn't have; it has mlp_out, layer_out"
    with pytest.raises(mc.UnsupportedModelError, match=f"MimICHead edits attn_heads, {lacks}"):
        mc.build_shifts(model, "mimic")
    with pytest.raises(mc.UnsupportedModelError, match=f"LIVEHead edits attn_out, {lacks}"):
        mc.build_shifts(model, "live", site="attn_out")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            {"layers": "model.blocks"},
            r"a module at 'model\.blocks' of LlamaForCausalLM, .* children are model, lm_head$",
        ),
        (
            {"layers": "decoder.layers"},
            r"a module at 'decoder\.layers' of LlamaForCausalLM, .* children are model, lm_head$",
        ),
        (
            {"attention": "attn"},
            r"a module at 'attn' of LlamaDecoderLayer, .* children are self_attn, mlp, input_layernorm, post_",
        ),
        ({"mlp": "feed_forward"}, r"a module at 'feed_forward' of LlamaDecoderLayer, .* children are self_attn, mlp, "),
        (
            {"layers": "model.norm"},
            r"a non-empty ModuleList or Sequential at 'model\.norm' of LlamaForCausalLM, found LlamaRMSNorm$",
        ),
        (
            {"layers": "model"},
            r"a non-empty ModuleList or Sequential at 'model' of LlamaForCausalLM, found LlamaModel$",
        ),
    ],
)
def test_wrong_paths_are_named(paths: dict[str, str], message: str) -> None:
    mc.register_adapter("tiny_vlm")(type("Wrong", (Renamed,), paths))
    model = model_of_type("tiny_vlm")
    with pytest.raises(mc.UnsupportedModelError, match=f"^Wrong expects {message}"):
        mc.adapter_for(model)
    with pytest.raises(mc.UnsupportedModelError, match=message):
        mc.build_shifts(model, "mimic")


def test_no_layers_at_all() -> None:
    model = fresh_model(LLAMA)
    model.get_submodule("model").layers = nn.ModuleList()
    with pytest.raises(
        mc.UnsupportedModelError, match=r"LlamaAdapter expects a non-empty ModuleList or Sequential at 'model\.layers'"
    ):
        mc.adapter_for(model)


def test_cross_attention_is_refused() -> None:
    paths = {"layers": "model.gated_cross_attn_layers", "attention": "cross_attn"}
    mc.register_adapter("crossed")(type("Crossed", (mc.PathAdapter,), paths))
    model = model_of_type("crossed", BY_NAME["idefics"])
    message = (
        r"model\.gated_cross_attn_layers\.0\.cross_attn is cross-attention, but shifts are only for self-attention"
    )
    with pytest.raises(mc.UnsupportedModelError, match=message):
        mc.adapter_for(model)


def test_a_taken_model_type_is_refused() -> None:
    before = dict(adapters.base.ADAPTERS._items)
    with pytest.raises(ValueError, match=r"adapter 'llama' is already registered as .*LlamaAdapter"):
        mc.register_adapter("tiny_vlm", "llama")(Renamed)
    with pytest.raises(ValueError, match="needs at least one name"):
        mc.register_adapter()
    assert adapters.base.ADAPTERS._items == before


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (nn.Linear(2, 2), r"Linear does not run on 4 tokens of text alone \(Linear: RuntimeError"),
        (nn.Sequential(), "Sequential has no list of layers that run"),
        (None, "a torch.nn.Module is needed, found NoneType$"),
        ("llama", "a torch.nn.Module is needed, found str$"),
    ],
)
def test_what_is_no_model_is_refused(thing: Any, message: str, no_shape_checks: None) -> None:
    for ask in (
        lambda: mc.adapter_for(thing),
        lambda: mc.build_shifts(thing, "mimic"),
        lambda: mc.capture(thing, "mlp_out"),
        lambda: mc.patch(thing, random_shifts(model_of(LLAMA), "live")),
    ):
        with pytest.raises(mc.UnsupportedModelError, match=message):
            ask()


class ByMethods:
    """No PathAdapter: the protocol's three methods are enough."""

    def spec(self, model: nn.Module) -> mc.ModelSpec:
        return replace(spec_by_hand("llama"), model_type="tiny_vlm")

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("model")

    def module(self, model: nn.Module, layer: int, site: str) -> nn.Module:
        inside = {"mlp_out": ".mlp", "layer_out": ""}.get(site, ".self_attn")
        return model.get_submodule(f"model.layers.{layer}{inside}")


@pytest.mark.parametrize("head", ["mimic", "live-layer-out", "live-attn-out", "mimic-and-mlp"])
def test_an_adapter_that_only_has_the_methods(head: str) -> None:
    mc.register_adapter("tiny_vlm")(ByMethods)
    model, llama = model_of_type("tiny_vlm"), fresh_model(LLAMA)
    assert isinstance(mc.adapter_for(model), ByMethods)
    assert isinstance(mc.adapter_for(model), mc.AttentionAdapter)
    with mc.patch(llama, random_shifts(llama, head)):
        wanted = logits_of(llama, LLAMA.inputs())
    with mc.patch(model, random_shifts(model, head)):
        assert torch.equal(logits_of(model, LLAMA.inputs()), wanted)
    assert_patchable(model, LLAMA.inputs(), head, logits_of)
