"""Named models: an encoder and a decoder, put together by a frozen configuration.

``create_model("apf_vit_tiny")`` builds, ``model(patches)`` gives logits packed like ``patches.pixels``, and
``save_pretrained`` / ``from_pretrained`` keep configuration (JSON) and weights (safetensors) in a folder.
"""

import difflib
import fnmatch
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from foveate.errors import ConfigError, FormatError
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.io.write import atomic_write
from foveate.nn.assembler import COMPLETIONS, TokenAssembler
from foveate.nn.decoder import LinearDecoder, TokenDecoder
from foveate.nn.encoder import Block, Encoder, EncoderConfig, EncoderOutput, EncoderProtocol, enough_rows
from foveate.nn.pruner import AS_TRAINED, Pruning, TokenPruner
from foveate.nn.scorer import TokenScorer
from foveate.nn.sparse_decoder import SparseDecoder
from foveate.nn.unetr import DenseDecoder
from foveate.nn.weights import load_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_DECODERS: dict[str, Callable[..., nn.Module]] = {
    "token": TokenDecoder,
    "linear": LinearDecoder,
    "unetr": DenseDecoder,
    "sparse": SparseDecoder,
}
_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """Every number of a segmentation model: those of its encoder, and these."""

    num_classes: int = 2
    """K, background included."""
    decoder: str = "token"
    """``token`` (multi-scale, in token space), ``sparse`` (the same, at full resolution only where tokens were kept),
    ``linear`` (per leaf) or ``unetr`` (the dense reference)."""
    decoder_width: int = 16
    """Channels of the decoder at full resolution."""
    scorer: str = "light"
    """Token importance where tokens are pruned: ``light``, or ``published`` (19 times as costly)."""
    estimator: str = "threshold"
    """Gradient of the choice of tokens: ``threshold``, or ``softmax`` (published)."""
    completion: str = "cross"
    """How pruned tokens catch up before decoding: ``cross``, ``none``, ``block`` (published) or ``mask``."""
    active_stage: int = -1
    """Index of the prune point whose kept tokens the ``sparse`` decoder decodes at full resolution; -1: the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder not in _DECODERS:
            raise ConfigError(f"decoder={self.decoder!r} is none of {', '.join(_DECODERS)}; choose one")
        if self.num_classes < 1 or self.decoder_width < 1:
            raise ConfigError(
                f"num_classes={self.num_classes}, decoder_width={self.decoder_width}: both must be at least 1; "
                "give positive whole numbers"
            )
        stages = len(self.prune_after)
        if stages and not -stages <= self.active_stage < stages:
            raise ConfigError(
                f"active_stage={self.active_stage} is no index into prune_after={self.prune_after}; "
                "0 is the first prune point, -1 the last"
            )
        for name, known in (("scorer", ("light", "published")), ("completion", COMPLETIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}; choose one")


def _named() -> dict[str, ModelConfig]:
    models = {}
    for size, (width, num_heads) in _SIZES.items():
        plane = ModelConfig(width=width, num_heads=num_heads)
        volume = replace(plane, num_dims=3, patch_size=8, in_chans=1, pos_grid=6)
        for decoder, suffix in (("token", ""), ("linear", "_linear"), ("unetr", "_unetr")):
            models[f"apf_vit_{size}{suffix}"] = replace(plane, decoder=decoder)
            models[f"apf_vit_{size}_3d{suffix}"] = replace(volume, decoder=decoder)
        for dims, base in (("", plane), ("_3d", volume)):
            models[f"scd_vit_{size}{dims}"] = replace(
                base, prune_after=(2, 5, 8), keep_ratio=(0.5, 0.25, 0.25), decoder="sparse"
            )
    return models


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` knows, sorted.

    Args:
        pattern: shell pattern, such as ``"apf*_3d"``.
    """
    return sorted(fnmatch.filter(_named(), pattern))


