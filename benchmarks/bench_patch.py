"""Whole models: what a patch costs a prefill and a decoded token, and what a training step costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import mimic_core as mc

from .bench_shift import Task, timed_rows
from .cases import DTYPES
from .check import error, refuse
from .contestants import OURS, PUBLISHED
from .errors import BenchmarkError
from .measure import Around, Call, Effort, effort_for, peak_memory
from .models import Subject, small_llava, smollm2
from .published import live_forwards, published, published_live
from .records import Row
from .training import BareStep, Lesson, OurStep, PublishedStep, Step

UNPATCHED, MIMIC, ZERO, LIVE = "unpatched", f"{OURS}: MimIC", f"{OURS}: MimIC, zero vectors", f"{OURS}: LIVE"
LEAN = ", no teacher logits"
# Largest error of logits, and of a training step's loss and gradients, relative to the largest entry.
LIMITS = {"fp32": 1e-3, "bf16": 5e-2}


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Every stage of every model; a model is made when its first stage runs."""
    dtype = "bf16" if device.type == "cuda" else "fp32"
    effort = effort_for(device, quick)
    lengths, lesson = ((64,), (128, 32)) if quick else ((512, 1024), (2048, 64))
    for build in (smollm2, small_llava):
        bench = cache(partial(_make, build, device, dtype, effort))
        for length in lengths:
            yield Task(f"{build.__name__} prefill {length}", _stage(bench, Bench.prefill, length))
            yield Task(f"{build.__name__} decode {length}", _stage(bench, Bench.decode, length))
        yield Task(f"{build.__name__} training", _stage(bench, Bench.train, *lesson))


def _make(build: Callable[..., Subject], device: torch.device, dtype: str, effort: Effort) -> Bench:
    return Bench(build(device, DTYPES[dtype]), device, dtype, effort)


def _stage(bench: Callable[[], Bench], stage: Callable[..., list[Row]], *sizes: int) -> Any:
    return lambda refused: stage(bench(), *sizes, refused)


def shifts_that_show(model: nn.Module, head: str | mc.HeadConfig, device: torch.device) -> mc.ShiftStack:
    """Shifts that change the logits: fresh ones hardly do, and a wrong result would pass."""
    shifts = mc.build_shifts(model, head)
    with torch.no_grad():
        for key, p in [*shifts.named_parameters(), *shifts.named_buffers()]:
            if key.endswith("gate_bias"):
                p.fill_(4.0)
            else:
                p.add_(0.05 * torch.randn(p.shape))
    return shifts.to(device)


