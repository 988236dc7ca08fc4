"""Weights or a cache that are held in another form: quantised, or sharded. The packages for it need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc
from tests.support.cases import BY_NAME, TEXT, Case, fresh_model, logits_of, model_of, random_shifts

WIDE = Case("llama", lambda: LlamaForCausalLM(LlamaConfig(**TEXT | {"hidden_size": 64, "intermediate_size": 96})))
INPUTS = WIDE.inputs("left")


def sharded(model: Any) -> None:
    """torch 2.6 does not do this on a CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)


def torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def bitsandbytes(model: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            weight = getattr(parent, name).weight.detach()
            held = bnb.nn.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
            held.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
            setattr(parent, name, held.to("cpu"))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def scaled(value: Tensor, at: mc.At | None = None) -> Tensor:
    return value * 1.5 + 0.3


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("change", [pytest.param(sharded, marks=pytest.mark.newest), torchao, bitsandbytes])
def test_weights_that_are_changed_before_or_after_the_patch(change: Callable[[Any], None]) -> None:
    def run(*does: Callable[[Any], Any]) -> tuple[Tensor, ...]:
        model = fresh_model(WIDE)
        shifts = random_shifts(model, "mimic")
        todo: dict[Any, Any] = {"patch": lambda m: mc.patch(m, shifts)}
        for do in does:
            todo.get(do, do)(model)
        with mc.capture(model, "layer_out") as seen:
            logits = logits_of(model, INPUTS)
        logits.float().square().mean().backward() if "patch" in does else None
        return logits, *seen.states.values(), *(p.grad for p in shifts.parameters() if p.grad is not None)

    def torch_hooked(model: Any) -> None:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: scaled(output))

    hooked = lambda model: mc.hook(model, "layer_out", scaled)  # noqa: E731
    plain, by_torch, after, before = (run(change), run(change, torch_hooked), run(change, hooked), run(hooked, change))
    assert not torch.equal(plain[0], after[0])
    assert torch.equal(by_torch[0], after[0])
    both = [run(change, "patch"), run("patch", change)]
    assert len(both[0]) == 1 + 3 + 9, "logits, captured outputs, gradients"
    assert not torch.equal(plain[0], both[0][0])
    for one, other in ((after, before), both):
        assert all(map(torch.equal, one, other))


@contextmanager
def by_torch(model: Any, chosen: Tensor) -> Iterator[None]:
    """An edit at some tokens of whole rows [b s], as the forwards of `generate` come to them."""
    start = [0]

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        start.append(start[-1] + tokens.shape[1])

    def edit(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.where(chosen[:, start[-2] : start[-1], None], scaled(output), output)

    hooks = [model.model.register_forward_pre_hook(begins, with_kwargs=True)]
    hooks += [layer.mlp.register_forward_hook(edit) for layer in model.model.layers]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("package", "backend", "axis"), [("optimum.quanto", "quanto", 0), ("hqq", "hqq", 1)])
def test_positions_with_a_quantised_cache(package: str, backend: str, axis: int) -> None:
    pytest.importorskip(package)
    model = model_of(BY_NAME["llama"])
    inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    config = {"backend": backend, "nbits": 4, "q_group_size": 16, "residual_length": 4}
    config |= {"axis_key": axis, "axis_value": axis}

    def logits(config: dict[str, Any] | None = config) -> Tensor:
        options = {} if config is None else {"cache_implementation": "quantized", "cache_config": config}
        options |= {"max_new_tokens": 6, "suppress_tokens": [0, 2], "do_sample": False}
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits)

    assert not torch.equal(logits(), logits(None))
    real = inputs["attention_mask"].bool()
    ends = torch.zeros_like(real).index_fill(1, torch.tensor([real.shape[1] - 1]), True)
    for positions, rows, new in (
        ("prompt", real, False),
        ("prompt_end", ends, False),
        ("generated", torch.zeros_like(real), True),
    ):
        chosen = torch.cat([rows, torch.full((len(rows), 6), new)], dim=1)
        with by_torch(model, chosen):
            wanted = logits()
        with mc.hook(model, "mlp_out", scaled, positions=positions):
            assert torch.equal(logits(), wanted), positions
        assert not torch.equal(wanted, logits())
