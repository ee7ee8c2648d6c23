"""Other people's encoders on leaves: timm, transformers, MONAI and plain torch, with their own weights and blocks.

Legend: L tokens of one image, D width, R prefix tokens, N dimensions, G side of the position grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.patches import Patches
from foveate.nn.embed import GeometryEmbed, PatchEmbed, grid_weights
from foveate.nn.encoder import EncoderOutput, evenly_spaced


@dataclass(frozen=True)
class Parts:
    """What an adapter takes out of a foreign encoder; parameters stay shared with it.

    Args:
        project: patches -> tokens, ``[T, D]``.
        prefix: class and register tokens with their positions, ``[R, D]``, or None; called at every forward.
        positions: table of patch positions ``[G^N, D]``, or None; called at every forward.
        blocks: the blocks, each ``[1, L, D]`` -> the same.
        norm: what follows the last block.
        width: D.
        patch_size: P.
    """

    project: Callable[[Patches], Tensor]
    prefix: Callable[[], Tensor | None]
    positions: Callable[[], Tensor | None]
    blocks: Sequence[Callable[[Tensor], Tensor]]
    norm: Callable[[Tensor], Tensor]
    width: int
    patch_size: int


Take = Callable[[nn.Module, nn.Module | None], Parts]


class AdaptedEncoder(nn.Module):
    """A foreign encoder as an ``EncoderProtocol``: its patch projection, positions and blocks, on leaves of any size.

    One image at a time runs through the blocks, so nothing is padded and no block needs a mask. On the grid it was
    made for, the output is the foreign encoder's own. Positions are its table averaged over each leaf's box, plus a
    zero-initialised code of place and size.

    Args:
        module: the foreign encoder; a child of this module, trained or frozen as usual.
        take: finds the parts of ``module`` and ``extra``; asked at every forward, so that copies (EMA) and wrappers
            that replace submodules (FSDP, LoRA) are followed.
        num_dims: N.
        extra: parameters that the foreign encoder has not got (a patch projection for a bare stack of blocks).
    """

    def __init__(self, module: nn.Module, take: Take, num_dims: int, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module
        self.extra = extra
        self._take = take
        parts = take(module, extra)
        self.width, self.patch_size = parts.width, parts.patch_size
        self.out_blocks = evenly_spaced(len(parts.blocks))
        self.num_hidden = len(self.out_blocks)
        self.geometry_embed = GeometryEmbed(num_dims, parts.width)

    def forward(self, patches: Patches) -> EncoderOutput:
        """Encode a pack, image by image."""
        parts = self._take(self.module, self.extra)
        x_TD = parts.project(patches) + self.geometry_embed(patches)
        table = parts.positions()
        if table is not None:
            grid = round(len(table) ** (1 / patches.num_dims))
            x_TD = x_TD + grid_weights(patches, grid).to(table.dtype) @ table
        prefix = parts.prefix()
        images = [self._image(image, prefix, parts) for image in x_TD.split(list(patches.lengths))]
        hidden = tuple(torch.cat(states) for states in zip(*(image[0] for image in images), strict=True))
        return EncoderOutput(hidden, torch.stack([image[1] for image in images]))

    def _image(self, x_LD: Tensor, prefix: Tensor | None, parts: Parts) -> tuple[list[Tensor], Tensor]:
        num_prefix = 0 if prefix is None else len(prefix)
        x = (x_LD if prefix is None else torch.cat([prefix.to(x_LD.dtype), x_LD]))[None]
        hidden = []
        for index, block in enumerate(parts.blocks):
            x = block(x)
            if index in self.out_blocks[:-1]:
                hidden.append(x[0, num_prefix:])
        x = parts.norm(x)
        return [*hidden, x[0, num_prefix:]], x[0, :num_prefix]


def adapt(
    module: nn.Module, *, num_dims: int = 2, in_chans: int | None = None, patch_size: int | None = None
) -> AdaptedEncoder:
    """Put a foreign encoder behind foveate's protocol.

    Known are timm's ``VisionTransformer``, transformers' ``ViTModel`` and ``Dinov2Model``, MONAI's ``ViT``, and
    ``torch.nn.TransformerEncoder``. None of these libraries is imported; the encoder is told by its attributes.

    Args:
        module: the encoder; its parameters are shared, not copied.
        num_dims: 2 or 3; must fit its patch projection.
        in_chans: channels, only for a bare ``torch.nn.TransformerEncoder``, which has no patch projection of its own.
        patch_size: P, likewise.

    Raises:
        ConfigError: the encoder is of no known kind, or settings are missing.

    Source: APF (arXiv 2404.09707): "any attention-based model", which its released code does by copies of each model.
    """
    if isinstance(module, nn.TransformerEncoder):
        return _adapt_torch(module, num_dims, in_chans, patch_size)
    if hasattr(module, "patch_embedding") and hasattr(module, "blocks"):
        return AdaptedEncoder(module, _monai_parts, num_dims)
    if hasattr(module, "embeddings") and hasattr(module, "layernorm"):
        return AdaptedEncoder(module, _transformers_parts, num_dims)
    if hasattr(module, "patch_embed") and hasattr(module, "blocks"):
        return AdaptedEncoder(module, _timm_parts, num_dims)
    raise ConfigError(
        f"{type(module).__name__} is no encoder that adapt() knows (timm VisionTransformer, transformers ViT or "
        "DINOv2, MONAI ViT, torch TransformerEncoder); write a module with EncoderProtocol's attributes instead"
    )


def _convolution(proj: nn.Module) -> Callable[[Patches], Tensor]:
    def project(patches: Patches) -> Tensor:
        weight, bias = proj.weight, proj.bias
        assert isinstance(weight, Tensor)
        if patches.pixels.shape[1:] != weight.shape[1:]:
            raise ShapeError(
                f"patches of {tuple(patches.pixels.shape[1:])} but the encoder wants {tuple(weight.shape[1:])}: "
                "patchify with its patch size and channels"
            )
        return functional.linear(patches.pixels.flatten(1).to(weight.dtype), weight.flatten(1), bias)  # type: ignore[arg-type]

    return project


def _timm_parts(vit: nn.Module, _extra: nn.Module | None) -> Parts:
    proj = vit.get_submodule("patch_embed.proj")
    tokens = [name for name in ("cls_token", "reg_token") if getattr(vit, name, None) is not None]
    embeds_prefix = not getattr(vit, "no_embed_class", False)

    def prefix() -> Tensor | None:
        if not tokens:
            return None
        found = torch.cat([vit.get_parameter(name)[0] for name in tokens])
        return found + vit.get_parameter("pos_embed")[0, : len(found)] if embeds_prefix else found

    def positions() -> Tensor:
        num_prefix = sum(vit.get_parameter(name).shape[1] for name in tokens) if embeds_prefix else 0
        return vit.get_parameter("pos_embed")[0, num_prefix:]

    blocks = list(vit.get_submodule("blocks").children())
    before = getattr(vit, "norm_pre", None) or nn.Identity()
    blocks = [nn.Sequential(before, blocks[0]), *blocks[1:]]
    return Parts(_convolution(proj), prefix, positions, blocks, vit.get_submodule("norm"), *_sizes(proj))


def _transformers_parts(module: nn.Module, _extra: nn.Module | None) -> Parts:
    proj = module.get_submodule("embeddings.patch_embeddings.projection")
    for path in ("layers", "encoder.layer", "encoder.layers"):
        try:
            blocks = list(module.get_submodule(path).children())
            break
        except AttributeError:
            continue
    else:
        raise ConfigError(f"{type(module).__name__} has no stack of layers that adapt() finds; use EncoderProtocol")
    registers = getattr(module.get_submodule("embeddings"), "register_tokens", None)

    def prefix() -> Tensor:
        table = module.get_parameter("embeddings.position_embeddings")
        found = module.get_parameter("embeddings.cls_token")[0] + table[0, :1]
        return found if registers is None else torch.cat([found, registers[0]])

    def positions() -> Tensor:
        return module.get_parameter("embeddings.position_embeddings")[0, 1:]

    def runner(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            out = block(x)
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

        return call

    norm = module.get_submodule("layernorm")
    return Parts(_convolution(proj), prefix, positions, [runner(block) for block in blocks], norm, *_sizes(proj))


def _unrolled(linear: nn.Linear) -> Callable[[Patches], Tensor]:
    def project(patches: Patches) -> Tensor:
        rows = patches.pixels.movedim(1, -1).flatten(1)  # MONAI's "perceptron" unrolls a patch as (P ... P, channels)
        out: Tensor = linear(rows.to(linear.weight.dtype))
        return out

    return project


def _monai_parts(module: nn.Module, _extra: nn.Module | None) -> Parts:
    proj = module.get_submodule("patch_embedding.patch_embeddings")
    if isinstance(proj, nn.Sequential):
        linear = proj[1]
        assert isinstance(linear, nn.Linear)
        project, sizes = _unrolled(linear), (linear.out_features, dict(proj[0].axes_lengths)["p1"])  # type: ignore[arg-type]
    else:
        project, sizes = _convolution(proj), _sizes(proj)
    classifies = hasattr(module, "cls_token")

    def prefix() -> Tensor | None:
        return module.get_parameter("cls_token")[0] if classifies else None

    def positions() -> Tensor:
        return module.get_parameter("patch_embedding.position_embeddings")[0]

    blocks = list(module.get_submodule("blocks").children())
    return Parts(project, prefix, positions, blocks, module.get_submodule("norm"), *sizes)


def _adapt_torch(
    module: nn.TransformerEncoder, num_dims: int, in_chans: int | None, patch_size: int | None
) -> AdaptedEncoder:
    if in_chans is None or patch_size is None:
        raise ConfigError(
            f"in_chans={in_chans}, patch_size={patch_size}: torch.nn.TransformerEncoder has no patch projection; "
            "give both"
        )
    first = module.layers[0]
    assert isinstance(first, nn.TransformerEncoderLayer)
    embed = PatchEmbed(num_dims, in_chans, first.self_attn.embed_dim, patch_size)
    return AdaptedEncoder(module, _torch_parts, num_dims, extra=embed)


def _torch_parts(module: nn.Module, embed: nn.Module | None) -> Parts:
    assert isinstance(module, nn.TransformerEncoder)
    assert isinstance(embed, PatchEmbed)

    def runner(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            out: Tensor = block(x) if batch_first else block(x.transpose(0, 1)).transpose(0, 1)
            return out

        return call

    batch_first = module.layers[0].self_attn.batch_first
    norm = module.norm if module.norm is not None else nn.Identity()
    blocks = [runner(block) for block in module.layers]
    return Parts(embed, lambda: None, lambda: None, blocks, norm, *_sizes(embed.proj))


def _sizes(proj: nn.Module) -> tuple[int, int]:
    weight = proj.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[-1]
