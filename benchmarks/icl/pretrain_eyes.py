"""`python -m benchmarks.icl.pretrain_eyes`: train the encoder of SmolLM2 to be read as words.

The token of an image is fitted to the embedding of its digit's word. So the decoder does not run in training, and
nothing but its own in-context learning is asked later.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mimic_core.demo.digits import images

from . import smolvlm

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STEPS, RATE = 1500, 2e-3
# What stands before an image, between it and its word, and after that, where reading is asked.
FORMS = (("", ":", "\n"), ("Input:", "\nOutput:", "\n\n"), ("Picture:", " Word:", ";"))


def picture(indices: Sequence[int], draw: random.Random) -> Tensor:
    """Training images, half of them moved by a pixel, with noise."""
    pixels = images().pixels[list(indices)]
    if draw.random() < 0.5:
        pixels = torch.roll(pixels, (draw.randint(-1, 1), draw.randint(-1, 1)), (2, 3))
    return pixels + 0.2 * torch.randn_like(pixels)


def seen(model: Any, pixels: Tensor) -> Tensor:
    """The tokens [n c] of images [n 1 8 8]."""
    tower = model.model.vision_tower(pixels).last_hidden_state
    return rearrange(model.model.multi_modal_projector(tower), "n 1 c -> n c")


def fit(model: Any, words: Tensor, draw: random.Random) -> None:
    """Fit the token of an image to the embedding [10 c] of its word, among those of the other words."""
    known, size = images(), words.square().sum(-1).mean()
    learned = [p.requires_grad_(True) for p in smolvlm.eyes(model).values()]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in tqdm(range(STEPS), unit="step", file=sys.stderr, mininterval=10):
        chosen = draw.choices(known.train, k=64)
        found, digits = seen(model, picture(chosen, draw)), known.digits[chosen]
        away = reduce((found - words[digits]).square(), "n c -> n", "sum").mean() / size
        (away + F.cross_entropy(10 * found @ words.T / size, digits)).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for p in learned:
        p.requires_grad_(False)


@torch.no_grad()
def reading(model: Any, tokenizer: Any, form: tuple[str, str, str] = FORMS[0]) -> float:
    """The share of held-out digits whose word is the likeliest of the ten, after two lines with numbers in words."""
    known = images()
    shown = "".join(f"{form[0]} {number}{form[1]} {number}{form[2]}" for number in ("four", "nine"))
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (shown + form[0], form[1]))
    ids = torch.tensor([tokenizer.bos_token_id, *before, smolvlm.IMAGE, *after]).repeat(len(known.held_out), 1)
    wanted = torch.tensor([tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in NUMBERS])
    right = 0
    for part in torch.arange(len(known.held_out)).split(50):
        chosen = [known.held_out[i] for i in part.tolist()]
        logits = model(input_ids=ids[part], pixel_values=known.pixels[chosen], use_cache=False, logits_to_keep=1).logits
        right += (logits[:, -1, wanted].argmax(-1) == known.digits[chosen]).sum().item()
    return right / len(known.held_out)


def main() -> None:
    """Train, say how well it reads held-out digits, and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.icl.pretrain_eyes", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=smolvlm.WEIGHTS, help="output file (default: the benchmark's)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    draw, start = random.Random(options.seed), time.perf_counter()
    model, tokenizer = smolvlm.build()
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in NUMBERS]
    words = model.get_input_embeddings().weight[ids].float()
    fit(model, words, draw)
    smolvlm.save(model, options.out)
    model.to(torch.bfloat16)
    shares = [reading(model, tokenizer, form) for form in FORMS]
    print(
        f"{options.out.name}: {time.perf_counter() - start:.0f} seconds, reads "
        + ", ".join(f"{share:.1%}" for share in shares)
    )


if __name__ == "__main__":
    main()
