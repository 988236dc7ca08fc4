"""Engines that run in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mimic_core as mc
from tests.support.compilable import Logits, in_onnxruntime
from tests.support.training import in_plain_torch, recorded

from .subject import FP32, IDS, alone, differ, engine, learned, logits_of, run, same, subject

# Other embeddings stay in memory, so that all but a layer is there.
ON_DISK = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
ON_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


@engine("deep copy of a patched model")
def deep_copy(head: str) -> None:
    model, shifts = subject(head)
    with mc.patch(model, shifts):
        twin = copy.deepcopy(model)
    (handle,) = mc.handles(twin)
    same(run(twin, handle._installation.key), alone(head))
    assert all(x.grad is None for x in shifts.parameters())


@engine("`StackSet`")
def stack_set(head: str) -> None:
    model, shifts = subject(head)
    stacks = mc.StackSet({"a": shifts, "b": mc.build_shifts(model, "live").double()})
    with mc.patch(model, stacks) as handle:
        with handle.using("a"):
            same(run(model, shifts), alone(head))
        with handle.using(["a", "b", None, "a"]):
            same([logits_of(model)[[0, 3]]], [alone(head)[0][[0, 3]]])


@engine("gradient checkpointing")
def gradient_checkpointing(head: str) -> None:
    model, shifts = subject(head)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    same(learned(model, shifts), alone(head))
    assert len(runs) == 2


@engine("autocast to bf16, within its rounding")
def autocast(head: str) -> None:
    """Logits and gradients are off as those of the unpatched model are, up to 4 and 2 times."""
    model, shifts = subject(head, torch.float32)
    wanted = alone(head, torch.float32)
    plain = unpatched(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = unpatched(model), learned(model, shifts)
    rounding = (rounded[0] - plain[0]).abs().max().item()
    assert 0 < (found[0] - wanted[0]).abs().max().item() <= 4 * rounding
    assert 0 < _apart(found[1:], wanted[1:]) <= 2 * _apart(rounded[1:], plain[1:])


def unpatched(model: Any) -> list[Tensor]:
    """Logits, and the gradient of the embeddings."""
    weight = model.get_input_embeddings().weight.requires_grad_()
    logits = logits_of(model)
    (gradient,) = torch.autograd.grad(logits.square().mean(), [weight])
    weight.requires_grad_(False)
    return [logits.detach(), gradient]


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The length of the difference of all tensors together, as a part of the length of those that are wanted."""
    one, other = (torch.cat([x.flatten() for x in tensors]) for tensors in (found, wanted))
    return ((one - other).norm() / other.norm()).item()


@engine("`torch.compile`, aot_eager")
def compiled(head: str) -> None:
    torch._dynamo.reset()
    model, shifts = subject(head)
    counter = CompileCounterWithBackend("aot_eager")
    same(learned(torch.compile(model, backend=counter), shifts), alone(head))
    assert counter.frame_count == 1


@engine("`torch.export`, logits")
def exported(head: str) -> None:
    model, shifts = subject(head)
    with mc.patch(model, shifts), torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), strict=False)
    same([program.module()(IDS)], alone(head)[:1])


@engine("ONNX, logits")
def onnx(head: str) -> None:
    model, shifts = subject(head, torch.float32)
    wanted = alone(head, torch.float32)[:1]
    with mc.patch(model, shifts), torch.no_grad(), TemporaryDirectory() as folder:
        same([in_onnxruntime(model, IDS, Path(folder))], wanted, FP32)


@engine("continuous batching, tokens")
def continuous_batching(head: str) -> None:
    model, shifts = subject(head, torch.float32)
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(num_blocks=64, block_size=16, max_batch_tokens=64)

    def greedy() -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(8):
                ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
            found.append(ids[0, len(prompt) :].tolist())
        return found

    plain = greedy()
    with mc.patch(model, shifts):
        answers = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching, warmup=False
        )
        assert [answer.generated_tokens for answer in answers.values()] == greedy() != plain


@engine("`ShiftTrainer`")
def trainer(head: str) -> None:
    with TemporaryDirectory() as folder:
        done = recorded(folder, head, max_steps=2)
    gradients, shifts = in_plain_torch(done.steps[:-1], head=head)
    for found, wanted in zip(done.gradients, gradients, strict=True):
        same(found, wanted, 0)
    same(list(done.shifts.parameters()), list(shifts.parameters()), 0)


def with_adapter(head: str, **options: Any) -> None:
    model, shifts = subject(head)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
    adapted: Any = get_peft_model(model, config).double().eval()
    found = learned(adapted, shifts)
    assert differ(found[0], alone(head)[0])
    same(found, learned(adapted.merge_and_unload(), shifts))


@engine("PEFT, LoRA")
def lora(head: str) -> None:
    with_adapter(head)


