"""The table of docs/serve.md is the one of `features.py`, and the tests that it names are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import serving
from tests.support.serving_features import BEGIN, END, FEATURES, PAGE, Feature, table


def test_the_page_has_the_rows() -> None:
    text = PAGE.read_text()
    shown = [line.split(" | ")[:2] for line in text[text.index(BEGIN) : text.index(END)].splitlines() if " | " in line]
    assert shown[1:] == [[f"| {feature.name}", feature.verdict] for feature in FEATURES]


@pytest.mark.parametrize("feature", FEATURES, ids=[feature.name for feature in FEATURES])
def test_a_row_names_tests_that_are_there(feature: Feature) -> None:
    for name in feature.tests:
        file, _, test = name.partition("::")
        source = (Path(__file__).parent / file).read_text() + Path(serving.__file__).read_text()
        case = test.partition("[")[2].rstrip("]")
        assert f"def {test.partition('[')[0]}" in source
        assert case in source


def test_a_row_with_a_failed_test_is_not_shown_as_right() -> None:
    passed = {name: "passed" for feature in FEATURES for name in feature.tests}
    assert all(f"| {feature.name} | {feature.verdict} |" in table(passed, "here") for feature in FEATURES)
    (failed, *_) = FEATURES[0].tests
    assert f"| {FEATURES[0].name} | **0 of 1 tests passed** |" in table({**passed, failed: "failed"}, "here")
