"""What every test starts from: float64, one seed, one thread per process, a device, and where the real data lie."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Derandomised: a test that fails, fails everywhere. `long` searches anew on each run and far wider.
# No deadline: the first example pays for imports and torch.export, so the time of one example says nothing.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.register_profile("long", derandomize=False, deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that take one, such as cuda (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The processes already fill the cores; with more threads than cores they wait for each other.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Laws hold to rounding, and in float64 rounding is far below every error worth finding."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers alone, in a whole run, and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with ``MNIST/raw/*-ubyte`` and ``cifar10/{train,test}.tar``."""
    folder = os.environ.get("MS_OPTIM_DATA")
    if not folder:
        pytest.skip("needs real data: set MS_OPTIM_DATA to a folder with MNIST/raw/ and cifar10/{train,test}.tar")
    root = Path(folder)
    missing = [p for p in ("MNIST/raw/train-images-idx3-ubyte", "cifar10/train.tar") if not (root / p).is_file()]
    if missing:
        pytest.fail(f"MS_OPTIM_DATA={folder} does not hold {', '.join(missing)}")
    return root
