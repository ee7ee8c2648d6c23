"""A stand-in for torchvision while timm is imported: its wheels drag CUDA builds of torch into a CPU install.

timm's networks use nothing of torchvision; its image transforms name classes of it when they are imported.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import ClassVar

MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class Anything(type):
    """A class any attribute of which is its own name, as the members of torchvision's enumerations need."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class StandIn(ModuleType):
    """A module in which every public name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(self, name, Anything(name, (), {}))
        return getattr(self, name)  # type: ignore[no-any-return]


@contextmanager
def stand_in() -> Iterator[None]:
    """Let ``import torchvision`` find the stand-in, and leave no trace of it."""
    names = ["torchvision" + module for module in MODULES]
    sys.modules.update({name: StandIn(name) for name in names})
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_timm() -> ModuleType:
    """timm, whether or not torchvision is installed.

    Raises:
        ImportError: timm is not installed.
    """
    if "timm" in sys.modules:
        return sys.modules["timm"]
    with stand_in():
        return importlib.import_module("timm")
