"""The conformance kit on a broken library: each law is broken once, to see that it can fail and that others don't."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from torch import Tensor

import mimic_core as mc
from mimic_core.checkpoint import files
from mimic_core.edits.call import AttentionCall
from mimic_core.edits.entry import Entry
from mimic_core.edits.install import Installation
from mimic_core.edits.outputs import EditedForward
from mimic_core.heads import LIVEHead, MimICHead
from mimic_core.types import Located
from tests.support.cases import fresh_model
from tests.support.conformance import LAWS, LLAMA, SITES, failed, report_of

pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
Break = pytest.MonkeyPatch


IDLE: list[tuple[set[str], set[str]]] = [
    ({"query"}, {"query"}),
    ({"mlp_out"}, {"mlp_out", "LIVE"}),
    (set(SITES), {*SITES, "MimIC", "LIVE"}),
]


@pytest.mark.parametrize(("sites", "expected"), IDLE, ids=["query", "mlp_out", "all"])
def test_an_edit_that_does_nothing_in_one_layer(sites: set[str], expected: set[str], monkeypatch: Break) -> None:
    apply = Entry.apply

    def idle(self: Entry, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        edited = apply(self, value, *args, **kwargs)
        return value if self.edit.site in sites and self.edit.layer == 1 else edited

    monkeypatch.setattr(Entry, "apply", idle)
    monkeypatch.setattr(Entry, "is_addition_alone", False)  # LIVE's fast path does not call `apply`
    report = report_of(LLAMA, "eager")
    assert failed(report) == expected
    assert all("it differs from the oracle" in report[site].detail for site in sites)


def test_an_edit_that_the_model_does_not_heed() -> None:
    """The library and the oracle agree, as both edit what is thrown away."""
    model = fresh_model(LLAMA)
    for name in ("q_proj", "k_proj"):
        getattr(model.model.layers[1].self_attn, name).weight.data.zero_()
    report = report_of(LLAMA, model=model)
    assert report["query"].detail == "an edit at layer 1 alone changes no logit"
    assert {"query", "key"} <= failed(report)


def wrong_lse(monkeypatch: Break) -> None:
    right: Any = AttentionCall.lse
    monkeypatch.setattr(AttentionCall, "lse", property(lambda self: right.fget(self) + 0.05))


def wrong_mimic(monkeypatch: Break) -> None:
    right = MimICHead.forward
    monkeypatch.setattr(MimICHead, "forward", lambda self, value, at: value + 1.001 * (right(self, value, at) - value))


def wrong_live(monkeypatch: Break) -> None:
    monkeypatch.setattr(LIVEHead, "forward", lambda self, value, at: value + self.scale * self.vector)


def wrong_live_gradient(monkeypatch: Break) -> None:
    right = LIVEHead.forward

    def forward(self: LIVEHead, value: Tensor, at: mc.At) -> Tensor:
        return right(self, value, at) + 0 * self.vector.sum() * 2 + 0.01 * (self.scale - self.scale.detach())

    monkeypatch.setattr(LIVEHead, "forward", forward)


def live_where(
    condition: Callable[[LIVEHead, Tensor], bool], change: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    """LIVE, and on a condition something else."""

    def sabotage(monkeypatch: Break) -> None:
        right = LIVEHead.forward

        def forward(self: LIVEHead, value: Tensor, at: mc.At) -> Tensor:
            out = right(self, value, at)
            return change(out) if condition(self, value) else out

        monkeypatch.setattr(LIVEHead, "forward", forward)

    return sabotage


def left_behind(monkeypatch: Break) -> None:
    remove = Installation.remove

    def leave_a_note(self: Installation) -> None:
        for module in self._edited:
            module.__dict__["note"] = "was here"
        remove(self)

    monkeypatch.setattr(Installation, "remove", leave_a_note)


def removed_only_if_complete(monkeypatch: Break) -> None:
    init, remove = Installation.__init__, Installation.remove

    def complete(self: Installation, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.complete = True

    monkeypatch.setattr(Installation, "__init__", complete)
    monkeypatch.setattr(Installation, "remove", lambda self: remove(self) if hasattr(self, "complete") else None)


def removed_only_in_peace(monkeypatch: Break) -> None:
    remove = Installation.remove
    monkeypatch.setattr(Installation, "remove", lambda self: remove(self) if sys.exc_info()[0] is None else None)


def stuck_after_an_exception(monkeypatch: Break) -> None:
    leave = Installation.leave

    def forgetful(self: Installation, raised: bool) -> None:
        leave(self, raised)
        if raised:
            self.model.__dict__["broken"] = True

    monkeypatch.setattr(Installation, "leave", forgetful)


def silent_about_missed_sites(monkeypatch: Break) -> None:
    complain = Installation._complain

    def silent(self: Installation, *args: Any) -> None:
        with suppress(mc.PatchStateError):
            complain(self, *args)

    monkeypatch.setattr(Installation, "_complain", silent)


def touches_the_embedding(monkeypatch: Break) -> None:
    init = Installation.__init__

    def reaches_out(self: Installation, found: Located, *args: Any, **kwargs: Any) -> None:
        init(self, found, *args, **kwargs)
        self._forwards.append(EditedForward.claim(found.model.get_input_embeddings()))

    monkeypatch.setattr(Installation, "__init__", reaches_out)


def saves_halves(monkeypatch: Break) -> None:
    save = files.in_bytes
    monkeypatch.setattr(
        files, "in_bytes", lambda tensors, *a, **k: save({n: x / 2 for n, x in tensors.items()}, *a, **k)
    )


def writes_into_the_config(monkeypatch: Break) -> None:
    init, remove = Installation.__init__, Installation.remove

    def marks(self: Installation, found: Located, *args: Any, **kwargs: Any) -> None:
        init(self, found, *args, **kwargs)
        found.model.config.shifted = True
        self.config = found.model.config

    def unmarks(self: Installation) -> None:
        remove(self)
        vars(getattr(self, "config", self)).pop("shifted", None)

    monkeypatch.setattr(Installation, "__init__", marks)
    monkeypatch.setattr(Installation, "remove", unmarks)


def off_while_recomputing(monkeypatch: Break) -> None:
    apply = Entry.apply

    def forgetful(self: Entry, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return apply(self, value, *args, **kwargs) if self.owner.in_forward else value

    monkeypatch.setattr(Entry, "apply", forgetful)


def is_zero(head: LIVEHead) -> bool:
    return not bool(head.vector.detach().any())


BROKEN: dict[str, tuple[Callable[[Break], None], set[str]]] = {
    "wrong LSE": (wrong_lse, {"lse", "MimIC"}),
    "wrong MimIC": (wrong_mimic, {"MimIC"}),
    "wrong LIVE": (wrong_live, {"LIVE"}),
    "wrong gradient": (wrong_live_gradient, {"LIVE"}),
    "zero vectors round": (
        live_where(lambda head, x: is_zero(head), lambda out: out * (1 + 1e-6)),
        {"zero shift", "zero shift generates", "exception in forward"},
    ),
    "zero vectors round one token": (
        live_where(lambda head, x: is_zero(head) and x.shape[1] == 1, lambda out: out * (1 + 1e-6)),
        {"zero shift generates"},
    ),
    "one token is shifted otherwise": (
        live_where(lambda head, x: not is_zero(head) and x.shape[1] == 1, lambda out: out * 1.1),
        {"cached decoding"},
    ),
    "one sample is shifted otherwise": (
        live_where(lambda head, x: not is_zero(head) and x.shape[0] == 1, lambda out: out * 1.1),
        {"padding"},
    ),
    "left behind": (left_behind, {"removal", "exception in forward", "all or nothing"}),
    "removed only if complete": (removed_only_if_complete, {"all or nothing"}),
    "removed only in peace": (removed_only_in_peace, {"all or nothing", "exception in forward"}),
    "broken by an exception": (stuck_after_an_exception, {"exception in forward"}),
    "silent": (silent_about_missed_sites, {"never reached"}),
    "touches the embedding": (touches_the_embedding, {"decoder only", "all or nothing"}),
    "saves halves": (saves_halves, {"saved and loaded"}),
    "writes into the config": (writes_into_the_config, {"saved and loaded"}),
    "off while recomputing": (off_while_recomputing, {"checkpointing", "checkpointing reentrant"}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_red(how: str, monkeypatch: Break) -> None:
    sabotage, expected = BROKEN[how]
    with monkeypatch.context() as broken:
        sabotage(broken)
        report = report_of(LLAMA, "eager")
    assert failed(report) == expected, str(report)


def test_the_model_is_as_it_was_even_if_no_patch_is_ever_removed(monkeypatch: Break) -> None:
    monkeypatch.setattr(mc.Handle, "remove", lambda self: None)
    assert {"removal", "exception in forward"} < failed(report_of(LLAMA))


def test_every_law_was_seen_to_fail() -> None:
    """By the tests above; a law that is added comes with a way to break it."""
    elsewhere = {"adapter", "forward", "own layer", "coverage", "shapes", *SITES}
    assert set(LAWS) == elsewhere.union(*(red for _, red in BROKEN.values()))
