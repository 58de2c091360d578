"""Fixtures shared by all tests: threads, determinism, and the optional real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Everything in the tests is too small for two threads, which wait for each other on a busy machine.
# The variable is for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real data and pretrained networks; skips where it is not set."""
    path = os.environ.get("FLEXURE_DATA")
    if not path:
        pytest.skip("FLEXURE_DATA is not set: this test needs the real data")
    return Path(path)
