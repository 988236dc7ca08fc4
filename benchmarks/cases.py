"""What is measured: attention shapes of real models, lengths, dtypes and masks, and the tensors of a case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Attention of one decoder layer: attention heads, key/value heads, head_dim."""

    h: int
    g: int
    d: int


SHAPES = {
    # Neutral: what the headline tables and plots show.
    "d64": Shape(8, 8, 64),
    "d128": Shape(8, 8, 128),
    "idefics-9b": Shape(32, 32, 128),
    "idefics2-8b": Shape(32, 8, 128),
    "llava-interleave-7b": Shape(32, 32, 128),
    "llava-interleave-0.5b": Shape(16, 16, 64),
    "qwen2.5-vl-7b": Shape(28, 4, 128),
    "smolvlm": Shape(32, 32, 64),
    "smolvlm-256m": Shape(9, 3, 64),
}
NEUTRAL = ("d64", "d128")
# Names that share a shape are measured once, under the first name.
MODELS = ("idefics-9b", "idefics2-8b", "llava-interleave-0.5b", "qwen2.5-vl-7b", "smolvlm", "smolvlm-256m")
LENGTHS = (512, 1024, 2048, 4096)
CACHED = (64, 256, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call of attention.

    Attributes:
        mask: "causal"; "padded": two samples, left-padded, the second by half its length, as a bool mask [b 1 t s];
            "none": a token that sees all its keys, as in cached decoding.
    """

    shape: str
    t: int
    s: int
    dtype: str = "fp32"
    mask: str = "causal"

    @property
    def name(self) -> str:
        length = f"s{self.s}" if self.mask == "none" else f"t{self.t}"
        return f"{self.shape}-{length}-{self.dtype}-{self.mask}"

    @property
    def flex(self) -> bool:
        """Whether FlexAttention runs it: it is compiled anew for each shape, for many seconds."""
        return self.shape in NEUTRAL and self.t in LENGTHS[1::2] and (self.dtype, self.mask) == ("bf16", "causal")

    @property
    def b(self) -> int:
        return 2 if self.mask == "padded" else 1

    @property
    def sizes(self) -> dict[str, int]:
        """b h g t s d."""
        return {"b": self.b, **SHAPES[self.shape]._asdict(), "t": self.t, "s": self.s}


class Inputs(NamedTuple):
    """The tensors of a case; the first six are leaves that want a gradient, `grad` is that of the output [b t h d].

    It is zero where a row sees no key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    vector: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    mask: Tensor | None
    is_causal: bool
    grad: Tensor

    @property
    def unseeing(self) -> Tensor | None:
        """Rows that see no key, [b t 1 1]: every kernel makes of their output what it likes. None: there are none."""
        return None if self.mask is None else ~self.mask.any(-1).transpose(1, 2)[..., None]


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Tensors of a case, the same ones for the same seed.

    Vectors are as long as the values and gates are open, so that a gradient that is dropped anywhere shows.
    """
    b, h, g, d, t, s = (case.sizes[name] for name in "bhgdts")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    dtype = DTYPES[case.dtype]
    q, k, v = normal(b, h, t, d, dtype=dtype), normal(b, g, s, d, dtype=dtype), normal(b, g, s, d, dtype=dtype)
    vector, gate_weight = normal(h, d), 0.1 * normal(h, d)
    gate_bias = normal(h) + math.log(s)  # about the LSE of a row that sees every key
    for leaf in (q, k, v, vector, gate_weight, gate_bias):
        leaf.requires_grad_()
    mask = padded_mask(b, t, device) if case.mask == "padded" else None
    grad = normal(b, t, h, d, dtype=dtype)
    inputs = Inputs(q, k, v, vector, gate_weight, gate_bias, mask, case.mask == "causal", grad)
    return inputs if inputs.unseeing is None else inputs._replace(grad=grad.masked_fill(inputs.unseeing, 0.0))


def padded_mask(b: int, t: int, device: torch.device) -> Tensor:
    """Causal, and every second sample left-padded by half: bool [b 1 t t]. The rows of pads see no key."""
    start = (torch.arange(b, device=device) % 2) * (t // 2)
    real = torch.arange(t, device=device) >= start[:, None]
    return torch.ones(t, t, dtype=torch.bool, device=device).tril() & real[:, None, None, :]


def _cases(
    shapes: Iterable[str], lengths: Iterable[int], dtypes: Iterable[str], masks: Iterable[str] = ("causal",)
) -> list[Case]:
    return [Case(shape, t, t, *rest) for shape, *rest, t in product(shapes, dtypes, masks, lengths)]


def prefill_cases(device: str, quick: bool = False) -> list[Case]:
    """Cases with as many queries as keys. On a CPU the long ones are left to the neutral shapes."""
    if quick:
        neutral = _cases(["d64"], [512], ["fp32", "bf16"], ["causal", "padded"])
        return [*neutral, *_cases(["smolvlm-256m"], [512], ["fp32"])]
    if device == "cuda":
        return [
            *_cases(NEUTRAL, LENGTHS, ["bf16", "fp32"], ["causal", "padded"]),
            *_cases(NEUTRAL, LENGTHS[1:2], ["fp16"]),
            *_cases(MODELS, LENGTHS[1::2], ["bf16"]),
        ]
    return [
        *_cases(NEUTRAL, LENGTHS, ["fp32", "bf16"]),
        *_cases(NEUTRAL, LENGTHS[:-1], ["fp32", "bf16"], ["padded"]),
        *_cases(MODELS, LENGTHS[1:2], ["fp32"]),
    ]


def decode_cases(device: str, quick: bool = False) -> list[Case]:
    """Cases with one query and a cache of keys."""
    if quick:
        return [Case("d64", 1, s, "fp32", "none") for s in (64, 1024)]
    dtypes = ["bf16"] if device == "cuda" else ["fp32"]
    chosen = [("d64", d) for d in ("fp32", "bf16")] + [(shape, d) for shape in ("d128", *MODELS) for d in dtypes]
    cached = CACHED if device == "cuda" else CACHED[::2]
    return [Case(shape, 1, s, dtype, "none") for shape, dtype in chosen for s in cached]
