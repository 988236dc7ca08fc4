"""Numbers of the published implementation on tiny random models; goldens/README.md says what each is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import mimic_core as mc

FOLDER = Path(__file__).parent / "goldens"
CASES = ("idefics", "idefics2", "llava", "llava_gqa")
SITE = {"attn": "attn_out", "ffn": "mlp_out"}
INPUT_DTYPES = {"attention_mask": torch.long}


@dataclass
class Golden:
    """One file of one case: a variant with one padding side."""

    case: str
    variant: str
    padding: str
    tensors: dict[str, Tensor] = field(repr=False)
    base: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.case}-{self.variant}-{self.padding}"

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def inputs(self, run: str) -> dict[str, Tensor]:
        return tensors_under(self.base, f"{run}.inputs.")

    def mask(self, run: str, name: str) -> Tensor:
        return self.base[f"{run}.mask.{name}"].bool()

    def attended(self, run: str) -> Tensor:
        return self.inputs(run)["attention_mask"].bool()

    @cached_property
    def params(self) -> dict[str, Tensor]:
        return tensors_under(self.tensors, "params.")

    @property
    def strategies(self) -> list[str]:
        return sorted({name.split(".")[1] for name in self.tensors if name.startswith("loss.")})


def tensors_under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return {name: x.to(INPUT_DTYPES.get(name, x.dtype)) for name, x in found.items()}


def golden_names() -> list[tuple[str, str, str]]:
    """Every (case, variant, padding) there is a file of."""
    names = []
    for case in CASES:
        for file in sorted((FOLDER / case).glob("*.safetensors")):
            variant, _, padding = file.stem.partition(".")
            if variant not in ("base", "generate"):
                names.append((case, variant, padding))
    return names


def load_golden(case: str, variant: str, padding: str) -> Golden:
    folder = FOLDER / case
    return Golden(
        case,
        variant,
        padding,
        load_file(folder / f"{variant}.{padding}.safetensors"),
        load_file(folder / f"base.{padding}.safetensors"),
    )


def load_generation(case: str) -> dict[str, Tensor]:
    return load_file(FOLDER / case / "generate.mimic.safetensors")


def load_meta(case: str) -> dict:
    return json.loads((FOLDER / case / "meta.json").read_text())


def load_model(case: str, attention: str) -> nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(
        FOLDER / case / "model", attn_implementation=attention, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def reference_gradients(stack: mc.ShiftStack) -> dict[str, Tensor]:
    """A stack's gradients under the published names and shapes; zeros where there is none."""
    grads: dict[str, list[Tensor]] = {}
    for head in stack:
        for name, p in head.named_parameters():
            grads.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
    if stack.name == "live":
        prefix = "ffn_shift" if stack[0].site == "mlp_out" else "attn_shift"
        names = {"vector": prefix, "scale": f"{prefix}_scale"}
    else:
        names = {"vector": "attn_shift", "mlp_vector": "ffn_shift"}
    found = {names[name]: torch.stack(rows) for name, rows in grads.items() if name in names}
    for part in ("weight", "bias"):
        for layer, grad in enumerate(grads.get(f"gate_{part}", [])):
            found[f"log_Z1_lin.{layer}.{part}"] = grad
    return found
