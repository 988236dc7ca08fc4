"""Data parallel training, in two processes: gradients are those of one process over all rows, or it is refused."""

from __future__ import annotations

import pytest
from torch import distributed

from tests.support.processes import outcomes
from tests.support.two_processes import CHECKS, begin


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not distributed.is_available():
        pytest.skip("torch.distributed is not built in")
    return outcomes(2, tmp_path_factory.mktemp("two_processes"), begin, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.slow
def test_in_two_processes(name: str, results: dict[str, str]) -> None:
    if name == "with_lightning":
        pytest.importorskip("lightning")
    assert results[name] == "", results[name]
