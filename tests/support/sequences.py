"""A model under random operations, and what each operation should give.

`World` is one model with what is in it. Every operation compares the model with another one of its own kind, which gets
the edits that should act from torch's own hooks: see `tests/support/sequence_oracle.py`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import mimic_core as mc
from mimic_core import optimizers
from tests.support.sequence_models import (
    UNWRAPPED,
    Active,
    Put,
    change_model,
    check_as_it_was,
    check_refused,
    difference,
    edited_sites,
    held,
    here,
    in_thread,
    inner_of,
    inputs_of,
    layers_of,
    off_and_on,
    pristine,
    put,
    run,
    same,
    stack,
    take_out,
)
from tests.support.sequence_oracle import by_torch, check_close, expected, reads_lse
from tests.support.snapshot import left_in


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
        return inner_of(self.outer)

    @property
    def has_lora(self) -> bool:
        return hasattr(self.outer, "get_base_model")

    @property
    def acting(self) -> list[Active]:
        return [one for one in self.active if not one.off]

    @property
    def fc2(self) -> Any:
        return getattr(layers_of(self.outer, self.family)[0][1], "fc2", None)

    @property
    def out_of_place(self) -> bool:
        """Whether an edit is at a module that PEFT has replaced. Then each forward is refused."""
        return any(one.stands is not None and one.stands is not self.fc2 for one in self.active)

    @property
    def is_usual(self) -> bool:
        """Whether all edits act at their places, and nothing is captured."""
        captures = any(one.what.kind == "capture" for one in self.active)
        return len(self.acting) == len(self.active) and not self.out_of_place and not captures

    # What is put in and taken out.

    def part(self, name: str) -> Any:
        """The model by one of its names."""
        return {"whole": self.outer, "inner": self.inner, "base": self.inner.base_model}[name]

    def put(self, what: Put, part: str, threaded: bool) -> None:
        model = self.part(part)
        if self.out_of_place:  # the model is run once, to find its sites
            check_refused(model)
            return

        def work() -> Active:
            if what.kind != "stack":
                return Active(what, put(model, what), None)
            shifts = stack(self.family, what)
            return Active(what, mc.patch(model, shifts), shifts)

        one = in_thread(work) if threaded and what.kind != "capture" else work()
        if "mlp_out" in edited_sites(what) and (what.layers is None or 1 in what.layers):
            one.stands = self.fc2
        self.active.append(one)
        if one.shifts is not None:
            check_refused(self.inner, one.shifts)  # it is in it already

    def remove(self, index: int, threaded: bool) -> None:
        one = self.active.pop(index % len(self.active))
        (in_thread if threaded else here)(lambda: take_out(one.handle))
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

    def switched_off_by_an_error(self, index: int) -> None:
        """`disabled()` ends with an error: the edits act again."""
        one = self.active[index % len(self.active)]
        if one.what.kind == "capture":
            return
        with contextlib.suppress(ZeroDivisionError), one.handle.disabled():
            raise ZeroDivisionError

    def switched_off_in_a_thread(self, index: int) -> None:
        """Another thread runs the model without one of the edits. This one is refused meanwhile."""
        one = self.active[index % len(self.active)]
        if one.what.kind == "capture" or len(self.acting) < len(self.active) or self.out_of_place:
            return
        others = [o for o in self.active if o is not one and o.what.kind != "capture"]
        found: list[Any] = []

        def work() -> None:
            with one.handle.disabled():
                found.append(run(self.outer, self.family, "forward", []))
                barrier.wait(timeout=60)
                barrier.wait(timeout=60)

        barrier = threading.Barrier(2)
        thread = threading.Thread(target=work)
        thread.start()
        barrier.wait(timeout=60)
        here = run(self.outer, self.family, "forward", [])
        barrier.wait(timeout=60)
        thread.join(timeout=60)
        assert here == ("refused", "PatchStateError"), "a thread ran without an edit that another one has switched off"
        self.compare(found[0], others, "forward")

    def touched_in_a_run(self, index: int, removes: bool) -> None:
        """While another thread is inside a forward, an edit is switched off or removed.

        Off is refused. After a removal, the forward is refused too, or all of that edit has run before.
        """
        one, before = self.active[index % len(self.active)], list(self.active)
        if not self.is_usual:
            return
        inside, done, found = threading.Event(), threading.Event(), []

        def wait(value: Tensor, at: mc.At) -> None:
            inside.set()
            assert done.wait(timeout=60)

        with mc.hook(self.inner, "mlp_out", wait, layers=[1]):
            thread = threading.Thread(target=lambda: found.append(run(self.outer, self.family, "forward", [])))
            thread.start()
            while not inside.wait(timeout=0.01) and thread.is_alive():
                pass
            refused = False
            if removes:
                self.remove(self.active.index(one), threaded=False)
            elif inside.is_set():
                try:
                    off_and_on(one.handle)
                except mc.PatchStateError:
                    refused = True
            done.set()
            thread.join(timeout=60)
        if not inside.is_set():  # an edit before it was refused
            return
        if removes:
            self.compare_unless_refused(found[0], before)
        else:
            assert refused, "an edit was switched off in the middle of a forward of another thread"
            self.compare(found[0], self.active, "forward")

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
        if used or self.out_of_place or (threaded and len(acting) < len(self.active)):
            wanted = ("refused", "PatchStateError")
        stacks = [one.shifts for one in acting if one.shifts is not None]
        work = lambda: run(self.outer, self.family, how, stacks)  # noqa: E731
        found = (in_thread if threaded else here)(work)
        assert same(found, wanted), f"{how}: {difference(found, wanted)}"
        if wanted[0] == "gives" and not threaded:
            assert same(tuple(held(one.handle) for one in captures), wanted_held), f"{how}: other values were captured"

    def compare(self, found: Any, edits: list[Active], how: str) -> None:
        """Compare what was found in a forward with what it gives with these edits."""
        wanted = expected(self.family, self.history, tuple(one.what for one in edits), how)[0]
        assert same(found, wanted), f"{how}: {difference(found, wanted)}"

    def compare_unless_refused(self, found: Any, edits: list[Active]) -> None:
        """A forward whose edits have changed meanwhile is as they were when it began, or it is refused."""
        if found != ("refused", "PatchStateError"):
            self.compare(found, edits, "forward")

    def glance(self) -> None:
        """One forward after each operation. A capture would hold it, so then it runs in another thread."""
        self.check("forward", threaded=any(one.what.kind == "capture" for one in self.active))

    def compiled(self, how: str) -> None:
        """The MLP of a layer is compiled for one run: the same bits, but for what torch compiles in place of an op."""
        layer = layers_of(self.outer, self.family)[0][1]
        module = getattr(layer, "mlp", None) or layer.fc2
        module.compile(backend="eager", dynamic=False)
        try:
            found = run(self.outer, self.family, how, [])
        finally:
            del module._compiled_call_impl
            torch._dynamo.reset()
        if self.out_of_place:
            assert found == ("refused", "PatchStateError")
        elif any(one.what.kind == "stack" and "mlp_out" in edited_sites(one.what) for one in self.acting):
            wanted = expected(self.family, self.history, tuple(one.what for one in self.acting), how)[0]
            check_close(self.family, self.history, how, found, wanted)
        else:
            self.compare(found, self.acting, how)

    def given(self, index: int, how: str, seed: int) -> None:
        """The caller names the tokens of one edit."""
        edits = [one for one in self.acting if one.what.kind != "capture"]
        if not edits or len(edits) < len(self.active) or self.out_of_place:
            return
        chosen = edits[index % len(edits)]
        shape = inputs_of(self.family, other="other" in how)["attention_mask"].shape
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        with chosen.handle.at(positions=mask):
            found = run(self.outer, self.family, how, [])
        whats = tuple(one.what for one in edits)
        if any(map(reads_lse, whats)):
            return
        wanted = by_torch(self.family, self.history, whats, how, (edits.index(chosen), mask))[0]
        assert same(found, wanted), f"{how}, tokens of the caller: {difference(found, wanted)}"

    def check_two_threads(self) -> None:
        """Two forwards at the same time."""
        edits = [one for one in self.active if one.what.kind != "capture"]
        if len(self.acting) < len(self.active) or self.inner.training or self.out_of_place:
            return  # dropout draws from one state
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
        for one in found:
            self.compare(one, edits, "forward")

    def interrupted(self, how: str, place: str, error: type[BaseException], after: int, threaded: bool) -> None:
        """An error in the middle of a run, raised by a hook of ours or of torch."""
        calls = [0]

        def fail(*args: Any) -> None:
            calls[0] += 1
            if calls[0] > after:
                raise error("planted")

        place = "begin" if self.out_of_place else place
        places = {
            "begin": lambda: self.inner.register_forward_pre_hook(fail),
            "end": lambda: self.inner.register_forward_hook(fail),
            "layer": lambda: layers_of(self.outer, self.family)[0][1].register_forward_pre_hook(fail),
            "head": lambda: self.inner.get_output_embeddings().register_forward_hook(fail),
        }
        made = places[place]() if place in places else mc.hook(self.inner, place, fail, layers=[1])
        try:
            (in_thread if threaded else here)(lambda: run(self.outer, self.family, how, []))
        except error as raised:
            assert str(raised) == "planted"  # noqa: PT017 - it may also be refused before it gets there
        finally:
            made.remove()
        for one in self.active:  # no forward is left open, which would forbid this
            if one.what.kind != "capture" and not one.off:
                in_thread(partial(off_and_on, one.handle))

    def nested(self, how: str) -> None:
        """A forward on other tokens inside a forward, from a hook."""
        odd = self.out_of_place or self.history[-1:] == ("reentrant checkpointing",)
        odd = odd or (self.inner.training and self.family == "opt")  # its dropout draws from one state
        if odd or any(one.what.kind == "capture" for one in self.active):
            return
        inside: list[Any] = []

        def again(value: Tensor, at: mc.At) -> None:
            if not inside:
                inside.append(None)
                inside.append(run(self.outer, self.family, "other forward", []))

        with mc.hook(self.inner, "mlp_out", again, layers=[1]):
            found = run(self.outer, self.family, how, [one.shifts for one in self.acting if one.shifts is not None])
        if inside:  # nothing was refused before it
            self.compare(found, self.acting, how)
            self.compare(inside[1], self.acting, "other forward")

    def removed_inside(self, index: int) -> None:
        """An edit is removed in the middle of a forward, from a hook."""
        if self.out_of_place:
            return
        before, usual = list(self.active), self.is_usual
        one = self.active.pop(index % len(self.active))
        with mc.hook(self.inner, "mlp_out", lambda value, at: take_out(one.handle), layers=[1]):
            found = run(self.outer, self.family, "forward", [])
        if usual:
            self.compare_unless_refused(found, before)
        take_out(one.handle)
        for context in one.off:
            context.close()
        self.gone += [weakref.ref(x) for x in (one.shifts, one.handle) if x is not None]

    def copied(self, how: str, pickled: bool) -> None:
        """A copy has all edits, also those that are off, until its handles are removed."""
        if any(one.what.kind == "capture" for one in self.active) or self.out_of_place:
            return
        try:
            twin = pickle.loads(pickle.dumps(self.outer)) if pickled else copy.deepcopy(self.outer)
        except AttributeError:  # transformers' own hooks that can't be pickled
            return
        inner = twin.get_base_model() if self.has_lora else twin
        handles = mc.handles(inner)
        assert len(handles) == len(self.active)
        how = "forward" if how == "backward" else how
        self.compare(run(twin, self.family, how, []), self.active, how)
        for handle in handles:
            handle.remove()
        assert mc.handles(inner) == []
        self.compare(run(twin, self.family, "forward", []), [], "forward")
        assert not left_in(inner)

    def change(self, change: str) -> None:
        """What users do to a model beside patching it."""
        if (self.family, change) == ("gpt_oss", "double"):  # torch has no kernel for its experts
            return
        self.outer = change_model(self.outer, change)
        self.history += (change,)

    # What is left.

    def check_nothing_left(self) -> None:
        """The model without edits is a model that was never patched."""
        assert not self.active
        assert mc.handles(self.inner) == []
        if self._still_held():  # perhaps by a cycle; searched for only then, because it takes longer than a sequence
            gc.collect()
        assert self._still_held() == [], "a removed stack or handle is still held"
        self.gone = []
        assert AttentionInterface.get_interface is UNWRAPPED
        assert optimizers._hook is None
        assert not left_in(self.inner)
        check_as_it_was(self.family, self.history, self.inner)
        for how in ("forward", "backward"):
            self.check(how)

    def _still_held(self) -> list[Any]:
        odd = [AttentionInterface.get_interface] if AttentionInterface.get_interface is not UNWRAPPED else []
        return odd + [ref() for ref in self.gone if ref() is not None]

    def close(self) -> None:
        while self.active:
            self.remove(0, threaded=False)
        self.check_nothing_left()
