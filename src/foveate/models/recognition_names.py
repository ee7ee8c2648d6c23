"""Recognition models by name: what ``create_model("ips_resnet18")`` builds."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.models.files import WEIGHTS_FILE, as_tuples, load_state
from foveate.models.recognition import RecognitionConfig, RecognitionModel, build_recognition
from foveate.nn.heads import TaskSpec
from foveate.nn.patch_encoder import load_patch_weights

RECOGNITION = {
    "ips_cnn": RecognitionConfig(),
    "ips_resnet18": RecognitionConfig(encoder="resnet18", norm="batch", width=512),
    "ips_vit_tiny": RecognitionConfig(encoder="vit", width=192),
    "ips_features": RecognitionConfig(encoder="features", in_chans=1024, width=512, keep=512, chunk=4096),
}


def recognition_config(name: str, **overrides: Any) -> RecognitionConfig:
    """The configuration behind a name, with fields changed.

    Args:
        name: one of ``RECOGNITION``.
        overrides: fields of ``RecognitionConfig``; ``tasks`` also as mappings with the fields of ``TaskSpec``.

    Raises:
        ConfigError: an unknown field, or a value that is not possible.
    """
    known = sorted(field.name for field in fields(RecognitionConfig))
    for key in overrides:
        if key not in known:
            raise ConfigError(f"{key!r} is no field of a recognition model; fields are {', '.join(known)}")
    try:
        if "tasks" in overrides:
            tasks = overrides["tasks"]
            overrides["tasks"] = tuple(task if isinstance(task, TaskSpec) else TaskSpec(**task) for task in tasks)
        return replace(RECOGNITION[name], **as_tuples(overrides))
    except TypeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{name}: a value has the wrong type ({reason}); see RecognitionConfig") from None


def create_recognition(name: str, *, weights: str | Path | None = None, **overrides: Any) -> RecognitionModel:
    """Build a named recognition model.

    Args:
        name: one of ``RECOGNITION``.
        weights: weights of the patch encoder (torchvision's names for ResNets), or a folder that ``save_pretrained``
            wrote.
        overrides: fields of ``RecognitionConfig``.

    Raises:
        ConfigError: an unknown field, or a value that is not possible.
        FormatError: weights that are unreadable or do not fit.
    """
    model = build_recognition(recognition_config(name, **overrides))
    if weights is not None and Path(weights).is_dir():
        load_state(model, Path(weights) / WEIGHTS_FILE)
    elif weights is not None:
        load_patch_weights(model.encoder, weights)
    return model
