"""A tensor-parallel model of transformers gives the numbers of one process, or says why it can't."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import mimic_core as mc
from mimic_core.types import SITES, LayerSpec
from tests.support.processes import outcomes

# Four key/value heads: also four processes can share them.
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.3}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IDS = torch.arange(5, 23).view(3, 6)
HEADS: list[tuple[str, dict[str, Any]]] = [
    ("mimic", {"mlp_vector": True}),
    ("mimic", {"gate": False}),
    ("mimic", {"log_z2": "all_keys", "positions": "prompt_end"}),
    ("live", {}),
    ("live", {"site": "attn_out"}),
    ("function_vector", {"positions": "all"}),
    ("virtual_kv", {"rank": 2, "learn_weight": True}),
    ("hyper_icl", {}),
    ("mtv", {"positions": "all"}),
]


@dataclass
class Subject:
    """Models of one process and of all processes, with the same weights. Llama has a named adapter, Qwen3-MoE none."""

    folder: Path
    rank: int
    whole: nn.Module
    split: nn.Module
    whole_moe: nn.Module
    split_moe: nn.Module


def begin(folder: Path) -> tuple[Subject]:
    logging.disable_progress_bar()
    auto = {"tp_plan": "auto"}
    models = (load(folder, name, **kw) for name in ("llama", "moe") for kw in ({}, auto))
    return (Subject(folder, dist.get_rank(), *models),)


def load(folder: Path, name: str, **options: Any) -> nn.Module:
    kind = LlamaForCausalLM if name == "llama" else Qwen3MoeForCausalLM
    return kind.from_pretrained(folder / name, **options).eval().requires_grad_(False)


def random_stack(model: nn.Module, head: str, seed: int = 0, **options: Any) -> mc.ShiftStack:
    """With the same numbers for a model of one process and of several."""
    stack = mc.build_shifts(model, head, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in stack.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) / 2)
    return stack


def learned(
    model: nn.Module, shifts: mc.ShiftStack | mc.StackSet, names: list[str | None] | None = None
) -> list[Tensor]:
    """The logits, and the gradient of each parameter."""
    shifts.zero_grad()
    with mc.patch(model, shifts) as handle, ExitStack() as using:
        if names is not None:
            using.enter_context(handle.using(names, strength=[1.0, 1.0, 0.5]))
        logits = model(IDS).logits
        logits.log_softmax(-1)[..., 7].sum().backward()
    return [logits.detach(), *(x.grad for x in shifts.parameters())]


def assert_close(found: Iterable[Tensor], wanted: Iterable[Tensor], same: bool = True) -> None:
    """Equal up to rounding; if `same`, also bit for bit the same in every process."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * max(1.0, other.abs().max().item()))
        first = one.detach().clone()
        dist.broadcast(first, 0)
        assert not same or torch.equal(first, one)


@contextmanager
def refused(error: type[Exception], message: str) -> Iterator[None]:
    with pytest.raises(error, match=message):
        yield


def heads(s: Subject) -> None:
    for head, options in HEADS:
        assert_close(
            learned(s.split, random_stack(s.split, head, **options)),
            learned(s.whole, random_stack(s.whole, head, **options)),
        )


def found_by_the_generic_adapter(s: Subject) -> None:
    assert_close(
        learned(s.split_moe, random_stack(s.split_moe, "mimic")),
        learned(s.whole_moe, random_stack(s.whole_moe, "mimic")),
    )
    assert_close(
        learned(s.split_moe, random_stack(s.split_moe, "live")), learned(s.whole_moe, random_stack(s.whole_moe, "live"))
    )


def experts_of_each_process(s: Subject) -> None:
    from transformers.distributed.configuration_utils import DistributedConfig

    size = dist.get_world_size()
    split = load(s.folder, "moe", distributed_config=DistributedConfig(tp_size=size, ep_size=size))
    assert_close(learned(split, random_stack(split, "live")), learned(s.whole_moe, random_stack(s.whole_moe, "live")))


def eager_and_checkpointing(s: Subject) -> None:
    models = [load(s.folder, "llama", attn_implementation="eager", **kw) for kw in ({}, {"tp_plan": "auto"})]
    for model in models:
        model.gradient_checkpointing_enable()
        model.train()
    whole, split = (learned(model, random_stack(model, "mimic")) for model in models)
    assert_close(split, whole)


