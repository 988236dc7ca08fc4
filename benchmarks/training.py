"""One training step of MimIC, as published and as the README of mimic_core writes it: the same loss and gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import mimic_core as mc

from .models import Subject
from .published import published, unshifted, whole_outputs


class Lesson:
    """A sample with demonstrations and without, and which of its tokens teacher and student are compared on."""

    def __init__(self, subject: Subject, context: int, query: int, device: torch.device) -> None:
        self.model = subject.model
        self.query_only = subject.inputs(query)
        self.with_demonstrations = subject.inputs(context, seed=1)
        # What both end with: all of the query but BOS, and the image that comes after it.
        shared = query - 1 - subject.image_tokens
        self.with_demonstrations["input_ids"][:, -shared:] = self.query_only["input_ids"][:, -shared:]
        self.context_tokens = torch.arange(context, device=device)[None] >= context - shared
        self.query_tokens = torch.arange(query, device=device)[None] >= query - shared
        self.label_mask = torch.arange(query, device=device)[None] >= query - shared // 2


class Step(ABC):
    """Teacher, student, loss and backward; called, it returns the loss and the gradients by parameter.

    Args:
        lean: The teacher leaves out its logits. The alignment doesn't need them; neither way says to leave them out.
    """

    def __init__(self, shifts: mc.ShiftStack, lesson: Lesson, lean: bool = False) -> None:
        self.shifts, self.lesson = shifts, lesson
        self.teacher_options: dict[str, Any] = {"use_cache": False, **({"logits_to_keep": 1} if lean else {})}

    @contextmanager
    @abstractmethod
    def around(self) -> Iterator[None]:
        """What stands around a training loop."""
        yield

    @abstractmethod
    def loss(self) -> Tensor:
        """Alignment and language-model loss of one sample."""

    def __call__(self) -> dict[str, Tensor]:
        loss = self.loss()
        loss.backward()
        found = {"loss": loss.detach()}
        for name, p in self.shifts.named_parameters():
            if p.grad is not None:
                found[name], p.grad = p.grad, None
        return found

    def language(self, logits: Tensor) -> Tensor:
        """The language-model loss of the student."""
        return mc.losses.lm(logits, self.lesson.query_only["input_ids"], self.lesson.label_mask)


class OurStep(Step):
    """The loop of the README."""

    @contextmanager
    def around(self) -> Iterator[None]:
        with mc.patch(self.lesson.model, self.shifts) as self.handle:
            yield

    def loss(self) -> Tensor:
        model, lesson = self.lesson.model, self.lesson
        with torch.no_grad(), self.handle.disabled():
            with mc.capture(model, "mlp_out", where=lesson.context_tokens) as teacher:
                model(**lesson.with_demonstrations, **self.teacher_options)
        with mc.capture(model, "mlp_out", where=lesson.query_tokens) as student:
            out = model(**lesson.query_only, use_cache=False)
        align = mc.losses.layer_mse(student, teacher)
        return mc.losses.recipe("mimic")(align=align, lm=self.language(out.logits))


class BareStep(Step):
    """What both ways have in common: both forwards, and a backward through the student down to its embeddings.

    No shift and no alignment. What a way takes beyond this is its own.
    """

    @contextmanager
    def around(self) -> Iterator[None]:
        embeddings = self.lesson.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        hook = embeddings.register_forward_hook(lambda module, inputs, out: out.requires_grad_(torch.is_grad_enabled()))
        try:
            yield
        finally:
            hook.remove()

    def loss(self) -> Tensor:
        model, lesson = self.lesson.model, self.lesson
        with torch.no_grad():
            model(**lesson.with_demonstrations, **self.teacher_options)
        return self.language(model(**lesson.query_only, use_cache=False).logits)


class PublishedStep(Step):
    """The published way: every forward takes its LSE from whole scores; hidden states of all tokens are kept."""

    @contextmanager
    def around(self) -> Iterator[None]:
        with published(self.lesson.model, self.shifts):
            yield

    def loss(self) -> Tensor:
        model, lesson = self.lesson.model, self.lesson
        adapter = mc.adapter_for(model)
        modules: list[nn.Module] = [adapter.module(model, head.layer.index, "mlp_out") for head in self.shifts]
        with torch.no_grad(), unshifted(), whole_outputs(modules) as teacher:
            # Its logits live as long as what the model returned: to the end of the step, as in the published code.
            shown = model(**lesson.with_demonstrations, **self.teacher_options)
        with whole_outputs(modules) as student:
            out = model(**lesson.query_only, use_cache=False)
        ours = torch.stack(student)[:, lesson.query_tokens]
        theirs = torch.stack(teacher)[:, lesson.context_tokens]
        del shown
        return (ours - theirs).square().mean() + 0.5 * self.language(out.logits)
