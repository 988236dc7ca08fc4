"""The smallest form of what random sequences have found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from tests.support.cases import BY_NAME, fresh_model
from tests.zoo.tiny import tiny


def test_a_forward_inside_a_forward_has_prompts_of_its_own() -> None:
    """A hook that ran the model on other padding gave the prompt ends of that padding to the layers after it."""
    case = BY_NAME["llama"]
    model, inputs = fresh_model(case), case.inputs("left")
    found: list[Tensor] = []

    def run_inside(value: Tensor, at: mc.At) -> None:
        if len(found) == 1 and at.layer == 0:
            found.append(at.prompt_end)
            model(**case.inputs("right"))

    def read(value: Tensor, at: mc.At) -> None:
        found.append(at.prompt_end)

    with torch.no_grad(), mc.hook(model, "layer_out", read, layers=[1]):
        model(**inputs)
        with mc.hook(model, "mlp_out", run_inside, layers=[0]):
            model(**inputs)
    alone, before, inside, after = found
    assert torch.equal(alone, before)
    assert not torch.equal(inside, alone)
    assert torch.equal(after, alone)


def test_a_forward_that_never_began_leaves_the_next_ones_alone() -> None:
    """A cache that can't tell its length raises before the decoder begins."""

    class Broken:
        def get_seq_length(self) -> int:
            raise RuntimeError("no length")

    case = BY_NAME["llama"]
    model, inputs = fresh_model(case), case.inputs()
    with mc.patch(model, mc.build_shifts(model, "live")) as handle, mc.hook(model, "mlp_out", lambda value, at: None):
        with pytest.raises(RuntimeError, match="no length"):
            model.model(**inputs, other_cache=Broken())
        with mc.capture(model, "mlp_out") as seen:
            model(**inputs)
        assert len(seen.states) == 3
        assert not handle._installation.in_forward
        assert not any(one._installation.in_forward for one in mc.handles(model))


@pytest.mark.parametrize("site", ["query", "layer_out"])
def test_the_small_forward_that_finds_sites_runs_no_edits(site: Any) -> None:
    """A capture held its four tokens, and a hook was called with them."""
    made, calls = tiny("gpt_neox"), []
    model: Any = made.model
    with mc.hook(model, site, lambda value, at: calls.append(at.layer)), mc.capture(model, site) as seen:
        mc.build_shifts(model.gpt_neox, "live")  # another object than the model, so its sites are found anew
        assert calls == []
        with torch.no_grad():
            model(**made.inputs())
    assert calls == list(range(4))
    assert seen.states[0].shape[:1] == (2,)


def test_a_copy_has_what_was_put_into_the_whole_model_and_into_its_base() -> None:
    """The copy of one of two edits began at a layer, where the copy of the other one took it for a layer alone."""
    case = BY_NAME["llama"]
    model: Any = fresh_model(case)
    with torch.no_grad(), mc.hook(model, "layer_out", lambda value, at: value * 2):
        with mc.hook(model.model, "layer_out", lambda value, at: value + 1):
            wanted, twin = model(**case.inputs()).logits, copy.deepcopy(model)
    assert len(mc.handles(twin)) == 2
    with torch.no_grad():
        assert torch.equal(twin(**case.inputs()).logits, wanted)