@engine("PEFT, DoRA")
def dora(head: str) -> None:
    with_adapter(head, use_dora=True)


def from_disk(head: str, **options: Any) -> None:
    model, shifts = subject(head, torch.float32)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, **options, offload_folder=f"{folder}/offload")
        on_disk = [x.device.type == "meta" for x in again.parameters()]
        assert any(on_disk) == (options["device_map"] is ON_DISK)
        same(learned(again.eval().requires_grad_(False), shifts), alone(head, torch.float32), 0)


@engine('`device_map="cpu"`')
def on_cpu(head: str) -> None:
    from_disk(head, device_map="cpu")


@engine("`device_map`, a layer on disk")
def on_disk(head: str) -> None:
    from_disk(head, device_map=ON_DISK)


@engine("patched on the meta device, then dispatched, a layer on disk")
def meta(head: str) -> None:
    real, shifts = subject(head, torch.float32)
    with init_empty_weights(include_buffers=False):
        model = type(real)(real.config).eval().requires_grad_(False)
    with TemporaryDirectory() as folder, mc.patch(model, shifts):
        real.save_pretrained(folder)
        load_checkpoint_and_dispatch(model, folder, ON_DISK, offload_folder=f"{folder}/offload")
        assert any(x.device.type == "meta" for x in model.parameters())
        same(run(model, shifts), alone(head, torch.float32), 0)


def with_weights_of(quantised: Any, weight_of: Callable[[nn.Module], Tensor]) -> Any:
    """The plain model with the numbers that the quantised one multiplies with."""
    plain, _ = subject("live", torch.float32)
    changed = 0
    for name, module in quantised.named_modules():
        if name.startswith("model.layers") and name.endswith("_proj"):
            weight = weight_of(module).detach()
            changed += not torch.equal(weight, plain.get_submodule(name).weight)
            plain.get_submodule(name).weight.data = weight.float()
    assert changed == 14
    return plain


def quantised(head: str, change: Callable[[Any], None], weight_of: Callable[[nn.Module], Tensor]) -> None:
    model, shifts = subject(head, torch.float32)
    change(model)
    same(learned(model, shifts), learned(with_weights_of(model, weight_of), shifts), 1e-4)


@engine("torchao, int8 weights")
def torchao(head: str) -> None:
    quantization = import_module("torchao.quantization")
    quantised(
        head,
        lambda model: quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig()),
        lambda module: module.weight.dequantize(),
    )


@engine("quanto, int8 weights")
def quanto(head: str) -> None:
    package = import_module("optimum.quanto")

    def change(model: Any) -> None:
        package.quantize(model, weights=package.qint8, exclude="lm_head")
        package.freeze(model)

    quantised(head, change, lambda module: module.weight.dequantize())


def by_bitsandbytes(**options: Any) -> Any:
    import_module("bitsandbytes")
    model, _ = subject("live", torch.float32)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = transformers.BitsAndBytesConfig(**options)
        found = type(model).from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    return found.eval().requires_grad_(False)


@engine("bitsandbytes, 4-bit weights")
def four_bits(head: str) -> None:
    model = by_bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    for module in model.modules():  # on some CPUs, a kernel that rounds activations to bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    dequantize = import_module("bitsandbytes.functional").dequantize_4bit
    plain = with_weights_of(model, lambda module: dequantize(module.weight.data, module.weight.quant_state))
    _, shifts = subject(head, torch.float32)
    same(learned(model, shifts), learned(plain, shifts), 1e-4)


@engine("bitsandbytes, 8-bit weights and activations")
def eight_bits(head: str) -> None:
    """No plain model rounds its activations so: each edited value is compared with the head's formula."""
    model, (_, shifts) = by_bitsandbytes(load_in_8bit=True), subject(head, torch.float32)
    wanted, found = {}, {}

    def before(value: Tensor, at: mc.At) -> None:
        edit, place = shifts[at.layer].edits()[at.site](value, at), (at.layer, at.site)
        if shifts.config.positions != "all":
            chosen = at.positions(shifts.config.positions)
            chosen = chosen.view(*chosen.shape, *[1] * (value.ndim - 2))
            edit = torch.where(chosen.transpose(1, 2) if at.site == "query" else chosen, edit, value)
        wanted[place] = edit
        assert differ(wanted[place], value)

    def after(value: Tensor, at: mc.At) -> None:
        found[at.layer, at.site] = value

    sites = list(shifts[1].edits())
    with ExitStack() as put:
        for site in sites:
            put.enter_context(mc.hook(model, site, before, shifts.layers))
        put.enter_context(mc.patch(model, shifts))
        for site in sites:
            put.enter_context(mc.hook(model, site, after, shifts.layers))
        assert all(x.any() for x in run(model, shifts))
    places = [(layer, site) for layer in shifts.layers for site in sites]
    same([found[place] for place in places], [wanted[place] for place in places], FP32)
