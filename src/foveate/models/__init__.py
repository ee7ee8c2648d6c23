"""Named models, each put together by a frozen configuration.

``create_model("apf_vit_tiny")`` builds, ``model(patches)`` gives logits packed like ``patches.pixels``, and
``save_pretrained`` / ``from_pretrained`` keep configuration (JSON) and weights (safetensors) in a folder.
"""

from foveate.models.names import create_config as create_config
from foveate.models.names import create_model as create_model
from foveate.models.names import list_models as list_models
from foveate.models.recognition import Chosen as Chosen
from foveate.models.recognition import RecognitionConfig as RecognitionConfig
from foveate.models.recognition import RecognitionModel as RecognitionModel
from foveate.models.recognition import build_recognition as build_recognition
from foveate.models.segmentation import ModelConfig as ModelConfig
from foveate.models.segmentation import SegmentationModel as SegmentationModel
from foveate.models.segmentation import build_model as build_model
from foveate.models.sparsify import sparsify as sparsify
