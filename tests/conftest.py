"""Shape annotations checked at test time, and fixtures every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Before anything imports mimic_core.
install_import_hook("mimic_core", "beartype.beartype")

# The models are tiny: a second thread costs more than it does.
torch.set_num_threads(1)


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """What a user has: annotations unchecked, so that the library's own errors are seen."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
