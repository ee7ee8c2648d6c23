"""Settings that all tests share; its place also lets every test import the helpers that lie beside it."""

import os
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from torchvision_stand_in import import_timm

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process per core already

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def same_numbers_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """``precision: auto`` is float32 in tests, whatever this machine is made for."""
    monkeypatch.setattr("foveate.tasks.precision.is_made_for_bf16", lambda device: False)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, whether or not torchvision is installed."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed; pip install --no-deps timm")
    return import_timm()
