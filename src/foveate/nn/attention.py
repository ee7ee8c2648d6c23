"""Attention over packed images; the only file that sees packing and attention kernels.

Legend: T tokens of a pack, D width, H heads, E width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError

Rotate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Packing:
    """How many tokens of a pack belong to each image, in order.

    Args:
        lengths: tokens per image, on the host so that nothing has to wait for a device.
        device: where ``cu_seqlens`` lives.
    """

    lengths: tuple[int, ...]
    device: torch.device | str = "cpu"

    @cached_property
    def cu_seqlens(self) -> Int32[Tensor, " B1"]:
        """Offset of each image, and the total."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest image."""
        return max(self.lengths)


def attend(
    q_THE: Float[Tensor, "T H E"],
    k_THE: Float[Tensor, "S H E"],
    v_THE: Float[Tensor, "S H E"],
    packing: Packing,
    packing_kv: Packing | None = None,
) -> Float[Tensor, "T H E"]:
    """Softmax attention of every token to the tokens of its own image.

    Nothing is padded, so a pack costs the sum of its images, and on the CPU an image gets the same bits alone and in
    any company. CUDA in half precision runs one varlen kernel; everything else one fused kernel per image, on views.

    Args:
        q_THE: queries of the pack.
        k_THE: keys.
        v_THE: values.
        packing: queries per image.
        packing_kv: keys per image; default those of ``packing``. An image without keys gets zeros.

    Raises:
        ShapeError: the lengths do not add up to the tokens, or the packings differ in images.

    Cost: 4 * sum(L_q * L_kv) * H * E FLOPs; memory linear in T.
    """
    keys = packing_kv or packing
    for pack, x_THE in ((packing, q_THE), (keys, k_THE)):
        if sum(pack.lengths) != len(x_THE):
            raise ShapeError(
                f"lengths {pack.lengths} sum to {sum(pack.lengths)}, not to {len(x_THE)} tokens; give one per image"
            )
    if len(packing.lengths) != len(keys.lengths):
        raise ShapeError(f"queries of {len(packing.lengths)} images, keys of {len(keys.lengths)}; give one of each")
    if q_THE.is_cuda and q_THE.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        ends = packing.cu_seqlens, keys.cu_seqlens, packing.max_length, keys.max_length
        out = varlen_attn(q_THE, k_THE, v_THE, *ends)
        assert isinstance(out, Tensor)
        return out
    kv = (x_THE.split(list(keys.lengths)) for x_THE in (k_THE, v_THE))
    outs = [_attend_image(*part) for part in zip(q_THE.split(list(packing.lengths)), *kv, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_image(q_LHE: Tensor, k_LHE: Tensor, v_LHE: Tensor) -> Tensor:
    q, k, v = (x_LHE.transpose(0, 1)[None] for x_LHE in (q_LHE, k_LHE, v_LHE))
    return functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


class Attention(nn.Module):
    """Multi-head self-attention on a pack, with timm's parameter names.

    Args:
        width: D.
        num_heads: H; must divide D.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ConfigError(f"num_heads={num_heads} must divide width={width}; change one of them")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_TD: Float[Tensor, "T D"], packing: Packing, rotate: Rotate | None = None
    ) -> Float[Tensor, "T D"]:
        """Attend within each image.

        Args:
            x_TD: tokens of the pack.
            packing: tokens per image.
            rotate: turns queries and keys ``[T, H, E]`` by their place (rotary position), or None.
        """
        q_THE, k_THE, v_THE = self.qkv(x_TD).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        if rotate is not None:
            q_THE, k_THE = rotate(q_THE).to(v_THE.dtype), rotate(k_THE).to(v_THE.dtype)
        out: Tensor = self.proj(attend(q_THE, k_THE, v_THE, packing).flatten(1))
        return out
