"""Shared fixtures: one thread, fixed seeds, and the optional workshop directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # Triton reads it when a kernel is first imported
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory with golden vectors beside the checkout; tests that want it are skipped where it is missing."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is missing: the stored outputs of the official code are not part of the package")
    return path
