"""Random sequences of everything that can be done with a patched model. See `tests/support/sequences.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.support.cases import HEADS
from tests.support.sequence_models import FAMILIES, FUNCTIONS, SITES_OF, Interrupt, Put, take_out, ways
from tests.support.sequences import World

pytestmark = pytest.mark.newest

indices = st.integers(0, 5)
parts = st.sampled_from(["whole", "inner", "base"])
some_layers = st.sampled_from([None, (0,), (1,), (0, 2)])
rarely = st.sampled_from([False, False, False, True])
errors = st.sampled_from([ValueError, Interrupt])


def machine(family: str) -> type[RuleBasedStateMachine]:
    """The rules over one model family."""
    runs = st.sampled_from(ways(family))

    class Sequences(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.world, self.failed = World(family), False

        def do(self, operation: Callable[..., None], *arguments: Any) -> None:
            self.failed = True
            operation(self.world, *arguments)
            self.failed = False

        @rule(head=st.sampled_from(list(HEADS)), seed=st.integers(0, 2), part=parts, threaded=rarely)
        def patch(self, head: str, seed: int, part: str, threaded: bool) -> None:
            self.do(World.put, Put("stack", head, seed=seed), part, threaded)

        @rule(name=st.sampled_from(list(FUNCTIONS)), site=indices, layers=some_layers, part=parts, threaded=rarely)
        def hook(self, name: str, site: int, layers: Any, part: str, threaded: bool) -> None:
            sites = SITES_OF[name]
            self.do(World.put, Put("hook", name, (sites[site % len(sites)],), layers), part, threaded)

        @rule(
            sites=st.sets(st.sampled_from(SITES_OF["read"]), min_size=1, max_size=3), layers=some_layers, seed=indices
        )
        def capture(self, sites: set[str], layers: Any, seed: int) -> None:
            self.do(World.put, Put("capture", "", tuple(sorted(sites)), layers, seed), "whole", False)

        @precondition(lambda self: self.world.active)
        @rule(index=indices, threaded=rarely)
        def remove(self, index: int, threaded: bool) -> None:
            self.do(World.remove, index, threaded)
            if not self.world.active:
                self.do(World.check_nothing_left)

        @precondition(lambda self: self.world.active)
        @rule(index=indices)
        def switch_off(self, index: int) -> None:
            self.do(World.switch_off, index)

        @precondition(lambda self: any(one.off for one in self.world.active))
        @rule(index=indices)
        def switch_on(self, index: int) -> None:
            self.do(World.switch_on, index)

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

        @rule(how=runs)
        def nest(self, how: str) -> None:
            self.do(World.nested, how)

        @precondition(lambda self: self.world.active)
        @rule(index=indices)
        def remove_inside(self, index: int) -> None:
            self.do(World.removed_inside, index)

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

    return Sequences


def run_sequences(family: str, count: int, steps: int, by_chance: bool = False) -> None:
    chosen = settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=not by_chance,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    gc.collect()
    gc.freeze()
    try:
        run_state_machine_as_test(machine(family), settings=chosen)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("family", ["idefics2", "llama", "opt", "gpt_oss", "gemma2"])
def test_sequences(family: str, no_shape_checks: None) -> None:
    run_sequences(family, count=5, steps=6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_thousand_sequences(family: str, no_shape_checks: None) -> None:
    run_sequences(family, count=1000, steps=10, by_chance=True)
