"""A model under random operations, and what each operation should give: a fresh model with the same edits gives it too.

`World` is one model with what is in it. Every operation compares the model with a model of its own kind that was never
patched before: the edits that should act are put into that one together, and the same is run.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

import mimic_core as mc
from mimic_core import optimizers
from tests.support.sequence_models import (
    UNWRAPPED,
    Put,
    change_model,
    changes,
    difference,
    expected,
    held,
    in_thread,
    plain,
    pristine,
    put,
    run,
    runs_after,
    same,
    stack,
    take_out,
)
from tests.support.snapshot import snapshot


@dataclass(eq=False)
class Active:
    """One edit in the model.

    Attributes:
        handle: A handle or a capture.
        off: The open `disabled()` of it.
    """

    what: Put
    handle: Any
    shifts: mc.ShiftStack | None
    off: list[contextlib.ExitStack] = field(default_factory=list)

    @property
    def is_used_capture(self) -> bool:
        return self.what.kind == "capture" and any(self.handle._taken.values())


class World:
    """A model, what is in it, and what was done to it."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.history: tuple[str, ...] = ()
        self.outer: Any = copy.deepcopy(pristine(family))
        self.active: list[Active] = []
        self.gone: list[weakref.ref[Any]] = []
        self.seed = 0

    @property
    def inner(self) -> Any:
        return self.outer.get_base_model() if self.has_lora else self.outer

    @property
    def has_lora(self) -> bool:
        return hasattr(self.outer, "get_base_model")

    @property
    def acting(self) -> list[Active]:
        return [one for one in self.active if not one.off]

    # What is put in and taken out.

    def part(self, name: str) -> Any:
        """The model by one of its names."""
        return {"whole": self.outer, "inner": self.inner, "base": self.inner.base_model}[name]

    def put(self, what: Put, part: str, threaded: bool) -> None:
        model = self.part(part)

        def work() -> Active:
            if what.kind != "stack":
                return Active(what, put(model, what), None)
            shifts = stack(self.family, what)
            return Active(what, mc.patch(model, shifts), shifts)

        one = in_thread(work) if threaded and what.kind != "capture" else work()
        self.active.append(one)
        if one.shifts is not None:
            try:
                mc.patch(self.inner, one.shifts)
            except mc.PatchStateError:
                return
            raise AssertionError("a stack went into one model twice")

    def remove(self, index: int, threaded: bool) -> None:
        one = self.active.pop(index % len(self.active))
        (in_thread if threaded else _here)(lambda: take_out(one.handle))
        take_out(one.handle)
        for context in one.off:
            context.close()
        self.gone += [weakref.ref(x) for x in (one.shifts, one.handle) if x is not None]

    def switch_off(self, index: int) -> None:
        one = self.active[index % len(self.active)]
        context = contextlib.ExitStack()
        handle = mc.handles(self.inner)[self.active.index(one)] if one.what.kind == "capture" else one.handle
        context.enter_context(handle.disabled())
        one.off.append(context)

    def switch_on(self, index: int) -> None:
        off = [one for one in self.active if one.off]
        if off:
            off[index % len(off)].off.pop().close()

    # What is run.

    def check(self, how: str, threaded: bool = False) -> None:
        """Run the model and compare it with a fresh one."""
        acting = self.acting
        captures = [one for one in acting if one.what.kind == "capture"]
        used = any(one.is_used_capture for one in captures) and not threaded
        seen = acting if not threaded else [one for one in acting if one.what.kind != "capture"]
        wanted, wanted_held = expected(self.family, self.history, tuple(one.what for one in seen), how)
        if used or (threaded and len(acting) < len(self.active)):
            wanted = ("refused", "PatchStateError")
        stacks = [one.shifts for one in acting if one.shifts is not None]
        work = lambda: run(self.outer, self.family, how, stacks)  # noqa: E731
        found = (in_thread if threaded else _here)(work)
        assert same(found, wanted), f"{how}: {difference(found, wanted)}"
        if not used and not threaded:
            assert same(tuple(held(one.handle) for one in captures), wanted_held), f"{how}: other values were captured"

    def check_handles(self) -> None:
        assert len(mc.handles(self.inner)) == len(self.active)

    def check_two_threads(self) -> None:
        """Two forwards at the same time."""
        if len(self.acting) < len(self.active) or self.inner.training:  # dropout draws from one state
            return
        edits = tuple(one.what for one in self.active if one.what.kind != "capture")
        wanted = expected(self.family, self.history, edits, "forward")[0]
        barrier, found = threading.Barrier(2), []

        def work() -> None:
            barrier.wait(timeout=60)
            found.append(run(self.outer, self.family, "forward", []))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(found) == 2
        assert all(same(one, wanted) for one in found), "two threads at the same time"

    def interrupted(self, how: str, place: str, error: type[BaseException], after: int, threaded: bool) -> None:
        """An error in the middle of a run, raised by a hook of ours or of torch."""
        calls = [0]

        def fail(*args: Any) -> None:
            calls[0] += 1
            if calls[0] > after:
                raise error("planted")

        layers = mc.adapter_for(self.inner).spec(self.inner).layers
        places = {
            "begin": lambda: self.inner.register_forward_pre_hook(fail),
            "end": lambda: self.inner.register_forward_hook(fail),
            "layer": lambda: self.inner.get_submodule(layers[1].path).register_forward_pre_hook(fail),
            "head": lambda: self.inner.get_output_embeddings().register_forward_hook(fail),
        }
        made = places[place]() if place in places else mc.hook(self.inner, place, fail, layers=[1])
        try:
            (in_thread if threaded else _here)(lambda: run(self.outer, self.family, how, []))
        except error as raised:
            assert str(raised) == "planted"  # noqa: PT017 - it may also be refused before it gets there
        finally:
            made.remove()

    def nested(self, how: str) -> None:
        """A forward on other tokens inside a forward, from a hook."""
        if any(one.what.kind == "capture" for one in self.active) or self.history[-1:] == ("reentrant checkpointing",):
            return
        edits, inside = tuple(one.what for one in self.acting), []

        def again(value: Tensor, at: mc.At) -> None:
            if not inside:
                inside.append(None)
                inside.append(run(self.outer, self.family, "other forward", []))

        with mc.hook(self.inner, "mlp_out", again, layers=[1]):
            found = run(self.outer, self.family, how, [one.shifts for one in self.acting if one.shifts is not None])
        for name, outcome in ((how, found), ("other forward", inside[1] if inside else None)):
            wanted = expected(self.family, self.history, edits, name)[0]
            assert same(outcome, wanted), f"{name}, nested: {difference(outcome, wanted)}"

    def removed_inside(self, index: int) -> None:
        """An edit is removed in the middle of a forward, from a hook. What the forward gives is not compared."""
        one = self.active.pop(index % len(self.active))
        with mc.hook(self.inner, "mlp_out", lambda value, at: take_out(one.handle), layers=[1]):
            run(self.outer, self.family, "forward", [])
        take_out(one.handle)
        for context in one.off:
            context.close()
        self.gone += [weakref.ref(x) for x in (one.shifts, one.handle) if x is not None]

    def copied(self, how: str, pickled: bool) -> None:
        """A copy has all edits, also those that are off, until its handles are removed."""
        if any(one.what.kind == "capture" for one in self.active):
            return
        try:
            twin = pickle.loads(pickle.dumps(self.outer)) if pickled else copy.deepcopy(self.outer)
        except AttributeError:  # transformers' own hooks that can't be pickled
            return
        inner = twin.get_base_model() if self.has_lora else twin
        handles = mc.handles(inner)
        assert len(handles) == len(self.active)
        wanted = expected(self.family, self.history, tuple(one.what for one in self.active), how)[0]
        if how == "backward":
            how, wanted = (
                "forward",
                expected(self.family, self.history, tuple(o.what for o in self.active), "forward")[0],
            )
        found = run(twin, self.family, how, [])
        assert same(found, wanted), f"a copy, {how}: {difference(found, wanted)}"
        for handle in handles:
            handle.remove()
        assert mc.handles(inner) == []
        wanted = expected(self.family, self.history, (), "forward")[0]
        assert same(run(twin, self.family, "forward", []), wanted), "a copy without its patches"
        assert not left_in(inner)

    def change(self, change: str) -> None:
        """What users do to a model beside patching it."""
        if runs_after(self.family, (*self.history, change)):
            self.outer = change_model(self.outer, change)
            self.history += (change,)

    # What is left.

    def check_nothing_left(self) -> None:
        """The model without edits is a model that was never patched."""
        assert not self.active
        assert mc.handles(self.inner) == []
        gc.collect()
        assert [ref() for ref in self.gone if ref() is not None] == [], "a removed stack or handle is still held"
        self.gone = []
        assert AttentionInterface.get_interface is UNWRAPPED
        assert optimizers._hook is None
        assert not left_in(self.inner)
        apart = changes(snapshot(_inner(plain(self.family, self.history))), snapshot(self.inner))
        assert apart == [], f"the model is not as it was: {str(apart)[:2000]}"
        for how in ("forward", "backward"):
            self.check(how)

    def close(self) -> None:
        while self.active:
            self.remove(0, threaded=False)
        self.check_nothing_left()


def _inner(outer: Any) -> Any:
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


def _here(work: Callable[[], Any]) -> Any:
    return work()


def left_in(model: nn.Module) -> list[str]:
    """Attributes of ours in a model's modules."""
    return [f"{path}.{name}" for path, m in model.named_modules() for name in vars(m) if "mimic" in name]
