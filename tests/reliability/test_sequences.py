"""Random sequences of everything that can be done with a patched model. See `tests/support/sequences.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from transformers.modeling_utils import AttentionInterface

from mimic_core.types import TOKEN_SITES
from tests.support.cases import HEADS, SITE_OF_HEAD, UNLIMITED_HEADS
from tests.support.sequence_models import (
    FAMILIES,
    FUNCTIONS,
    SITES_OF,
    UNWRAPPED,
    Interrupt,
    Put,
    take_out,
    ways,
)
from tests.support.sequences import World

pytestmark = pytest.mark.newest

indices = st.integers(0, 5)
parts = st.sampled_from(["whole", "inner", "base"])
some_layers = st.sampled_from([None, (0,), (1,), (0, 2)])
tokens = st.sampled_from([None, None, "prompt", "prompt_end", ("first", 2), ("first", 1, "last", 2), "generated"])
rarely = st.sampled_from([False, False, False, True])
errors = st.sampled_from([ValueError, Interrupt])


def machine(family: str, by_chance: bool) -> type[RuleBasedStateMachine]:
    """The rules over one model family. Each family has sequences of its own, the same at each run or by chance."""
    runs = st.sampled_from(ways(family))

    class Sequences(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            # hypothesis holds the model of a sequence that failed. Each shorter one would then fail for that reason.
            if AttentionInterface.get_interface is not UNWRAPPED:
                gc.collect()
            self.world, self.failed = World(family), True
            assume(AttentionInterface.get_interface is UNWRAPPED)
            self.failed = False

        def do(self, operation: Callable[..., None], *arguments: Any) -> None:
            self.failed = True
            operation(self.world, *arguments)
            self.failed = False

        @rule(
            head=st.sampled_from([head for head in HEADS if head not in UNLIMITED_HEADS]),
            seed=st.integers(0, 2),
            part=parts,
            threaded=rarely,
            positions=tokens,
            beside=st.sampled_from([None, "before", "after"]),
            name=st.sampled_from(["double", "add one"]),
        )
        def patch(
            self, head: str, seed: int, part: str, threaded: bool, positions: Any, beside: str | None, name: str
        ) -> None:
            """A stack, perhaps with a hook at its site: the result shows which of them was first."""
            hook = Put("hook", name, (SITE_OF_HEAD[head],))
            if beside == "before":
                self.do(World.put, hook, part, threaded)
            self.do(World.put, Put("stack", head, seed=seed, positions=positions), part, threaded)
            if beside == "after":
                self.do(World.put, hook, part, threaded)
            self.do(World.glance)

        @rule(
            names=st.lists(st.sampled_from(list(FUNCTIONS)), min_size=1, max_size=3),
            site=indices,
            layers=some_layers,
            part=parts,
            threaded=rarely,
            positions=tokens,
        )
        def hook(self, names: list[str], site: int, layers: Any, part: str, threaded: bool, positions: Any) -> None:
            for name in names:
                sites = SITES_OF[name]
                chosen = sites[site % len(sites)]
                limited = positions if chosen in TOKEN_SITES else None
                self.do(World.put, Put("hook", name, (chosen,), layers, positions=limited), part, threaded)
            self.do(World.glance)

        @rule(
            sites=st.sets(st.sampled_from(SITES_OF["read"]), min_size=1, max_size=3),
            layers=some_layers,
            seed=indices,
            how=runs,
            stays=rarely,
        )
        def capture(self, sites: set[str], layers: Any, seed: int, how: str, stays: bool) -> None:
            self.do(World.put, Put("capture", "", tuple(sorted(sites)), layers, seed), "whole", False)
            if not stays and not self.world.out_of_place:
                self.do(World.check, how)
                self.do(World.remove, -1, False)

        @precondition(lambda self: self.world.active)
        @rule(index=indices, threaded=rarely)
        def remove(self, index: int, threaded: bool) -> None:
            self.do(World.remove, index, threaded)
            self.do(World.glance)
            if not self.world.active:
                self.do(World.check_nothing_left)

        @precondition(lambda self: self.world.active)
        @rule(index=indices)
        def switch_off(self, index: int) -> None:
            self.do(World.switch_off, index)
            self.do(World.glance)

        @precondition(lambda self: any(one.off for one in self.world.active))
        @rule(index=indices)
        def switch_on(self, index: int) -> None:
            self.do(World.switch_on, index)
            self.do(World.glance)

        @precondition(lambda self: self.world.active)
        @rule(index=indices)
        def end_by_an_error(self, index: int) -> None:
            self.do(World.switched_off_by_an_error, index)
            self.do(World.glance)

        @precondition(lambda self: self.world.active)
        @rule(index=indices)
        def switch_off_in_a_thread(self, index: int) -> None:
            self.do(World.switched_off_in_a_thread, index)
            self.do(World.glance)

        @precondition(lambda self: self.world.active)
        @rule(index=indices, removes=rarely)
        def touch_in_a_run(self, index: int, removes: bool) -> None:
            self.do(World.touched_in_a_run, index, removes)
            self.do(World.glance)

        @precondition(lambda self: self.world.active)
        @rule(
            index=indices, how=st.sampled_from(["forward", "other forward", "forward of the base model"]), seed=indices
        )
        def given(self, index: int, how: str, seed: int) -> None:
            self.do(World.given, index, how, seed)
            self.do(World.glance)

        @rule(how=runs, threaded=rarely)
        def run(self, how: str, threaded: bool) -> None:
            self.do(World.check, how, threaded)

        @rule()
        def run_two_threads(self) -> None:
            self.do(World.check_two_threads)

        @rule(
            how=runs,
            place=st.sampled_from(["begin", "end", "layer", "head", "query", "attn_heads", "mlp_out", "layer_out"]),
            error=errors,
            after=st.integers(0, 2),
            threaded=rarely,
        )
        def interrupt(self, how: str, place: str, error: type[BaseException], after: int, threaded: bool) -> None:
            self.do(World.interrupted, how, place, error, after, threaded)
            self.do(World.glance)

        @precondition(lambda self: not any(one.what.kind == "capture" for one in self.world.active))
        @rule(how=st.sampled_from(["forward", "forward of the base model"]))
        def compile(self, how: str) -> None:
            self.do(World.compiled, how)

        @rule(how=runs)
        def nest(self, how: str) -> None:
            self.do(World.nested, how)

        @precondition(lambda self: self.world.active)
        @rule(index=indices)
        def remove_inside(self, index: int) -> None:
            self.do(World.removed_inside, index)
            self.do(World.glance)

        @precondition(lambda self: self.world.active)
        @rule(how=runs, pickled=rarely)
        def copy(self, how: str, pickled: bool) -> None:
            self.do(World.copied, how, pickled)

        @precondition(lambda self: len(self.world.history) < 3)
        @rule(dtype=st.sampled_from(["half", "bfloat16", "float", "double"]))
        def to_dtype(self, dtype: str) -> None:
            self.do(World.change, dtype)

        @precondition(lambda self: len(self.world.history) < 3)
        @rule(how=st.sampled_from(["checkpointing", "reentrant checkpointing", "no checkpointing"]))
        def checkpointing(self, how: str) -> None:
            self.do(World.change, how)

        @precondition(lambda self: len(self.world.history) < 4)
        @rule()
        def lora(self) -> None:
            self.do(World.change, "no LoRA" if self.world.has_lora else "LoRA")

        def teardown(self) -> None:
            for one in self.world.active if self.failed else ():
                take_out(one.handle)  # the error that is being raised holds what the frames hold
            if not self.failed:
                self.world.close()

    return Sequences if by_chance else seed(crc32(family.encode()))(Sequences)


def run_sequences(family: str, count: int, steps: int, by_chance: bool = False) -> None:
    chosen = settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    gc.collect()
    gc.freeze()
    try:
        run_state_machine_as_test(machine(family, by_chance), settings=chosen)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("family", ["idefics2", "llama", "opt", "gpt_oss", "gemma2"])
def test_sequences(family: str, no_shape_checks: None) -> None:
    run_sequences(family, count=20, steps=8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_thousand_sequences(family: str, no_shape_checks: None) -> None:
    run_sequences(family, count=1000, steps=10, by_chance=True)
