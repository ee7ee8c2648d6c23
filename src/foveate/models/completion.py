"""How tokens that were pruned in another model catch up before its decoder.

Legend: S positions of the flat sequence of all images, R pruned tokens, D width.
"""

import torch
from torch import Tensor, nn

from foveate.models.alive import Run
from foveate.nn.assembler import CrossAttention
from foveate.nn.attention import Packing
from foveate.nn.encoder import Block


class Completion(nn.Module):
    """Pruned tokens catch up behind the last block; at first they stay as they left.

    Args:
        width: D.
        num_heads: must divide D.
        num_stages: prune points.
        kind: "none", "cross" (they attend to the kept ones) or "block" (one block over all tokens).
    """

    def __init__(self, width: int, num_heads: int, num_stages: int, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(num_stages if kind != "none" else 0))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in self.norms)
        for layer in self.maps:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.cross = CrossAttention(width, num_heads) if kind == "cross" else None
        self.block = Block(width, num_heads, 4.0, layer_scale=0.0) if kind == "block" else None

    def forward(self, flat_SD: Tensor, run: Run) -> Tensor:
        """The flat sequence with its pruned tokens brought up."""
        first, last = run.alive[0], run.alive[-1]
        left = tuple(had - kept for had, kept in zip(first.lengths, last.lengths, strict=True))
        if len(self.maps) and sum(left):
            tokens, order = torch.cat(run.gone).sort()
            states = [flat_SD.index_select(0, run.rows(gone)) for gone in run.gone]
            parts = zip(states, self.norms, self.maps, strict=True)
            x_RD = torch.cat([x + layer(norm(x)) for x, norm, layer in parts]).index_select(0, order)
            if self.cross is not None:
                packings = Packing(left, x_RD.device), Packing(last.lengths, x_RD.device)
                x_RD = self.cross(x_RD, packings[0], flat_SD.index_select(0, run.rows(last.tokens)), packings[1])
            flat_SD = flat_SD.index_copy(0, run.rows(tokens), x_RD.to(flat_SD.dtype))
        if self.block is None:
            return flat_SD
        rows = run.rows(first.tokens)
        done: Tensor = self.block(flat_SD.index_select(0, rows), Packing(first.lengths, rows.device))
        return flat_SD.index_copy(0, rows, done.to(flat_SD.dtype))