class Bench:
    """A model and the shifts that are put into it."""

    def __init__(self, subject: Subject, device: torch.device, dtype: str, effort: Effort) -> None:
        self.subject, self.device, self.dtype, self.effort = subject, device, dtype, effort
        torch.manual_seed(0)
        self.mimic, self.zero, self.live = (
            shifts_that_show(subject.model, name, device) for name in ("mimic", "mimic", "live")
        )
        with torch.no_grad():
            for name, p in self.zero.named_parameters():
                if name.endswith("vector"):
                    p.zero_()
        layer = self.mimic.spec.layers[0]
        self._sizes = {"b": 1, "h": layer.heads, "g": layer.kv_heads, "d": layer.head_dim}

    def prefill(self, t: int, refused: list[BenchmarkError]) -> list[Row]:
        """A prompt as generation runs it: into a fresh cache, with logits of the last token alone."""
        inputs = self.subject.inputs(t)

        @torch.no_grad()
        def call() -> Tensor:
            return self.subject.model(**inputs, use_cache=True, logits_to_keep=1).logits

        return self._compared(call, nullcontext, refused, "prefill", t=t, s=t)

    def decode(self, s: int, refused: list[BenchmarkError]) -> list[Row]:
        """One token on a cache of a fixed length; what the step put into the cache is taken off outside the clock."""
        model, inputs, past = self.subject.model, self.subject.inputs(s), DynamicCache()
        with torch.no_grad():
            model(**inputs, past_key_values=past, use_cache=True, logits_to_keep=1)
        step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": torch.ones(1, s + 1, device=self.device)}

        @torch.no_grad()
        def call() -> Tensor:
            return model(**step, past_key_values=past, use_cache=True).logits

        @contextmanager
        def cropped() -> Iterator[None]:
            yield
            past.crop(-1)

        return self._compared(call, cropped, refused, "decode step", memory=False, t=1, s=s)

    def train(self, context: int, query: int, refused: list[BenchmarkError]) -> list[Row]:
        """A training step: teacher with demonstrations, student without, loss, backward."""
        lesson = Lesson(self.subject, context, query, self.device)
        steps: dict[str, Step] = {
            PUBLISHED: PublishedStep(self.mimic, lesson),
            OURS: OurStep(self.mimic, lesson),
            PUBLISHED + LEAN: PublishedStep(self.mimic, lesson, lean=True),
            OURS + LEAN: OurStep(self.mimic, lesson, lean=True),
        }
        case = f"{self.subject.name}-training-s{context}-{self.dtype}"
        around: dict[str, Around] = {name: step.around for name, step in steps.items()}
        found = {}
        for name, step in steps.items():
            with step.around():
                found[name] = step()
        self._refuse_wrong(case, {name: (found[name], found[PUBLISHED]) for name in found}, around, refused)
        calls = {name: steps[name] for name in around}
        rows = self._rows(calls, around, case, "training step", t=query, s=context)
        return [row for lean in (False, True) for row in self._beyond_bare(rows, lesson, lean)]

    def _beyond_bare(self, rows: list[Row], lesson: Lesson, lean: bool) -> list[Row]:
        """Memory beyond what a step has without shift and alignment, over that of the published way."""
        bare = BareStep(self.mimic, lesson, lean)
        with bare.around():
            bare()
            common = peak_memory(bare, self.device)
        chosen = [row for row in rows if row.contestant.endswith(LEAN) == lean]
        extra = {row.contestant: (row.peak_bytes or 0) - common for row in chosen}
        whole = extra.get(PUBLISHED + LEAN if lean else PUBLISHED)
        return [
            replace(row, extra_over_yardstick=max(1, extra[row.contestant]) / whole if whole else None)
            for row in chosen
        ]

    def _compared(
        self,
        call: Callable[[], Tensor],
        within: Around,
        refused: list[BenchmarkError],
        what: str,
        memory: bool = True,
        **lengths: int,
    ) -> list[Row]:
        model = self.subject.model
        inside: dict[str, Around] = {
            UNPATCHED: nullcontext,
            ZERO: partial(mc.patch, model, self.zero),
            MIMIC: partial(mc.patch, model, self.mimic),
            LIVE: partial(mc.patch, model, self.live),
            PUBLISHED: partial(published, model, self.mimic),
        }
        around: dict[str, Around] = {name: partial(_nested, a, within) for name, a in inside.items()}
        by_hand = partial(live_forwards, _live_in_fp64, model, self.live)
        found = {}
        for name, enter in {**around, "by hand": partial(_nested, by_hand, within)}.items():
            with enter():
                found[name] = {"logits": call()}
        case = f"{self.subject.name}-{what.replace(' ', '-')}-s{lengths['s']}-{self.dtype}"
        # Two ways to the same numbers each.
        pairs = {ZERO: (found[ZERO], found[UNPATCHED]), LIVE: (found[LIVE], found["by hand"])}
        self._refuse_wrong(case, {**pairs, MIMIC: (found[MIMIC], found[PUBLISHED])}, around, refused)
        return self._rows(dict.fromkeys(around, call), around, case, what, memory, **lengths)

    def _refuse_wrong(
        self,
        case: str,
        pairs: Mapping[str, tuple[dict[str, Tensor], dict[str, Tensor]]],
        around: dict[str, Around],
        refused: list[BenchmarkError],
    ) -> None:
        for name, (found, wanted) in pairs.items():
            differences = {key: error(found[key], x.double()).largest for key, x in wanted.items()}
            try:
                refuse(name, case, differences, 0.0 if name == ZERO else LIMITS[self.dtype])
            except BenchmarkError as problem:
                refused.append(problem)
                del around[name]

    def _rows(
        self,
        calls: Mapping[str, Call],
        around: Mapping[str, Around],
        case: str,
        what: str,
        memory: bool = True,
        **lengths: int,
    ) -> list[Row]:
        facts: dict[str, Any] = {
            "case": case,
            "model": self.subject.name,
            "dtype": self.dtype,
            "mask": "causal",
            "what": what,
        }
        facts |= {"bench": "patch", **self._sizes, **lengths}
        return [
            Row(**row, **self._backend(row["contestant"], lengths["t"], lengths["s"]))
            for row in timed_rows(calls, self.device, self.effort, around, memory, **facts)
        ]

    def _backend(self, name: str, t: int, s: int) -> dict[str, Any]:
        if not name.startswith(OURS) or name == LIVE:
            return {}
        b, h, g, d = (self._sizes[key] for key in "bhgd")
        like: dict[str, Any] = {"dtype": DTYPES[self.dtype], "device": self.device}
        q, k = torch.empty(b, h, t, d, **like), torch.empty(b, g, s, d, **like)
        chosen = mc.ops.resolve_backend(q, k, k)
        return {"backend": chosen.name, "why": chosen.why}


def _live_in_fp64(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    return published_live(x.double(), vector.double(), scale.double()).to(x.dtype)


@contextmanager
def _nested(outer: Around, inner: Around) -> Iterator[None]:
    with outer(), inner():
        yield
