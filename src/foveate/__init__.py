"""High-resolution image transformers that spend their tokens where the image has something to say.

The public names are loaded when they are first used: ``import foveate`` reads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.errors import FoveateError as FoveateError
    from foveate.geometry.leaves import Leaves as Leaves
    from foveate.geometry.leaves import uniform_leaves as uniform_leaves
    from foveate.geometry.paint import unpatchify as unpatchify
    from foveate.geometry.patches import Patches as Patches
    from foveate.geometry.patches import pack as pack
    from foveate.geometry.patches import patchify as patchify
    from foveate.geometry.patches import patchify_mask as patchify_mask
    from foveate.geometry.split import Split as Split
    from foveate.geometry.split import random_keep as random_keep
    from foveate.geometry.split import soft_topk as soft_topk
    from foveate.geometry.split import topk as topk
    from foveate.geometry.tree import adaptive_leaves as adaptive_leaves
    from foveate.geometry.tree import adaptive_leaves_batch as adaptive_leaves_batch
    from foveate.io.image import read_image as read_image
    from foveate.models import RecognitionModel as RecognitionModel
    from foveate.models import SegmentationModel as SegmentationModel
    from foveate.models import create_model as create_model
    from foveate.models import list_models as list_models
    from foveate.models import sparsify as sparsify
    from foveate.nn.selector import PatchSelector as PatchSelector

__version__ = "0.1.0"

_HOMES = {
    "FoveateError": "errors",
    "Leaves": "geometry.leaves",
    "uniform_leaves": "geometry.leaves",
    "unpatchify": "geometry.paint",
    "Patches": "geometry.patches",
    "pack": "geometry.patches",
    "patchify": "geometry.patches",
    "patchify_mask": "geometry.patches",
    "Split": "geometry.split",
    "random_keep": "geometry.split",
    "soft_topk": "geometry.split",
    "topk": "geometry.split",
    "adaptive_leaves": "geometry.tree",
    "adaptive_leaves_batch": "geometry.tree",
    "read_image": "io.image",
    "PatchSelector": "nn.selector",
    "RecognitionModel": "models",
    "SegmentationModel": "models",
    "create_model": "models",
    "list_models": "models",
    "sparsify": "models",
}

__all__ = [
    "FoveateError",
    "Leaves",
    "PatchSelector",
    "Patches",
    "RecognitionModel",
    "SegmentationModel",
    "Split",
    "adaptive_leaves",
    "adaptive_leaves_batch",
    "create_model",
    "list_models",
    "pack",
    "patchify",
    "patchify_mask",
    "random_keep",
    "read_image",
    "soft_topk",
    "sparsify",
    "topk",
    "uniform_leaves",
    "unpatchify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}; the public names are {', '.join(__all__)}")
    value = getattr(import_module(f"foveate.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
