"""Prompts of demonstrations and a query, as padded batches that know which tokens are which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .tasks import DemoError, Pair


@dataclass(frozen=True)
class Prompt:
    """Token ids of [BOS] demonstrations query answer, where the query and the answer begin, and the images in it."""

    ids: list[int]
    query_at: int
    answer_at: int
    images: tuple[int, ...] = ()

    @property
    def question(self) -> Prompt:
        """Without the answer: what a model is given to go on from."""
        return replace(self, ids=self.ids[: self.answer_at])


class Prompter:
    """Writes a pair as `France: Paris` and a newline; demonstrations are further such lines before it.

    Each line is tokenised on its own, so a query and its answer are the same tokens with demonstrations and without.
    """

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        # A model's first token is an attention sink, whatever else it says. It must be the same with demonstrations and
        # without; the query's own first token in its place makes the alignment loss explode.
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise DemoError(
                "the tokenizer has neither a BOS nor an EOS token to begin a prompt with; choose another --model"
            )
        self._bos: int = bos
        self._tokenizer = tokenizer
        self._device = device

    def __call__(self, pair: Pair, demonstrations: Iterable[Pair] = ()) -> Prompt:
        """The prompt of one pair."""
        ids = [self._bos]
        for shown in demonstrations:
            ids += self._line(shown)[0]
        line, answer = self._line(pair)
        return Prompt(ids + line, query_at=len(ids), answer_at=len(ids) + answer)

    def collate(self, prompts: Sequence[Prompt], left: bool = False) -> Batch:
        """A batch of prompts; padded on the left if something is to be generated after them."""
        return collate(prompts, self._device, left)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer that tokens begin with."""
        return self._tokenizer.decode(ids).split("\n")[0].strip()

    def _line(self, pair: Pair) -> tuple[list[int], int]:
        """A line's tokens, and the index of the first that belongs to the answer."""
        query, answer = pair
        line = self._tokenizer(f"{query}: {answer}\n", add_special_tokens=False)["input_ids"]
        alone = self._tokenizer(f"{query}:", add_special_tokens=False)["input_ids"]
        same = 0
        while same < len(alone) and line[same] == alone[same]:
            same += 1
        return line, same


@dataclass(frozen=True)
class Batch:
    """Prompts of one length, padded.

    Attributes:
        inputs: What the model takes: `input_ids` and `attention_mask`, and pixels where there are images.
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
    """Pad prompts to one batch; on the left if something is to be generated after them."""
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    # Any token pads: it is masked in attention and chosen by no mask.
    fill = [[prompt.ids[0]] * pad for prompt, pad in zip(prompts, pads, strict=True)]
    ids = torch.tensor([f + p.ids if left else p.ids + f for p, f in zip(prompts, fill, strict=True)])
    # The place of each token in its own prompt.
    place = torch.arange(longest) - torch.tensor(pads)[:, None] * left
    real = (place >= 0) & (place < torch.tensor([len(prompt.ids) for prompt in prompts])[:, None])
    context = real & (place >= torch.tensor([prompt.query_at for prompt in prompts])[:, None])
    answer = real & (place >= torch.tensor([prompt.answer_at for prompt in prompts])[:, None])
    inputs = {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}
    return Batch(inputs, context.to(device), answer.to(device))
