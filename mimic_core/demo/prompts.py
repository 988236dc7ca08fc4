"""Prompts of demonstrations and a query, as padded batches that know which tokens are which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tasks import DemoError, Pair


@dataclass(frozen=True)
class Prompt:
    """Token ids of [BOS] demonstrations query answer, and where the query and the answer begin."""

    ids: list[int]
    query_at: int
    answer_at: int


class Prompter:
    """Writes a pair as `France: Paris` and a newline; demonstrations are further such lines before it.

    Each line is tokenised on its own, so a query and its answer are the same tokens with demonstrations and without.
    """

    def __init__(self, tokenizer: Any) -> None:
        # A model's first token is an attention sink, whatever else it says. It must be the same with demonstrations and
        # without; the query's own first token in its place makes the alignment loss explode.
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise DemoError(
                "the tokenizer has neither a BOS nor an EOS token to begin a prompt with; choose another --model"
            )
        self._bos: int = bos
        self._tokenizer = tokenizer

    def __call__(self, pair: Pair, demonstrations: Iterable[Pair] = ()) -> Prompt:
        """The prompt of one pair."""
        ids = [self._bos]
        for shown in demonstrations:
            ids += self._line(shown)[0]
        line, answer = self._line(pair)
        return Prompt(ids + line, query_at=len(ids), answer_at=len(ids) + answer)

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
    """Prompts of one length, padded on the right.

    Attributes:
        inputs: What the model takes: `input_ids` and `attention_mask`.
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


def collate(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    """Pad prompts on the right to one batch."""
    longest = max(len(prompt.ids) for prompt in prompts)
    place = torch.arange(longest)
    # Any token pads: it is masked in attention and chosen by no mask.
    ids = torch.tensor([prompt.ids + [prompt.ids[0]] * (longest - len(prompt.ids)) for prompt in prompts])
    real = torch.stack([place < len(prompt.ids) for prompt in prompts])
    context = torch.stack([place >= prompt.query_at for prompt in prompts]) & real
    answer = torch.stack([place >= prompt.answer_at for prompt in prompts]) & real
    inputs = {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}
    return Batch(inputs, context.to(device), answer.to(device))
