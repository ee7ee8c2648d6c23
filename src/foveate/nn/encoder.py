"""The plain ViT on packed leaves, with timm's parameter names, so that a checkpoint of that layout loads as it is.

Legend: T patch tokens of a pack, A all tokens with prefixes, D width, N dimensions, G side of the position grid.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from foveate.errors import ConfigError
from foveate.geometry.patches import Patches, pack
from foveate.nn.attention import Attention, Packing, Rotate
from foveate.nn.drop_path import DropPath
from foveate.nn.embed import GeometryEmbed, PatchEmbed, grid_weights, rotary_angles, rotate
from foveate.nn.pruner import AS_TRAINED, KeepRatio, Pruned, Pruning, Scores, TokenPruner, keep_counts
from foveate.nn.published import published_counts
from foveate.nn.trail import Part, Trail


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """What a decoder or a head reads.

    Args:
        hidden: patch tokens behind each of ``out_blocks``, shallow to deep, in the order of the patches; the last has
            passed the final norm.
        prefix: class and register tokens of every image behind the final norm, ``[B, num_prefix, D]``.
        parts: where the encoder prunes, the tokens that left at each prune point, then the rest behind the final norm;
            ``hidden`` then holds, for a token that has left, the state that it left with.
    """

    hidden: tuple[Float[Tensor, "T D"], ...]
    prefix: Float[Tensor, "B R D"]
    parts: tuple[Part, ...] = ()


@runtime_checkable
class EncoderProtocol(Protocol):
    """Anything that turns patches into hidden states can stand in front of a decoder.

    An encoder is an ``nn.Module`` with these three attributes. It must treat images apart (no token of one image may
    change another's), and must not let a token's index matter, only its box in ``patches.leaves``.
    """

    width: int
    patch_size: int
    num_hidden: int

    def __call__(self, patches: Patches, /, *pruning: Pruning) -> EncoderOutput:
        """Encode a pack; an encoder that cannot prune is never told how to."""


def evenly_spaced(depth: int, num: int = 4) -> tuple[int, ...]:
    """Indices of ``num`` evenly spaced blocks of ``depth``, the last among them; fewer where there are fewer."""
    return tuple(sorted({max(0, round(depth * part / num) - 1) for part in range(1, num + 1)}))


def enough_rows(patches: Patches, least: int = 16) -> Patches:
    """A pack of few patches, repeated as further images; any other pack as it is.

    Matrix products on the CPU round the last bit another way below a dozen rows (one or two threads measured), so a
    tiny image alone would differ from the same image in company.

    Args:
        patches: the pack; its own rows come first in the result.
        least: rows to reach.
    """
    if not 0 < len(patches.pixels) < least or patches.pixels.device.type != "cpu":
        return patches
    return pack([patches] * -(-least // len(patches.pixels)))


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, DINOv2)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x_AD: Tensor) -> Tensor:
        """Scale every channel."""
        return x_AD * self.gamma


class Mlp(nn.Module):
    """The two linear maps of a block, with an exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_AD: Tensor) -> Tensor:
        """Expand, bend, contract."""
        out: Tensor = self.fc2(self.act(self.fc1(x_AD)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block on a pack."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, layer_scale: float | None, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_AD: Tensor, packing: Packing, turn: Rotate | None = None) -> Tensor:
        """Attend, then think."""
        x_AD = x_AD + self.drop_path(self.ls1(self.attn(self.norm1(x_AD), packing, turn)), packing)
        out: Tensor = x_AD + self.drop_path(self.ls2(self.mlp(self.norm2(x_AD))), packing)
        return out


_SCHEDULES = {"exact": keep_counts, "published": published_counts}


@dataclass(frozen=True)
class EncoderConfig:
    """Numbers of an encoder; the names of the parameters follow timm's ``VisionTransformer``."""

    num_dims: int = 2
    patch_size: int = 16
    in_chans: int = 3
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    pos_grid: int = 14
    """Side G of the learned position table that spans the image."""
    class_token: bool = True
    num_registers: int = 0
    embed_prefix: bool = True
    """Whether the position table has an entry for the class token (timm: ``not no_embed_class``)."""
    layer_scale: float | None = None
    rope: bool = False
    """Turn queries and keys by the leaves' centres as well."""
    drop_path: float = 0.0
    """Share of the images for which the last block is left out in training, falling evenly to 0 for the first."""
    checkpoint: bool = False
    """Keep only the inputs of the blocks for the backward pass and compute the rest again."""
    prune_after: tuple[int, ...] = ()
    """Blocks behind which tokens are pruned, ascending, the last block not among them; (): nowhere."""
    keep_ratio: KeepRatio = 0.25
    """Share of the tokens that stays at each prune point, or the share of all tokens left after each; see
    ``keep_counts``."""
    keep_schedule: str = "exact"
    """How a share becomes a count: ``exact`` (``keep_counts``) or ``published`` (``published_counts``)."""
    geometry_code: bool = True
    """Add the learned code of place and size (``GeometryEmbed``) to the tokens."""
    out_blocks: tuple[int, ...] | None = None
    """Blocks whose output the decoder reads, ascending, the last block among them; None: four, evenly spaced."""

    def __post_init__(self) -> None:
        if self.num_dims not in (2, 3):
            raise ConfigError(f"num_dims={self.num_dims}: images are 2-D or 3-D; give 2 or 3")
        for name in ("patch_size", "in_chans", "width", "depth", "num_heads", "pos_grid"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is below 1; give a positive whole number")
        blocks = self.blocks
        if list(blocks) != sorted(set(blocks)) or not blocks or blocks[0] < 0 or blocks[-1] != self.depth - 1:
            raise ConfigError(
                f"out_blocks={blocks} must ascend within 0..{self.depth - 1} and end with {self.depth - 1}; "
                "leave it out for four evenly spaced blocks"
            )
        points = list(self.prune_after)
        if points != sorted(set(points)) or any(not 0 <= point < self.depth - 1 for point in points):
            raise ConfigError(
                f"prune_after={self.prune_after} must ascend within 0..{self.depth - 2}, before the last of "
                f"{self.depth} blocks; (2, 5, 8) suits 12 blocks"
            )
        if self.keep_schedule not in _SCHEDULES:
            raise ConfigError(f"keep_schedule={self.keep_schedule!r} is none of {', '.join(_SCHEDULES)}; choose one")
        shares = len(self.keep_ratio) if isinstance(self.keep_ratio, tuple) else 1
        _SCHEDULES[self.keep_schedule](10**9, self.keep_ratio, len(points) or shares)

    @property
    def blocks(self) -> tuple[int, ...]:
        """``out_blocks`` with the default resolved."""
        if self.out_blocks is not None:
            return tuple(self.out_blocks)
        return evenly_spaced(self.depth)

    @property
    def num_prefix(self) -> int:
        """Class and register tokens."""
        return int(self.class_token) + self.num_registers


class Encoder(nn.Module):
    """A ViT over leaves of any size; on a uniform grid it is exactly the plain ViT with the same weights.

    The position table is averaged over each leaf's box, and a zero-initialised code of place and size is added
    (``GeometryEmbed``), so that pretrained weights mean the same from the first step.

    Args:
        config: its numbers.

    Source: Dosovitskiy et al., ICLR 2021; APF (arXiv 2404.09707) section on adaptive patches in front of an unchanged
    encoder. **Differs** from APF's released code: position comes from the leaf's box and not from its index in the
    sequence; images of a batch keep their own number of tokens, and padding is never attended.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.patch_size, self.num_hidden = config.width, config.patch_size, len(config.blocks)
        width = config.width
        self.patch_embed = PatchEmbed(config.num_dims, config.in_chans, width, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, width)) if config.num_registers else None
        entries = config.pos_grid**config.num_dims + (config.num_prefix if config.embed_prefix else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, entries, width))
        self.geometry_embed = GeometryEmbed(config.num_dims, width) if config.geometry_code else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.num_heads,
                config.mlp_ratio,
                config.layer_scale,
                config.drop_path * i / max(config.depth - 1, 1),
            )
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pruners = nn.ModuleDict()  # by the block they prune behind; put there by `add_pruner`
        self._init_weights()

    def _init_weights(self) -> None:
        zero = self.geometry_embed.fc2 if self.geometry_embed is not None else None
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not zero:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def add_pruner(self, block: int, pruner: TokenPruner) -> None:
        """Prune behind a block from now on."""
        self.pruners[str(block)] = pruner

    def forward(self, patches: Patches, pruning: Pruning = AS_TRAINED) -> EncoderOutput:
        """Encode a pack of images, each by itself.

        Args:
            patches: the pack.
            pruning: how to prune in this call, where there are prune points.

        Raises:
            ShapeError: the patches do not fit the weights.
            BudgetError: an impossible ``keep_ratio``.
        """
        whole = patches
        patches = patches if self.training or len(self.pruners) else enough_rows(patches)
        out = self.run_blocks(*self.embed(patches), patches.lengths, pruning)
        kept = tuple(x_TD[: len(whole.pixels)] for x_TD in out.hidden)
        return EncoderOutput(kept, out.prefix[: whole.num_images], out.parts)

    def embed(self, patches: Patches) -> tuple[Float[Tensor, "T D"], Tensor | None]:
        """What a pack's leaves show, where they lie and how large they are; and the angles of their rotary position.

        Args:
            patches: the pack.

        Raises:
            ShapeError: the patches do not fit the weights.
        """
        x_TD = self.patch_embed(patches) + self._positions(patches)
        if self.geometry_embed is not None:
            x_TD = x_TD + self.geometry_embed(patches)
        angles = rotary_angles(patches, self.width // self.config.num_heads) if self.config.rope else None
        return x_TD, angles

    def run_blocks(
        self, x_TD: Float[Tensor, "T D"], angles: Tensor | None, lengths: tuple[int, ...], pruning: Pruning = AS_TRAINED
    ) -> EncoderOutput:
        """Everything behind the embedding: one graph for given lengths, which never waits for the device.

        Args:
            x_TD: embedded patches of a pack.
            angles: of the rotary position, where the encoder turns.
            lengths: tokens of each image.
            pruning: as in `forward`.

        Raises:
            BudgetError: an impossible ``keep_ratio``.
        """
        config = self.config
        trail = Trail(lengths, config.num_prefix, None, x_TD.device)
        x_AD = trail.with_prefix(x_TD, self._prefix(x_TD).expand(len(lengths), -1, -1))
        packing, turn = trail.packing, _turn(angles, trail)
        hidden: list[Tensor] = []
        parts: list[Part] = []
        for index, block in enumerate(self.blocks):
            if config.checkpoint and self.training:
                x_AD = recompute(block, x_AD, packing, turn, use_reentrant=False)
            else:
                x_AD = block(x_AD, packing, turn)
            if index in config.blocks[:-1]:
                hidden.append(_whole(trail.part(trail.take_apart(x_AD)[0]), parts))
            if str(index) in self.pruners:
                x_AD, trail = self._prune(index, x_AD, trail, lengths, pruning, parts)
                packing, turn = trail.packing, _turn(angles, trail)
        x_KD, prefix = trail.take_apart(self.norm(x_AD))
        last = trail.part(x_KD)
        hidden.append(_whole(last, parts))
        if parts:
            parts.append(last)
        return EncoderOutput(tuple(hidden), prefix, tuple(parts))

    def _prune(
        self,
        index: int,
        x_AD: Tensor,
        trail: Trail,
        lengths: tuple[int, ...],
        pruning: Pruning,
        parts: list[Part],
    ) -> tuple[Tensor, Trail]:
        """Send tokens away behind a block; returns what goes on."""
        stage = len(parts)
        ratio = self.config.keep_ratio if pruning.keep_ratio is None else pruning.keep_ratio
        counts = _SCHEDULES[self.config.keep_schedule]
        keep = [counts(length, ratio, len(self.pruners))[stage] for length in lengths]
        x_KD, prefix = trail.take_apart(x_AD)
        pruned: Pruned = self.pruners[str(index)](x_KD, Packing(trail.lengths, x_KD.device), keep, pruning)
        kept, gone = pruned.apply(x_KD)
        if pruning.scores is not None:
            pruning.scores.append(Scores(trail.positions, pruned.score, pruned.split.kept[0], x_KD.detach()))
        parts.append(trail.left(pruned, gone))
        after = trail.after(pruned)
        return after.with_prefix(kept, prefix), after

    def _positions(self, patches: Patches) -> Tensor:
        table_GD = self.pos_embed[0, -(self.config.pos_grid**self.config.num_dims) :]
        return grid_weights(patches, self.config.pos_grid).to(table_GD.dtype) @ table_GD

    def _prefix(self, like: Tensor) -> Tensor:
        """Class and register tokens, ``[num_prefix, D]``."""
        tokens = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return like.new_zeros(0, self.width)
        prefix_RD = torch.cat(tokens)
        prefix_RD = prefix_RD + self.pos_embed[0, : len(prefix_RD)] if self.config.embed_prefix else prefix_RD
        return prefix_RD.to(like.dtype)


def _whole(alive: Part, gone: list[Part]) -> Tensor:
    """Every token of the pack at its place: the alive ones, and the others as they were when they left."""
    if not gone:
        return alive.x
    index = torch.cat([part.rows for part in (alive, *gone)])
    inverse = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
    return torch.cat([part.x for part in (alive, *gone)]).index_select(0, inverse)


def _turn(angles_TF: Tensor | None, trail: Trail) -> Rotate | None:
    """Rotation of the alive tokens; prefix tokens are not turned."""
    if angles_TF is None:
        return None
    angles_KF = angles_TF if trail.rows is None else angles_TF.index_select(0, trail.rows)
    still = angles_KF.new_zeros(len(trail.lengths), trail.num_prefix, angles_KF.shape[1])
    return partial(rotate, angles_TF=trail.with_prefix(angles_KF, still))
