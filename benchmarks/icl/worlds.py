"""The frozen models, the tasks they are asked, how their prompts are written, and when an answer is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimic_core.demo.digits import DigitPrompter, Line, digit_task, images
from mimic_core.demo.models import load_digit_model, load_model
from mimic_core.demo.prompts import Prompt, Prompter
from mimic_core.demo.tasks import Pair, Task

from . import half, smolvlm
from .pictures import PicturePrompter, picture_task
from .setups import SETUPS, Setup
from .words import CapitalsPrompter, word_task

CHUNK = 64
WORDING = "other wording"


def last_token(inputs: dict[str, Tensor]) -> Tensor:
    """A mask of where prompts end that are padded on the left."""
    where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    where[:, -1] = True
    return where


class World:
    """A model and its tasks.

    Attributes:
        name: "smolvlm", "smollm2", "llava" or "idefics2".
        model: Frozen, unpatched. SmolLM2 is in bf16, the others in fp32.
        setup: How much of everything its tasks get.
        shots: Demonstrations a teacher sees, and the k of k-shot.
        lora: The modules LoRA goes into, as a regular expression.
        others: By a name, prompters that ask the same questions otherwise. Nothing is trained on them.

    Args:
        setup: Another one than the comparison's.
        dtype: Another one for SmolLM2 without eyes.
    """

    def __init__(self, name: str, setup: Setup | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.name = name
        self.setup = setup or SETUPS[name]
        self.shots = max(self.setup.shots)
        self.model: Any
        self.prompter: Any
        self.others: dict[str, Any] = {}
        self.lora = r".*(language_model|text_model).*self_attn\.(q_proj|k_proj|v_proj|o_proj)"
        if name == "smollm2":
            self.model, tokenizer = load_model()
            self.model.to(dtype)
            told = tokenizer, next(self.model.parameters()).device
            self.prompter = Prompter(*told)
            self.others = {WORDING: Prompter(*told, mark=" ->"), "in capitals": CapitalsPrompter(*told)}
            self.lora = r".*self_attn\.(q_proj|k_proj|v_proj|o_proj)"
        elif name == "smolvlm":
            self.model, tokenizer = smolvlm.load()
            told = tokenizer, next(self.model.parameters()).device
            self.prompter = PicturePrompter(*told)
            self.others = {
                WORDING: PicturePrompter(*told, mark=" ->"),
                "noisy pictures": PicturePrompter(*told, noise=0.5),
            }
        else:
            self.model = load_digit_model(name)
            self.prompter = DigitPrompter(self.model)
        half.widen(self.model)

    def task(self, name: str, samples: int, seed: int, held_out: int | None = None) -> Task[Any]:
        """A task with so many training samples; the seed draws its rule, if it has one, and the split."""
        make = {"smollm2": word_task, "smolvlm": picture_task}.get(self.name, digit_task)
        return make(name, samples, seed, held_out)

    @torch.no_grad()
    def right(self, model: Any, prompts: Sequence[Prompt], other: str = "") -> list[bool]:
        """Whether greedy, cached decoding gives exactly the answer, prompt by prompt.

        Args:
            other: Whose prompts they are, of `others`.
        """
        collate = (self.others[other] if other else self.prompter).collate
        found: list[bool] = []
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            inputs = collate([prompt.question for prompt in chunk], left=True).inputs
            answers = [prompt.ids[prompt.answer_at :] for prompt in chunk]
            new = max(map(len, answers))
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            found += [row[: len(a)] == a for row, a in zip(out.tolist(), answers, strict=True)]
        return found

    def prompts(self, task: Task[Any], shots: int, seed: int, similar: bool = False, other: str = "") -> list[Prompt]:
        """Held-out questions, each with demonstrations from the training samples: drawn at random, or most similar.

        Args:
            other: Who writes them, of `others`.
        """
        draw, write = random.Random(seed), self.others[other] if other else self.prompter
        if not similar:
            return [write(sample, draw.sample(task.train, shots)) for sample in task.held_out]
        near = self._likeness(task.held_out) @ self._likeness(task.train).T
        # The most similar comes last, next to the question.
        chosen = near.topk(shots, dim=1).indices.flip(1).tolist()
        return [write(sample, [task.train[i] for i in row]) for sample, row in zip(task.held_out, chosen, strict=True)]

    def _likeness(self, samples: Sequence[Any]) -> Tensor:
        """Unit vectors whose products say how alike samples are: pixels, or letter pairs."""
        if self.name == "smolvlm":
            pixels = images().pixels[torch.tensor([scene.images for scene in samples])].flatten(1)
            return F.normalize(pixels - pixels.mean(), dim=1)
        if self.name != "smollm2":
            lines: Sequence[Line] = samples
            pixels = images().pixels[[line.image for line in lines]].flatten(1)
            words = F.one_hot(torch.tensor([line.word for line in lines])).float()
            return F.normalize(torch.cat([F.normalize(pixels - pixels.mean(), dim=1), words], dim=1), dim=1)
        pairs: Sequence[Pair] = samples
        counts = torch.zeros(len(pairs), 27 * 27)
        for row, (question, _) in zip(counts, pairs, strict=True):
            letters = [min(26, max(0, ord(c) - 97)) for c in f"^{question.lower()}$"]
            for a, b in pairwise(letters):
                row[27 * a + b] += 1
        return F.normalize(counts, dim=1)


@cache
def world(name: str, setup: Setup | None = None, dtype: torch.dtype = torch.bfloat16) -> World:
    """A world, loaded once a process."""
    return World(name, setup, dtype)
