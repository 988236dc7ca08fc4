"""`python -m benchmarks.icl.pretrain llava`: train a small vision-language model that learns in context."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

from mimic_core.demo.digits import BOS, EOS, IMAGE, PAD, RULES, VOCABULARY, DigitPrompter, digit_task
from mimic_core.demo.models import DIGIT_MODELS, digit_model_folder

from .episodes import CURRICULUM, Drawer, Episodes, Phase

STEPS, LEARNING_RATE, WARM_UP = 2500, 2e-3, 200
# How many last lines have to be right to go on. A model that does not look at its demonstrations gets some 0.6 of the
# first phase's right; from there llava begins to learn in context in the second phase too, idefics2 never.
MASTERED = {"llava": 0.0, "idefics2": 0.8}
TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": True,
    # At transformers' 0.02 a model this narrow had not begun to learn in context after 600 steps; at 0.08, after 400.
    "initializer_range": 0.08,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "initializer_range": 0.08,
}


def build(family: str) -> nn.Module:
    """A fresh model of a real class: four patches an image, as four tokens (llava) or resampled to two (idefics2)."""
    if family == "llava":
        config = LlavaConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            image_token_index=IMAGE,
            image_seq_length=4,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
        return LlavaForConditionalGeneration(config)
    perceiver = {
        "model_type": "idefics2_perceiver",
        "resampler_n_latents": 2,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "num_key_value_heads": 2,
    }
    config = Idefics2Config(
        text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
        vision_config={"model_type": "idefics2_vision", **VISION},
        perceiver_config=perceiver,
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )
    return Idefics2ForConditionalGeneration(config)


class Course:
    """Where in the curriculum training is.

    A phase lasts its share of the steps, and longer until it is mastered: a model that goes on before it has begun to
    learn in context never begins.
    """

    def __init__(self, family: str, steps: int) -> None:
        self._steps = steps
        self._mastered = MASTERED[family]
        self._index, self._since = 0, 0
        self._right = 0.0

    @property
    def right(self) -> str:
        """How much of late is right, in words."""
        return f"{self._right:.2f}"

    @property
    def phase(self) -> Phase:
        return CURRICULUM[self._index]

    def after(self, step: int, right: float) -> None:
        """Tell how many of the step's last lines were answered right."""
        self._right += 0.02 * (right - self._right)
        long_enough = step + 1 - self._since >= self.phase.share * self._steps
        if long_enough and self._right > self._mastered and self._index + 1 < len(CURRICULUM):
            self._index, self._since = self._index + 1, step + 1


def answer(model: nn.Module, family: str, episodes: Episodes) -> Tensor:
    """Logits [b n vocabulary] of every line's answer."""
    pixels = episodes.pixels if family == "idefics2" else episodes.pixels.flatten(0, 1)
    return model(input_ids=episodes.ids, pixel_values=pixels, use_cache=False).logits[:, episodes.asked]


def train(family: str, steps: int, seed: int) -> nn.Module:
    """Train from scratch."""
    torch.manual_seed(seed)
    model = build(family)
    prompter = DigitPrompter(model)
    draw = Drawer(prompter.image_tokens, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / WARM_UP) * (0.525 + 0.475 * math.cos(math.pi * s / steps))
    )
    course = Course(family, steps)
    with tqdm(range(steps), desc=family, unit="step", file=sys.stderr) as bar:
        for step in bar:
            episodes = draw(course.phase)
            logits = answer(model, family, episodes)
            # The first lines' answers can't be known, and cost every model the same.
            loss = F.cross_entropy(logits.flatten(0, 1), episodes.answers.flatten())
            loss.backward()
            course.after(step, (logits[:, -1].argmax(-1) == episodes.answers[:, -1]).float().mean().item())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", phase=CURRICULUM.index(course.phase), right=course.right)
            if (step + 1) % 500 == 0:
                tqdm.write(f"{family}, step {step + 1}: {json.dumps(score(model))}", file=sys.stderr)
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, shots: Sequence[int] = (0, 24), held_out: int = 100) -> dict[str, float]:
    """Accuracy on held-out images, tasks no episode was made for, by the number of demonstrations drawn at random."""
    training = model.training
    model.eval()
    found = {}
    prompter = DigitPrompter(model)
    for name in RULES:
        for count in shots:
            right = []
            for seed in range(4):
                task = digit_task(name, max(count, 1), seed, held_out)
                prompts = [prompter(line, task.train[:count]) for line in task.held_out]
                batch = prompter.collate(prompts)
                logits = model(**batch.inputs, use_cache=False).logits[batch.before_answer]
                right.append(logits.argmax(-1) == batch.inputs["input_ids"][batch.answer_tokens])
            found[f"{name}@{count}"] = round(torch.cat(right).float().mean().item(), 3)
    model.train(training)
    return found


def save(model: nn.Module, folder: Path) -> None:
    """Config and weights, as every supported version of transformers reads them."""
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    file = folder / "model.safetensors"
    # The vision tower's names as transformers 5.1 has them, which later versions read too but don't write.
    tower = re.compile(r"vision_tower\.(?!vision_model\.)")
    weights = {tower.sub("vision_tower.vision_model.", name): x for name, x in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def main() -> None:
    """Train, say how well it learns in context, and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.icl.pretrain", description=__doc__)
    parser.add_argument("family", choices=DIGIT_MODELS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="output folder (default: the folder of the demo's model)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; another number gives other rounding (default: 1)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    model = train(options.family, options.steps, options.seed)
    minutes = (time.perf_counter() - start) / 60
    folder = options.out or digit_model_folder(options.family)
    save(model, folder)
    print(f"{folder}: {minutes:.0f} minutes, {json.dumps(score(model, shots=(0, 6, 12, 24), held_out=500))}")


if __name__ == "__main__":
    main()