class Scaled(mc.ShiftHead):
    """A number that all attention heads share, one for each of them, and the same number at the layer's output."""

    name, site, per_head = "scaled", "query", ("each",)

    def __init__(self, config: mc.HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.each, self.all = nn.Parameter(torch.ones(layer.heads)), nn.Parameter(torch.ones(()))

    def forward(self, value: Tensor, at: mc.At) -> Tensor:
        return value * self.each[:, None, None] * self.own("all") * self.layer.heads / at.query.shape[1]

    def edits(self) -> dict[Any, Any]:
        return {"query": self, "layer_out": lambda value, at: value * self.own("all")}


def gradients_shared_by_heads(s: Subject) -> None:
    """Of a parameter, and of the strength."""
    found = []
    for model in (s.whole, s.split):
        spec = mc.build_shifts(model).spec
        stacks = [mc.ShiftStack(Scaled, mc.HeadConfig(), spec), random_stack(model, "mimic", mlp_vector=True)]
        strength = torch.tensor(0.7, requires_grad=True)
        with mc.patch(model, stacks[0], strength), mc.patch(model, stacks[1], strength):
            model(IDS).logits.log_softmax(-1)[..., 7].sum().backward()
        found.append([strength.grad, *(x.grad for stack in stacks for x in stack.parameters())])
    assert_close(found[1], found[0])


def sets(s: Subject) -> None:
    found = []
    for model in (s.whole, s.split):
        a, b, c = (random_stack(model, head, seed) for seed, head in enumerate(("mimic", "mimic", "live")))
        stacks = mc.StackSet({"a": a, "b": b, "c": c})
        found.append(learned(model, stacks, ["a", "b", "c"]) + learned(model, mc.StackSet({"a": a}), ["a", None, "a"]))
    assert_close(found[1], found[0])


def generation(s: Subject) -> None:
    tokens = []
    for model in (s.whole, s.split):
        with (
            mc.patch(model, random_stack(model, "mimic")),
            mc.patch(model, random_stack(model, "live", positions="prompt")),
        ):
            tokens.append(model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False))
    assert torch.equal(*tokens)


def files(s: Subject) -> None:
    """A stack of one process runs in several, and the other way round."""
    for a, b in ((s.whole, s.split), (s.split, s.whole)):
        stack = random_stack(a, "mimic")
        path = s.folder / f"stack-{a is s.whole}"
        if s.rank == 0:
            mc.save_shifts(stack, path)
        dist.barrier()
        assert_close(learned(b, mc.load_shifts(path, b, strict=True)), learned(a, stack))


def new_stacks(s: Subject) -> None:
    """They are whole, and the same in all processes, however these are seeded."""
    for model in (s.split, s.split_moe):
        torch.manual_seed(s.rank)
        stack = mc.build_shifts(model)
        assert stack[0].vector.shape == (8, 8)
        first = [stack[1].vector]
        assert_close(first, first)
        assert {(layer.heads, layer.kv_heads) for layer in stack.spec.layers} == {(8, 4)}


def captured(s: Subject) -> None:
    at = torch.ones_like(IDS).bool()
    sites = [site for site in SITES if site != "mlp_hidden"]
    for where in (None, at):
        found = []
        for model in (s.whole, s.split):
            stack = random_stack(model, "mimic", layers=(0,))
            with mc.patch(model, stack), mc.capture(model, sites, where=where) as seen:
                model(IDS)
            values = [seen[site][1] for site in sites]
            sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for x in values).backward()
            found.append([x.detach() for x in values] + [x.grad for x in stack.parameters()])
        assert_close(found[1], found[0])


def refusals(s: Subject) -> None:
    needs_all = random_stack(s.split, "mimic", shared=True)
    with refused(mc.UnsupportedModelError, "shared=True.* its own attention heads"):
        mc.patch(s.split, needs_all)
    with refused(mc.UnsupportedModelError, "shared=True.* its own attention heads"):
        mc.patch(s.split, mc.StackSet({"a": needs_all}))
    with refused(mc.UnsupportedModelError, "own heads at 'query'.* mimic_core.capture"):
        mc.hook(s.split, "query", lambda value, at: None)
    with refused(mc.UnsupportedModelError, "no tp_size"):
        mc.capture(s.split.model, "attn_heads")
    with refused(mc.UnsupportedModelError, "not known which of the MLP's hidden values each of . processes has"):
        mc.hook(s.split, "mlp_hidden", lambda value, at: None, layers=[0])
    different = random_stack(s.split, "mimic", seed=s.rank)
    with refused(mc.PatchStateError, "not the same in the . processes"):
        mc.patch(s.split, different)


def parts_of_sums(s: Subject) -> None:
    """As under a plan that splits tokens, or does not add up."""
    split = load(s.folder, "llama", tp_plan="auto")
    split.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: output + s.rank)
    with refused(mc.UnsupportedModelError, "mlp_out of layer 1 differs between the processes"):
        mc.build_shifts(split, "live")


def other_head_counts(s: Subject) -> None:
    """Attention that can't be counted has no sites. The others stay."""
    split = load(s.folder, "llama", tp_plan="auto")
    split.config.num_key_value_heads = 3
    with refused(mc.UnsupportedModelError, "key/value heads, and the config names 8 and 3"):
        mc.build_shifts(split, "mimic")
    assert_close(learned(split, random_stack(split, "live")), learned(s.whole, random_stack(s.whole, "live")))


CHECKS = {
    check.__name__: check
    for check in (
        heads,
        found_by_the_generic_adapter,
        experts_of_each_process,
        eager_and_checkpointing,
        gradients_shared_by_heads,
        sets,
        generation,
        files,
        new_stacks,
        captured,
        refusals,
        parts_of_sums,
        other_head_counts,
    )
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)).save_pretrained(folder / "moe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # transformers would take a GPU for each process
        return outcomes(request.param, folder, begin, CHECKS)


@pytest.mark.newest
@pytest.mark.parametrize("check", CHECKS)
def test_of_processes(found: dict[str, str], check: str) -> None:
    assert not found[check], found[check]
