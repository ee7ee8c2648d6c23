"""Settings that all tests share; its place also lets every test import the helpers that lie beside it."""

from importlib.util import find_spec
from types import ModuleType

import pytest
from hypothesis import settings

from torchvision_stand_in import import_timm

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, whether or not torchvision is installed."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed; pip install --no-deps timm")
    return import_timm()
