"""A GPU is asked for: without one these tests fail, they are not skipped."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The first one."""
    assert torch.cuda.is_available(), "these tests need a GPU that torch can use"
    return torch.device("cuda")
