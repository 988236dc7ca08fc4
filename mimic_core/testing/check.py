"""Run every law of patching on one model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from ..adapters import Handed, handed_over
from . import laws_decoding, laws_patch, laws_sites, laws_training, laws_values
from .report import Report, Row, Verdict
from .state import as_it_was
from .subject import EDITED_SITES, Decode, Forward, Inputs, Pad, Subject
from .verdicts import DeviceEnded, NotApplicable, Raised, attempt


@dataclass(frozen=True)
class Law:
    """A law of patching.

    Attributes:
        name: The name of its row in a report.
        check: Returns the findings as text. Raises NotApplicable, or any other error if the model breaks the law.
    """

    name: str
    check: Callable[[Subject], str]

    @property
    def says(self) -> str:
        """The law in a sentence."""
        return (self.check.__doc__ or "").strip()

    def __str__(self) -> str:
        return self.name


_ADAPTER = Law("adapter", laws_patch.adapter)
_FORWARD = Law("forward", laws_patch.forward)
LAWS: tuple[Law, ...] = (
    _ADAPTER,
    _FORWARD,
    Law("own layer", laws_sites.own_layer),
    Law("coverage", laws_sites.coverage),
    Law("decoder only", laws_sites.decoder_only),
    Law("shapes", laws_sites.shapes),
    *(Law(site, laws_sites.site_law(site)) for site in EDITED_SITES),
    Law("lse", laws_sites.lse),
    Law("MimIC", laws_values.stack_law("MimIC")),
    Law("LIVE", laws_values.stack_law("LIVE")),
    Law("zero shift", laws_patch.zero_shift),
    Law("zero shift generates", laws_patch.zero_shift_generates),
    Law("removal", laws_patch.removal),
    Law("all or nothing", laws_patch.all_or_nothing),
    Law("exception in forward", laws_patch.exception_in_forward),
    Law("never reached", laws_patch.never_reached),
    Law("saved and loaded", laws_patch.saved_and_loaded),
    Law("cached decoding", laws_decoding.cached_decoding),
    Law("padding", laws_decoding.padding),
    Law("checkpointing", laws_training.checkpointing_non_reentrant),
    Law("checkpointing reentrant", laws_training.checkpointing_reentrant),
)
"""All laws, in the order in which they run."""


def check_adapter(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    name: str | None = None,
    adapter: Handed = None,
    forward: Forward | None = None,
    decode: Decode | None = None,
    pad: Pad | None = None,
) -> Report:
    """Run every law of patching on one model.

        report = mimic_core.testing.check_adapter(model, inputs)
        print(report)
        report.raise_for_failures()

    The model runs on its device, in its dtype, with its attention implementation. A tiny model with random weights
    tests its adapter as well as a large one. Afterwards the model is exactly as before, also if a law fails.

    Args:
        model: The model, as for `mimic_core.patch`.
        inputs: The arguments of its forward, with two samples or more. None means random text.
        name: The name of the model in the report; None means its class.
        adapter: The adapter to check; see `mimic_core.adapter_for`. The model does not keep it.
        forward: Gives the logits of the model on inputs, if its forward does not return them in a usual way.
        decode: Decoding with a cache, if the model has no `generate` of transformers. It gets the model, the inputs of
            a prompt and the tokens [b n] that follow, which it runs one by one. It returns the logits [b n+1 c] after
            the prompt and after each token.
        pad: How samples of different lengths are put into one batch, if not with an `attention_mask`. It gets the
            inputs of each sample and a side, "left" or "right". It returns the inputs of the batch and a bool mask
            [b t] of the tokens that are not padding, or None if there is no such padding.

    Returns:
        A report with a row for each law: passed, failed (with the findings) or not applicable (with the reason). If the
        model or its adapter raises an exception, the law fails.
    """
    subject = Subject(model, inputs, adapter, forward, decode, pad)
    with handed_over(model, adapter):
        return _report(subject, tuple(_row(law, subject) for law in LAWS), name)


def pytest_cases(make: Callable[[], nn.Module | tuple[nn.Module, Inputs | None]], **how: Any) -> Callable[..., None]:
    """Make a pytest test function with one test for each law.

        test_my_vlm = mimic_core.testing.pytest_cases(lambda: (tiny_model(), inputs()))

    The test of a law that is not applicable is skipped.

    Args:
        make: Returns the model, or the model and its inputs. Called once, when the first test runs.
        how: `adapter`, `forward`, `decode` and `pad` of `check_adapter`.
    """
    import pytest

    @lru_cache(maxsize=1)
    def subject() -> Subject:
        made = make()
        return Subject(made, None, **how) if isinstance(made, nn.Module) else Subject(*made, **how)

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name.replace(" ", "-"))
    def test(law: Law) -> None:
        with handed_over(subject().model, subject().handed):
            row = _row(law, subject())
        if row.verdict == "not applicable":
            pytest.skip(row.detail)
        if row.verdict == "failed":
            pytest.fail(f"{row.says}\n{row.detail}", pytrace=False)

    return test


def _row(law: Law, subject: Subject) -> Row:
    began = time.perf_counter()
    verdict, detail = _judge(law, subject)
    return Row(law.name, verdict, detail, law.says, time.perf_counter() - began)


def _judge(law: Law, subject: Subject) -> tuple[Verdict, str]:
    if law not in (_ADAPTER, _FORWARD) and (missing := _missing(subject)):
        return "not applicable", missing
    if law is _FORWARD and isinstance(attempt(lambda: subject.spec), Raised):
        return "not applicable", "there is no adapter"
    try:
        found = attempt(partial(_checked, law, subject))
    except DeviceEnded as error:
        subject.kept["missing"] = f"the device is of no more use in this process since the law {law.name!r}: {error}"
        return "failed", str(error)
    if not isinstance(found, Raised):
        return "passed", found
    if isinstance(found.error, NotApplicable):
        return "not applicable", str(found.error)
    return "failed", str(found.error) if isinstance(found.error, AssertionError) else str(found)


def _checked(law: Law, subject: Subject) -> str:
    if not isinstance(subject.model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, found a {type(subject.model).__name__}")
    with as_it_was(subject.model), _quiet():
        return law.check(subject)


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch the warnings of transformers and torch off: the laws cause them on purpose."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _missing(subject: Subject) -> str | None:
    """Why no law except the first two is applicable, or None."""
    if "missing" not in subject.kept:
        with_logits = attempt(lambda: subject.spec) if isinstance(subject.model, nn.Module) else Raised(TypeError())
        if isinstance(with_logits, Raised):
            subject.kept["missing"] = "there is no adapter"
        else:
            subject.kept["missing"] = None
            if _judge(_FORWARD, subject)[0] != "passed":
                subject.kept["missing"] = "the unpatched model does not run on these inputs as it should"
    return subject.kept["missing"]


def _report(subject: Subject, rows: tuple[Row, ...], name: str | None) -> Report:
    import transformers

    def known(found: str | Raised) -> str:
        return "none" if isinstance(found, Raised) else found

    adapter = attempt(lambda: type(subject.adapter).__name__)
    attention = attempt(lambda: str(subject.inner.config._attn_implementation))  # pyright: ignore[reportAttributeAccessIssue]
    dtype = attempt(lambda: str(next(subject.inner.parameters()).dtype).removeprefix("torch."))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Report(name or type(subject.model).__name__, known(adapter), known(attention), known(dtype), rows, versions)
