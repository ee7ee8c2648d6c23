"""Multi-layer token assembly (MTA): every token back in its place, whatever block it left at.

Legend: T tokens of a pack, R tokens of a part, D width, B images.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.geometry.patches import Patches
from foveate.nn.attention import Packing, attend
from foveate.nn.embed import GeometryEmbed
from foveate.nn.trail import Part

COMPLETIONS = ("none", "cross", "block", "mask", "last")


class CrossAttention(nn.Module):
    """Tokens that left read from those that stayed, with a residual; starts as the identity.

    Args:
        width: D.
        num_heads: must divide D.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        for layer in (self.q, self.kv):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_RD: Tensor, packing: Packing, kept_KD: Tensor, kept_packing: Packing) -> Tensor:
        """Return the tokens after reading, image by image."""
        q_RHE = self.q(self.norm_q(x_RD)).unflatten(1, (self.num_heads, -1))
        k_KHE, v_KHE = self.kv(self.norm_kv(kept_KD)).unflatten(1, (2, self.num_heads, -1)).unbind(1)
        read: Tensor = self.proj(attend(q_RHE, k_KHE, v_KHE, packing, kept_packing).flatten(1))
        return x_RD + read


class TokenAssembler(nn.Module):
    """Bring the tokens of all prune points together in the order of the leaves.

    Kept tokens pass as they are ("none", "cross"), so that with nothing pruned the result is the encoder's own. A token
    that left at prune point j goes through a norm and a linear map of its own, gets the code of j and the code of its
    place and size; then completion lets it catch up. "mask" and "last" assemble nothing; they are ablations.

    Args:
        num_dims: N.
        width: D.
        num_heads: of the attention in completion; must divide D.
        num_stages: prune points.
        completion: "cross": pruned tokens attend to the kept ones (default); "none"; "block": one transformer block
            over all tokens, as published; "mask": pruned tokens are replaced by one learned vector before the block;
            "last": by zeros, so that only what was kept to the end is decoded from.
        block: the transformer block of "block" and "mask", mapping ``[T, D]`` and a `Packing` to ``[T, D]``.

    Raises:
        ConfigError: an unknown completion, or a block where none belongs or none where one does.

    Cost: 2 R D^2 FLOPs per part; "cross" adds 8 T D^2 + 4 R K D, "block" a full block over T tokens.
    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, multi-layer token assembly.
    **Differs**: one index_select puts tokens back; leaves of any size, no grid stored in the weights; the published
    form also maps the kept tokens and always runs the full-length block, 10 to 15 % of its forward pass.
    """

    def __init__(
        self,
        *,
        num_dims: int,
        width: int,
        num_heads: int,
        num_stages: int,
        completion: str = "cross",
        block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if completion not in COMPLETIONS:
            raise ConfigError(f"completion={completion!r} is none of {', '.join(COMPLETIONS)}; choose one")
        if (block is None) == (completion in ("block", "mask")):
            there = "missing" if block is None else "given"
            raise ConfigError(f"completion={completion!r} with its block {there}; only 'block' and 'mask' have one")
        self.completion = completion
        stages = range(0 if completion in ("mask", "last") else num_stages)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in stages)
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in stages)
        self.codes = nn.Parameter(torch.zeros(len(stages), width)) if stages else None
        self.geometry_embed = None if completion == "last" else GeometryEmbed(num_dims, width)
        self.mask_token = nn.Parameter(torch.zeros(width)) if completion == "mask" else None
        self.cross = CrossAttention(width, num_heads) if completion == "cross" else None
        self.block = block
        for layer in self.maps:
            assert isinstance(layer, nn.Linear)
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, parts: Sequence[Part], patches: Patches) -> Float[Tensor, "T D"]:
        """Assemble a pack.

        Args:
            parts: one for each prune point, then the tokens that were kept to the end; together they hold every
                position of the pack once.
            patches: the pack.
        """
        *gone, kept = parts
        left = tuple(sum(part.lengths[image] for part in gone) for image in range(patches.num_images))
        if not sum(left) and self.block is None:
            return kept.x
        code_TD = None if self.geometry_embed is None else self.geometry_embed(patches)
        x_RD = _by_image([self._coded(stage, part, code_TD) for stage, part in enumerate(gone)], gone)
        if self.cross is not None:
            packings = Packing(left, x_RD.device), Packing(kept.lengths, x_RD.device)
            x_RD = self.cross(x_RD, packings[0], kept.x, packings[1])
        index = torch.cat([_by_image([part.rows for part in gone], gone), kept.rows])
        inverse = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
        x_TD = torch.cat([x_RD, kept.x]).index_select(0, inverse)
        return x_TD if self.block is None else self.block(x_TD, Packing(patches.lengths, x_TD.device))

    def _coded(self, stage: int, part: Part, code_TD: Tensor | None) -> Tensor:
        if code_TD is None:
            return torch.zeros_like(part.x)
        place_RD = code_TD.index_select(0, part.rows)
        if self.codes is None:
            assert self.mask_token is not None
            return self.mask_token + place_RD
        mapped: Tensor = self.maps[stage](self.norms[stage](part.x))
        return mapped + self.codes[stage] + place_RD


def _by_image(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """What belongs to the parts, sorted by image; within an image by part."""
    split = [value.split(list(part.lengths)) for value, part in zip(values, parts, strict=True)]
    return torch.cat([piece for image in zip(*split, strict=True) for piece in image])
