"""Token counts and assembly exactly as released, so that weights of the released code mean the same here.

Legend: T tokens of a pack, A all tokens with their class tokens, D width of the encoder, F width inside, N dimensions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import BudgetError, ConfigError
from foveate.geometry.patches import Patches
from foveate.nn.attention import Packing
from foveate.nn.trail import Part, Trail


def published_counts(length: int, keep_ratio: float | tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Tokens of an image that are left after each prune point, with the released code's rounding.

    Args:
        length: tokens of the image before any pruning.
        keep_ratio: 1 - r in (0, 1]: the share that stays at every prune point of those that came that far.
        num_stages: prune points.

    Raises:
        BudgetError: not one number in (0, 1], or a count falls to 0, where the released code goes on without tokens.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522: int(L * (1 - r)), again and again: 1728 -> 172 -> 17 -> 1.
    """
    if isinstance(keep_ratio, tuple) or not 0 < keep_ratio <= 1:
        raise BudgetError(
            f"keep_ratio={keep_ratio} with keep_schedule='published' must be one number in (0, 1]; 0.1 keeps a tenth "
            "at every prune point"
        )
    counts = [length]
    for _ in range(num_stages):
        counts.append(int(counts[-1] * (1 - (1 - keep_ratio))))
    if not counts[-1]:
        raise BudgetError(
            f"keep_ratio={keep_ratio} leaves of {length} tokens {', '.join(map(str, counts[1:]))} with "
            "keep_schedule='published'; keep more, or use keep_schedule='exact', which never goes below 16"
        )
    return tuple(counts[1:])


@torch.no_grad()
def sine_positions(patches: Patches, width: int, *, base: float = 10_000.0) -> Float[Tensor, "T F"]:
    """Fixed code of place: sine and cosine of each axis' index in the grid of ``patch_size`` cells, axes side by side.

    Args:
        patches: the pack; a leaf of another size lies at the index of its centre.
        width: F; what does not divide by 2 N is left 0.
        base: longest period over shortest.
    """
    per_axis = width // (2 * patches.num_dims)
    frequency = 1.0 / base ** (torch.arange(per_axis, dtype=torch.float32) / max(per_axis, 1))
    boxes = torch.cat([torch.stack([leaves.start, leaves.start + leaves.size], 1) for leaves in patches.leaves])
    index_TN = boxes.float().mean(1) / patches.patch_size - 0.5
    phase_TNF = index_TN[:, :, None] * frequency
    code_TF = torch.cat([phase_TNF.sin(), phase_TNF.cos()], 2).flatten(1)
    return nn.functional.pad(code_TF, (0, width - code_TF.shape[1])).to(patches.pixels.device)


class PublishedAssembler(nn.Module):
    """Assembly of the tokens of all prune points as released: every token, kept or not, through the same steps.

    A norm for each prune point (the encoder's own for the kept), a linear map and a code for each part, a fixed code of
    place, full transformer blocks over all tokens and the class token, a norm, and a linear map back.

    Args:
        width: D.
        num_stages: prune points.
        blocks: transformer blocks of width F, mapping ``[A, F]`` and a `Packing` to ``[A, F]``.
        inner: F.

    Raises:
        ConfigError: no blocks.

    Cost: 4 T D F FLOPs and full blocks over all tokens.
    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, multi-layer token assembly in its released form.
    **Differs**: places are found by one index, come from the leaves and are no weights, so that any grid may be given;
    N = 2 has the same code of place with two axes.
    """

    wants_prefix = True

    def __init__(self, *, width: int, num_stages: int, blocks: Sequence[nn.Module], inner: int) -> None:
        super().__init__()
        if not blocks:
            raise ConfigError("completion='published' needs at least one block; set the depth in completion_size")
        self.inner = inner
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(num_stages))
        self.maps = nn.ModuleList(nn.Linear(width, inner) for _ in range(num_stages + 1))
        self.codes = nn.Parameter(torch.zeros(num_stages + 1, inner))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(inner, eps=1e-6)
        self.out = nn.Linear(inner, width)

    def forward(self, parts: Sequence[Part], patches: Patches, prefix: Float[Tensor, "B R D"]) -> Float[Tensor, "T D"]:
        """Assemble a pack.

        Args:
            parts: one for each prune point, then the tokens that were kept to the end; together they hold every
                position of the pack once.
            patches: the pack.
            prefix: class and register tokens of every image behind the encoder's final norm.
        """
        *gone, kept = parts
        normed = [norm(part.x) for norm, part in zip(self.norms, gone, strict=True)] + [kept.x]
        mapped = [layer(x) + code for layer, x, code in zip(self.maps, normed, self.codes, strict=True)]
        index = torch.cat([part.rows for part in parts])
        inverse = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
        x_TF = torch.cat(mapped).index_select(0, inverse)
        x_TF = x_TF + sine_positions(patches, self.inner).to(x_TF.dtype)
        trail = Trail(patches.lengths, prefix.shape[1], None, x_TF.device)
        x_AF = trail.with_prefix(x_TF, self.maps[-1](prefix) + self.codes[-1])
        packing: Packing = trail.packing
        for block in self.blocks:
            x_AF = block(x_AF, packing)
        whole, _ = trail.take_apart(x_AF)
        out: Tensor = self.out(self.norm(whole))
        return out
