"""Models by name: what ``create_model("apf_vit_tiny")`` builds."""

import difflib
import fnmatch
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.models.files import WEIGHTS_FILE, as_tuples, load_state
from foveate.models.recognition_names import RECOGNITION, create_recognition
from foveate.models.segmentation import ModelConfig, build_model
from foveate.nn.encoder import Encoder
from foveate.nn.heads import TaskSpec
from foveate.nn.released import is_released, load_released
from foveate.nn.weights import load_weights, read_state

_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_PRUNED: dict[str, Any] = {"prune_after": (2, 5, 8), "keep_ratio": (0.5, 0.25, 0.25)}
_EXACT: dict[str, Any] = {
    "keep_ratio": 0.1,
    "keep_schedule": "published",
    "geometry_code": False,
    "scorer": "published",
    "estimator": "softmax",
    "completion": "published",
}
"""What makes ``scd_unetr_*`` the released model, beside skips that all see the assembled tokens."""


def _named() -> dict[str, ModelConfig]:
    models = {}
    for size, (width, num_heads) in _SIZES.items():
        plane = ModelConfig(width=width, num_heads=num_heads)
        volume = replace(plane, num_dims=3, patch_size=8, in_chans=1, pos_grid=6)
        for decoder, suffix in (("token", ""), ("linear", "_linear"), ("unetr", "_unetr")):
            models[f"apf_vit_{size}{suffix}"] = replace(plane, decoder=decoder)
            models[f"apf_vit_{size}_3d{suffix}"] = replace(volume, decoder=decoder)
        for dims, base in (("", plane), ("_3d", volume)):
            models[f"scd_vit_{size}{dims}"] = replace(base, **_PRUNED, decoder="sparse")
            if size == "tiny":
                continue
            span = base.patch_size * base.pos_grid if base is plane else 96  # pixels that the published models see
            for patch_size, suffix, decoder in ((16, "", "unetr"), (8, "_p8", "unetr_pooled")):
                models[f"scd_unetr_{size}{dims}{suffix}"] = replace(
                    base,
                    **_PRUNED,
                    patch_size=patch_size,
                    pos_grid=span // patch_size,
                    out_blocks=(3, 6, 9, 11),
                    decoder=decoder,
                )
    return models


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` knows, sorted.

    Args:
        pattern: shell pattern, such as ``"apf*_3d"``.
    """
    return sorted(fnmatch.filter([*_named(), *RECOGNITION], pattern))


def create_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration behind the name of a segmentation model, with fields changed.

    Args:
        name: one of ``list_models()``, but for ``ips_*``.
        overrides: fields of ``ModelConfig``; and ``exact=True``, of ``scd_unetr_*``: the model as released, with
            ``keep_ratio=0.1``, or its dense baseline where ``prune_after=()`` (`foveate.nn.released`).

    Raises:
        ConfigError: an unknown name or field, or a value that is not possible.
    """
    models = _named()
    if name not in models:
        raise ConfigError(f"model {name!r} is not known{_close(name, models)}; list_models() names all {len(models)}")
    exact = overrides.pop("exact", False)
    known = {field.name for field in fields(ModelConfig)}
    for key in overrides:
        if key not in known:
            raise ConfigError(
                f"{key!r} is no field of a model{_close(key, known)}; fields are {', '.join(sorted(known))}"
            )
    if exact:
        if not name.startswith("scd_unetr"):
            raise ConfigError(f"exact=True with {name}: only scd_unetr_* models have been released; use one of these")
        last = {"out_blocks": (overrides.get("depth", models[name].depth) - 1,)}  # what all skips see, assembled
        overrides = {**_EXACT, **(last if overrides.get("prune_after", True) else {}), **overrides}
    try:
        return replace(models[name], **as_tuples(overrides))
    except TypeError as error:
        raise ConfigError(
            f"{name} with {overrides}: a value has the wrong type ({error}); give numbers, and lists for prune_after, "
            "out_blocks and completion_size"
        ) from None


def create_model(
    name: str,
    *,
    in_chans: int | None = None,
    num_classes: int = 2,
    weights: str | Path | None = None,
    **overrides: Any,
) -> Any:
    """Build a named model.

    Args:
        name: one of ``list_models()``.
        in_chans: channels of the images; default 3 in 2-D and 1 in 3-D. For ``ips_features``: how many features.
        num_classes: K, background included; for ``ips_*`` without ``tasks``, the classes of the one task.
        weights: file with the weights of a ViT (timm, DINOv2, transformers or pathology layout, safetensors) for the
            encoder, a folder that ``save_pretrained`` wrote, or a file of the released sparse or dense UNETR for all of
            a model.
        overrides: fields of ``ModelConfig`` to change, such as ``depth=6`` or ``patch_size=8``; ``exact=True`` makes
            ``scd_unetr_*`` the released model. For ``ips_*``: fields of ``RecognitionConfig``.

    Returns:
        A ``RecognitionModel`` for ``ips_*``, else a ``SegmentationModel``.

    Raises:
        ConfigError: an unknown name or field.
        FormatError: weights that are unreadable or do not fit.
    """
    if in_chans is not None:
        overrides["in_chans"] = in_chans
    if name in RECOGNITION:
        return create_recognition(
            name, weights=weights, **{"tasks": (TaskSpec("label", "classes", num_classes),), **overrides}
        )
    model = build_model(create_config(name, num_classes=num_classes, **overrides))
    if weights is None:
        return model
    path = Path(weights)
    if path.is_dir():
        load_state(model, path / WEIGHTS_FILE)
    else:
        assert isinstance(model.encoder, Encoder)
        state = read_state(path)
        if is_released(state):
            load_released(model, state, path)
        else:
            load_weights(model.encoder, path)
    return model


def _close(word: str, words: Any) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
