"""A thousand times the same: what is put into a model and taken out again leaves no object and no memory."""

from __future__ import annotations

import ctypes
import gc
import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from tests.support.cases import fresh_model, logits_of, random_shifts
from tests.support.compilable import SHALLOW, text

WARM, TIMES, WINDOW = 50, 200, 30
"""Before anything is counted; while objects and resident memory are counted; in each of five traced windows."""
Work = Callable[[], None]


def _patch(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    shifts = random_shifts(model, "mimic-and-mlp")

    def work() -> None:
        with mc.patch(model, shifts):
            logits_of(model, inputs)

    return work


def _patch_new_stack(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    def work() -> None:
        handle = mc.patch(model, mc.build_shifts(model, "mimic"))
        with handle.disabled():
            pass
        handle.remove()

    return work


def _hook(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    def work() -> None:
        with mc.hook(model, "attn_heads", lambda value, at: value * at.prompt_end[..., None, None]):
            logits_of(model, inputs)

    return work


def _capture(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    where = inputs["attention_mask"].bool()

    def work() -> None:
        with mc.capture(model, ["query", "lse", "layer_out"], where=where) as seen:
            logits_of(model, inputs)
        assert len(seen["lse"]) == 1

    return work


def _load(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    mc.save_shifts(random_shifts(model, "live"), folder)

    def work() -> None:
        mc.load_shifts(folder, model)

    return work


def _error(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    shifts = random_shifts(model, "live")

    def fail(value: Tensor, at: mc.At) -> None:
        raise ValueError("planted")

    def work() -> None:
        with pytest.raises(ValueError, match="planted"), mc.patch(model, shifts):
            with mc.hook(model, "query", fail, layers=[0]):
                logits_of(model, inputs)

    return work


def _all(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Work:
    """The others around one forward, and an error and a loaded stack now and then."""
    shifts, times = random_shifts(model, "mimic"), itertools.count()
    more = [_load(model, inputs, folder), _patch_new_stack(model, inputs, folder), _error(model, inputs, folder)]

    def work() -> None:
        with mc.patch(model, shifts), mc.hook(model, "mlp_out", lambda value, at: value * 0.5):
            with mc.capture(model, ["query", "layer_out"]):
                logits_of(model, inputs)
        if next(times) % 10 == 0:
            for one in more:
                one()

    return work


WORKS = {
    "all": _all,
    "patch": _patch,
    "patch a new stack": _patch_new_stack,
    "hook": _hook,
    "capture": _capture,
    "load": _load,
    "error": _error,
}


def resident() -> int:
    """The memory of this process that is not shared with files, in bytes, after what malloc keeps was given back."""
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def objects() -> Counter[type]:
    gc.collect()
    return Counter(map(type, gc.get_objects()))


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=() if name == "all" else pytest.mark.exhaustive) for name in WORKS]
)
def test_hundreds_of_times_leave_nothing(
    what: str, tmp_path: Path, no_shape_checks: None, functions_made_in_functions_unchecked: None
) -> None:
    model, inputs = fresh_model(SHALLOW), text(4, batch=1) | {"attention_mask": torch.ones(1, 4, dtype=torch.long)}
    work = WORKS[what](model, inputs, tmp_path)

    def repeat(times: int) -> None:
        for _ in range(times):
            work()
        gc.collect()

    gc.collect()
    gc.freeze()  # what there was before is not counted, nor searched
    try:
        with torch.no_grad():
            first = resident()
            repeat(WARM)
            objects()
            before, held = objects(), resident()
            repeat(TIMES)
            after, now = objects(), resident()
            tracemalloc.start()
            try:
                grown = []
                for _ in range(5):
                    traced = tracemalloc.get_traced_memory()[0]
                    repeat(WINDOW)
                    grown.append(tracemalloc.get_traced_memory()[0] - traced)
            finally:
                tracemalloc.stop()
    finally:
        gc.unfreeze()
    # An object for each time would be hundreds of its kind.
    more = {kind.__name__: n for kind, n in (after - before).items() if n > 20}
    assert not more, f"more objects after {TIMES} times: {more}"
    # A leak grows in every window, the interpreter's caches and the resizing of a dict do not. This is for what the
    # garbage collector does not count: strings, numbers, tensors.
    assert min(grown) < 100 * WINDOW, f"{grown} bytes more in windows of {WINDOW} times"
    # The warm-up reaches what the allocator keeps. Afterwards there is no growth beyond that.
    bound = max(held - first, 2**20)
    assert now - held < bound, f"{now - held} bytes more of resident memory, {bound} were allowed"
