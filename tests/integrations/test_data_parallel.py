"""Data parallel training, in two processes: gradients are those of one process over all rows, or it is refused."""

from __future__ import annotations

import pytest
from torch import distributed

from tests.support.two_processes import CHECKS, run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    if not distributed.is_available():
        pytest.skip("torch.distributed is not built in")
    return run(tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.slow
def test_in_two_processes(name: str, results: dict[str, list[str]]) -> None:
    assert results[name] == ["", ""], "\n".join(results[name])
