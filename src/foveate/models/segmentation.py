"""An encoder and a decoder, put together by a frozen configuration: patches in, logits of every sample out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.models.files import WEIGHTS_FILE, load_state, no_model, read_config, save_model
from foveate.nn.assembler import COMPLETIONS, TokenAssembler
from foveate.nn.decoder import LinearDecoder, TokenDecoder
from foveate.nn.encoder import Block, Encoder, EncoderConfig, EncoderOutput, EncoderProtocol, enough_rows
from foveate.nn.pruner import AS_TRAINED, Pruning, TokenPruner
from foveate.nn.published import PublishedAssembler
from foveate.nn.scorer import TokenScorer
from foveate.nn.sparse_decoder import SparseDecoder
from foveate.nn.unetr import DenseDecoder

_DECODERS: dict[str, Callable[..., nn.Module]] = {
    "token": TokenDecoder,
    "linear": LinearDecoder,
    "unetr": DenseDecoder,
    "unetr_pooled": partial(DenseDecoder, pooled=True),
    "sparse": SparseDecoder,
}


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """Every number of a segmentation model: those of its encoder, and these."""

    num_classes: int = 2
    """K, background included."""
    decoder: str = "token"
    """``token`` (multi-scale, in token space), ``sparse`` (the same, at full resolution only where tokens were kept),
    ``linear`` (per leaf), ``unetr`` (dense convolutions on the image grid) or ``unetr_pooled`` (one stage more)."""
    decoder_width: int = 16
    """Channels of the decoder at full resolution."""
    scorer: str = "light"
    """Token importance where tokens are pruned: ``light``, or ``published`` (19 times as costly)."""
    estimator: str = "threshold"
    """Gradient of the choice of tokens: ``threshold``, ``softmax`` (published), ``lapsum`` or ``perturbed``."""
    gate_pruned: bool = True
    """Whether pruned tokens carry the gradient of the choice as well (published), with the opposite sign."""
    completion: str = "cross"
    """How pruned tokens catch up before decoding: ``cross``, ``none``, ``block`` or ``published`` (exactly as
    released); or, as in the paper's ablations, what stands in for them: ``mask`` (a learned vector) or ``last``
    (nothing)."""
    completion_size: tuple[int, int, int] | None = None
    """Width, blocks and heads of ``published`` completion; None: one block like those of the encoder."""
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
        for name, known in (("scorer", ("light", "published")), ("completion", (*COMPLETIONS, "published"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}; choose one")


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
        encoder.add_pruner(block, TokenPruner(scorer, config.estimator, gate_pruned=config.gate_pruned))
    return SegmentationModel(config, encoder, decoder, _assembler(config) if config.prune_after else None)


def _assembler(config: ModelConfig) -> TokenAssembler | PublishedAssembler:
    if config.completion == "published":
        inner, depth, num_heads = config.completion_size or (config.width, 1, config.num_heads)
        blocks = [Block(inner, num_heads, config.mlp_ratio, None) for _ in range(depth)]
        return PublishedAssembler(width=config.width, num_stages=len(config.prune_after), blocks=blocks, inner=inner)
    whole = config.completion in ("block", "mask")
    return TokenAssembler(
        num_dims=config.num_dims,
        width=config.width,
        num_heads=config.num_heads,
        num_stages=len(config.prune_after),
        completion=config.completion,
        block=Block(config.width, config.num_heads, config.mlp_ratio, config.layer_scale) if whole else None,
    )


class SegmentationModel(nn.Module):
    """An encoder and a decoder: patches in, logits of every sample out.

    Args:
        config: what was built; saved beside the weights.
        encoder: any ``EncoderProtocol`` module.
        decoder: takes the encoder's hidden states and the patches; where its ``wants_active`` is true, also the
            ascending positions of the tokens that were kept, as ``active``.
        assembler: brings pruned tokens back, where the encoder prunes; where its ``wants_prefix`` is true, it takes
            the class and register tokens as well, as ``prefix``.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: EncoderProtocol,
        decoder: nn.Module,
        assembler: TokenAssembler | PublishedAssembler | None = None,
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
            prefix = {"prefix": out.prefix} if getattr(self.assembler, "wants_prefix", False) else {}
            hidden = (*hidden[:-1], self.assembler(out.parts, patches, **prefix))
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
        save_model(self, "segmentation", asdict(self.config), folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SegmentationModel":
        """Read what ``save_pretrained`` wrote.

        Raises:
            FormatError: a file is missing, damaged, or does not fit the other.
        """
        values = read_config(folder, "segmentation", {field.name for field in fields(ModelConfig)})
        try:
            model = build_model(ModelConfig(**values))
        except (ConfigError, TypeError) as error:
            raise no_model(folder, error) from None
        load_state(model, Path(folder) / WEIGHTS_FILE)
        return model