def create_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration behind a name, with fields changed.

    Args:
        name: one of ``list_models()``.
        overrides: fields of ``ModelConfig``.

    Raises:
        ConfigError: an unknown name or field, or a value that is not possible.
    """
    models = _named()
    if name not in models:
        raise ConfigError(f"model {name!r} is not known{_close(name, models)}; list_models() names all {len(models)}")
    known = {field.name for field in fields(ModelConfig)}
    for key in overrides:
        if key not in known:
            raise ConfigError(
                f"{key!r} is no field of a model{_close(key, known)}; fields are {', '.join(sorted(known))}"
            )
    try:
        return replace(models[name], **_as_tuples(overrides))
    except TypeError as error:
        raise ConfigError(f"{name} with {overrides}: a value has the wrong type ({error}); give numbers") from None


def _as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists, as JSON and YAML have them, as the tuples that a frozen configuration holds."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def build_model(config: ModelConfig) -> "SegmentationModel":
    """Build a model with fresh weights from a configuration."""
    encoder = Encoder(EncoderConfig(**{field.name: getattr(config, field.name) for field in fields(EncoderConfig)}))
    decoder = _DECODERS[config.decoder](
        num_dims=config.num_dims,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        width=config.width,
        patch_size=config.patch_size,
        num_hidden=encoder.num_hidden,
        channels=config.decoder_width,
    )
    for block in config.prune_after:
        scorer = TokenScorer(config.width, published=config.scorer == "published")
        encoder.add_pruner(block, TokenPruner(scorer, config.estimator))
    return SegmentationModel(config, encoder, decoder, _assembler(config) if config.prune_after else None)


def _assembler(config: ModelConfig) -> TokenAssembler:
    whole = config.completion in ("block", "mask")
    return TokenAssembler(
        num_dims=config.num_dims,
        width=config.width,
        num_heads=config.num_heads,
        num_stages=len(config.prune_after),
        completion=config.completion,
        block=Block(config.width, config.num_heads, config.mlp_ratio, config.layer_scale) if whole else None,
    )


def create_model(
    name: str,
    *,
    in_chans: int | None = None,
    num_classes: int = 2,
    weights: str | Path | None = None,
    **overrides: Any,
) -> "SegmentationModel":
    """Build a named model.

    Args:
        name: one of ``list_models()``.
        in_chans: channels of the images; default 3 in 2-D and 1 in 3-D.
        num_classes: K, background included.
        weights: file with the weights of a ViT (timm, DINOv2, transformers or pathology layout, safetensors) for the
            encoder, or a folder that ``save_pretrained`` wrote.
        overrides: fields of ``ModelConfig`` to change, such as ``depth=6`` or ``patch_size=8``.

    Raises:
        ConfigError: an unknown name or field.
        FormatError: weights that are unreadable or do not fit.
    """
    if in_chans is not None:
        overrides["in_chans"] = in_chans
    model = build_model(create_config(name, num_classes=num_classes, **overrides))
    if weights is None:
        return model
    path = Path(weights)
    if path.is_dir():
        _load_state(model, path / WEIGHTS_FILE)
    else:
        assert isinstance(model.encoder, Encoder)
        load_weights(model.encoder, path)
    return model


class SegmentationModel(nn.Module):
    """An encoder and a decoder: patches in, logits of every sample out.

    Args:
        config: what was built; saved beside the weights.
        encoder: any ``EncoderProtocol`` module.
        decoder: takes the encoder's hidden states and the patches; where its ``wants_active`` is true, also the
            ascending positions of the tokens that were kept, as ``active``.
        assembler: brings pruned tokens back, where the encoder prunes.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: EncoderProtocol,
        decoder: nn.Module,
        assembler: TokenAssembler | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        self.assembler = assembler

    def forward(self, patches: Patches, pruning: Pruning | None = None) -> Float[Tensor, "T K *P"]:
        """Logits per class and sample, packed as the patches; an image's logits do not depend on its company.

        In evaluation on the CPU that holds to the bit (measured with one and two threads), where nothing is pruned.

        Args:
            patches: pixels normalised as in training.
            pruning: how to prune in this call, where the encoder does; None: as configured, without noise.
        """
        num_patches = len(patches.pixels)
        patches = patches if self.training else enough_rows(patches)
        out = self.encoder(patches) if self.assembler is None else self.encoder(patches, pruning or AS_TRAINED)
        hidden = out.hidden
        if self.assembler is not None:
            hidden = (*hidden[:-1], self.assembler(out.parts, patches))
        active = {"active": self._active(out)} if getattr(self.decoder, "wants_active", False) else {}
        logits: Tensor = self.decoder(hidden, patches, **active)
        return logits[:num_patches]

    def _active(self, out: EncoderOutput) -> Tensor | None:
        """Tokens that the configured prune point kept; None where nothing is pruned."""
        if not out.parts:
            return None
        first = range(len(out.parts) - 1)[self.config.active_stage] + 1
        return torch.cat([part.rows for part in out.parts[first:]]).sort().values

    @torch.no_grad()
    def segment(
        self,
        image: Float[Tensor, "C *S"] | NDArray[Any],
        max_leaves: int = 1024,
        *,
        min_size: int | None = None,
        detail: str = "residual",
    ) -> Float[Tensor, "K *S"]:
        """Cut one image, run the model, and paint the logits back to pixels.

        Args:
            image: normalised as in training.
            max_leaves: leaves to spend.
            min_size: side of the smallest leaf in pixels; default the patch size.
            detail: what drives the tree.

        Cost: K x S floats for the result; ``foveate predict`` writes large masks tile by tile instead.
        """
        patch_size = self.config.patch_size
        tensor = torch.as_tensor(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image)
        leaves = adaptive_leaves(
            tensor, max_leaves=max_leaves, min_size=min_size or patch_size, patch_size=patch_size, detail=detail
        )
        patches = patchify(tensor, leaves, patch_size=patch_size)
        was_training = self.training
        self.eval()
        try:
            logits = self(patches.to(next(self.parameters()).device))
        finally:
            self.train(was_training)
        return unpatchify(logits.float().cpu(), leaves, mode="smooth")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, each aside first and then renamed."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_write(folder / WEIGHTS_FILE) as file:
            file.write(save(state))
        with atomic_write(folder / CONFIG_FILE) as file:
            file.write((json.dumps({"model": "segmentation", **asdict(self.config)}, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SegmentationModel":
        """Read what ``save_pretrained`` wrote.

        Raises:
            FormatError: a file is missing, damaged, or does not fit the other.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            kind = values.pop("model", None)
        except (OSError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: cannot be read ({error}); give a folder that save_pretrained wrote") from None
        if kind != "segmentation":
            raise FormatError(f"{path}: describes {kind!r}, not a segmentation model; give another folder")
        unknown = sorted(set(values) - {field.name for field in fields(ModelConfig)})
        if unknown:
            raise FormatError(f"{path}: unknown fields {', '.join(unknown)}; it was written by another version")
        try:
            model = build_model(ModelConfig(**_as_tuples(values)))
        except (ConfigError, TypeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise FormatError(
                f"{path}: describes no model ({reason}); give a folder that save_pretrained wrote"
            ) from None
        _load_state(model, Path(folder) / WEIGHTS_FILE)
        return model


def _load_state(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: is no readable safetensors file ({error}); save the model again") from None
    ours = model.state_dict()
    wrong = [f"{name} is missing" for name in ours if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in ours]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in ours.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{path}: does not fit the model: {'; '.join(wrong[:3])}{more}; build it with the same config"
        )
    model.load_state_dict(state)


def _close(word: str, words: Any) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
