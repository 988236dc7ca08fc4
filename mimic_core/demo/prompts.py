"""Prompts of demonstrations and a query, and padded batches with masks of their parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .tasks import DemoError, Pair


@dataclass(frozen=True)
class Prompt:
    """Token ids of [BOS], demonstrations, query and answer; where query and answer begin; and the images in it."""

    ids: list[int]
    query_at: int
    answer_at: int
    images: tuple[int, ...] = ()

    @property
    def question(self) -> Prompt:
        """The prompt without the answer, for generation."""
        return replace(self, ids=self.ids[: self.answer_at])


class Prompter:
    """Writes a pair as `France: Paris` and a newline, after lines of the same form for the demonstrations.

    Each line is tokenised separately, so a query and its answer have the same tokens with and without demonstrations.

    Args:
        mark: What stands after a query, in place of the colon.
    """

    def __init__(self, tokenizer: Any, device: torch.device, mark: str = ":") -> None:
        # The first token is an attention sink. It must be the same with and without demonstrations. If the first token
        # of the query were there instead, the alignment loss would become very large.
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise DemoError(
                "the tokenizer has neither a BOS nor an EOS token to begin a prompt with; choose another --model"
            )
        self._bos: int = bos
        self._tokenizer = tokenizer
        self._device = device
        self._mark = mark

    def __call__(self, pair: Pair, demonstrations: Iterable[Pair] = ()) -> Prompt:
        """The prompt of one pair."""
        ids = [self._bos]
        for shown in demonstrations:
            ids += self._line(shown)[0]
        line, answer = self._line(pair)
        return Prompt(ids + line, query_at=len(ids), answer_at=len(ids) + answer)

    def collate(self, prompts: Sequence[Prompt], left: bool = False) -> Batch:
        """A batch of prompts. Pad on the left for generation."""
        return collate(prompts, self._device, left)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer at the beginning of the tokens."""
        return self._tokenizer.decode(ids).split("\n")[0].strip()

    def _line(self, pair: Pair) -> tuple[list[int], int]:
        """The tokens of a line, and the index of the first token of the answer."""
        query, answer = pair
        line = self._tokenizer(f"{query}{self._mark} {answer}\n", add_special_tokens=False)["input_ids"]
        alone = self._tokenizer(f"{query}{self._mark}", add_special_tokens=False)["input_ids"]
        same = 0
        while same < len(alone) and line[same] == alone[same]:
            same += 1
        return line, same


@dataclass(frozen=True)
class Batch:
    """Prompts padded to one length.

    Attributes:
        inputs: The arguments of the model: `input_ids`, `attention_mask`, and `pixel_values` if there are images.
        context_tokens: True at the tokens of query and answer, which teacher and student share.
        answer_tokens: True at the tokens of the answer and the newline that ends it.
    """

    inputs: dict[str, Tensor]
    context_tokens: Tensor
    answer_tokens: Tensor

    @property
    def before_answer(self) -> Tensor:
        """True at the positions whose logits predict `answer_tokens`."""
        return self.answer_tokens.roll(-1, dims=1)


def collate(prompts: Sequence[Prompt], device: torch.device, left: bool = False) -> Batch:
    """Pad prompts to one batch. Pad on the left for generation."""
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    # Any token can be the padding: it is masked in attention, and no mask of a part includes it.
    fill = [[prompt.ids[0]] * pad for prompt, pad in zip(prompts, pads, strict=True)]
    ids = torch.tensor([f + p.ids if left else p.ids + f for p, f in zip(prompts, fill, strict=True)])
    # The position of each token in its own prompt.
    place = torch.arange(longest) - torch.tensor(pads)[:, None] * left
    real = (place >= 0) & (place < torch.tensor([len(prompt.ids) for prompt in prompts])[:, None])
    context = real & (place >= torch.tensor([prompt.query_at for prompt in prompts])[:, None])
    answer = real & (place >= torch.tensor([prompt.answer_at for prompt in prompts])[:, None])
    inputs = {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}
    return Batch(inputs, context.to(device), answer.to(device))
