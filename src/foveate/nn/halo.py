"""Convolution over packed leaves: every leaf sees one sample of its neighbours, whatever their size.

Legend: T leaves of a pack, n leaves of a chunk, p samples per side, S = p^N samples of a leaf, H = (p+2)^N samples with
the halo, C channels in, D channels out. Features are rows "T*S C" (channels last), so a gather moves whole rows.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import halo_index

CHUNK = 2**17  # numbers of one map per step without gradient: half a MiB, so that a step stays in cache


class HaloMaps:
    """Which sample lies under every cell of each leaf's grid padded by one sample; one table per resolution, made once.

    All convolutions of one forward share it, and so may several forwards over the same leaves.

    Args:
        leaves: One per image, in the order of the pack; images never see each other.
        device: Where the features live.

    Cost: 4 bytes per padded sample (8 above 2^31 samples): 1.3 times the samples of a 16 x 16 patch, 1.4 times those
    of a 16^3 one.
    """

    def __init__(self, leaves: Sequence[Leaves], device: torch.device | str = "cpu") -> None:
        self.leaves = tuple(leaves)
        self.device = torch.device(device)
        self._tables: dict[int, Tensor] = {}

    def at(self, patch_size: int) -> Int[Tensor, "T H"]:
        """The flat row (leaf * p^N + sample, counted through the pack) seen by each padded cell; -1 outside the image.

        Args:
            patch_size: p, samples per side of a leaf at this resolution, >= 1.
        """
        if patch_size not in self._tables:
            self._tables[patch_size] = self._build(patch_size)
        return self._tables[patch_size]

    @torch.no_grad()
    def _build(self, p: int) -> Tensor:
        parts, offset = [], 0
        rows = sum(len(leaves) * p**leaves.num_dims for leaves in self.leaves)
        kind = torch.int32 if rows < 2**31 else torch.int64
        for leaves in self.leaves:
            index_LH = halo_index(leaves, p).flatten(1)
            index_LH = torch.where(index_LH < 0, index_LH, index_LH + offset) if offset else index_LH
            parts.append(index_LH.to(kind))
            offset += len(leaves) * p**leaves.num_dims
        return torch.cat(parts).to(self.device) if len(parts) > 1 else parts[0].to(self.device)


class _GatherRows(torch.autograd.Function):
    """Rows by index, zero where the index is -1; the backward adds once per row and never touches those outside."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_RC: Tensor, index_H: Tensor) -> Tensor:
        ctx.save_for_backward(index_H)
        ctx.num_rows = x_RC.shape[0]  # type: ignore[attr-defined]
        return _blank(x_RC.index_select(0, index_H.clamp_min(0)), index_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_HC: Tensor) -> tuple[Tensor, None]:
        (index_H,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_RC = grad_HC.new_zeros((ctx.num_rows, grad_HC.shape[1]))  # type: ignore[attr-defined]
        return grad_RC.index_add_(0, index_H.clamp_min(0), _blank(grad_HC.clone(), index_H)), None


def _blank(rows_HC: Tensor, index_H: Tensor) -> Tensor:
    """Zero, in place, the rows that lie outside; few leaves have any, and on the CPU asking costs less than filling."""
    outside_H = index_H < 0
    if index_H.device.type == "cpu" and not bool(outside_H.any()):
        return rows_HC
    return rows_HC.masked_fill_(outside_H[:, None], 0.0)


def halo_pad(x_RC: Float[Tensor, "R C"], index_TH: Int[Tensor, "n H"]) -> Float[Tensor, "n H C"]:
    """Every leaf's samples with one sample of its neighbours around them, zero outside the image.

    Differentiable once in ``x_RC``.

    Args:
        x_RC: Features of all samples of the pack, row = leaf * p^N + sample.
        index_TH: Rows of ``HaloMaps.at(p)``; all of them, or those of the leaves wanted.
    """
    padded: Tensor = _GatherRows.apply(x_RC, index_TH.flatten())
    return padded.view(*index_TH.shape, x_RC.shape[1])


class HaloConv(nn.Module):
    """A 3 x 3 (x 3) convolution over leaves of any size.

    On a uniform grid it is exactly the zero-padded convolution of the dense image, in forward and backward; where
    sizes differ, a leaf reads the neighbour's sample that lies under the centre of its own halo cell. The weight has
    the shape of ``torch.nn.Conv2d`` / ``Conv3d``.

    Args:
        num_dims: 2 or 3.
        in_chans: C.
        out_chans: D.

    Cost: 2 * 3^N * C * D FLOPs per sample; no image is ever formed.
    """

    def __init__(self, num_dims: int, in_chans: int, out_chans: int) -> None:
        super().__init__()
        if num_dims not in (2, 3):
            raise ConfigError(f"num_dims={num_dims}: leaves are 2-D or 3-D; pass 2 or 3")
        self.num_dims = num_dims
        conv = (nn.Conv2d if num_dims == 2 else nn.Conv3d)(in_chans, out_chans, 3)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x_RC: Float[Tensor, "R C"], index_TH: Int[Tensor, "n H"]) -> Float[Tensor, "Q D"]:
        """Convolve the leaves whose halo rows are given.

        Args:
            x_RC: Features of all samples of the pack.
            index_TH: Halo rows of the n leaves to compute.

        Returns:
            Their features as rows, n * p^N of them.
        """
        return self.convolve(halo_pad(x_RC, index_TH))

    def convolve(self, padded_nHC: Float[Tensor, "n H C"]) -> Float[Tensor, "Q D"]:
        """The convolution alone, for leaves already padded by one sample.

        Raises:
            ShapeError: H is not (p+2)^N.
        """
        cells = padded_nHC.shape[1]
        q = round(cells ** (1 / self.num_dims))
        if q**self.num_dims != cells or q < 3:
            raise ShapeError(
                f"halo index of {cells} cells per leaf: it must be (p+2)^{self.num_dims}; take it from HaloMaps.at(p)"
            )
        if q == 3:  # one output per leaf: a matrix product beats the convolution twofold
            return functional.linear(padded_nHC.flatten(1), self.rows_weight(), self.bias)
        spatial = tuple(range(1, self.num_dims + 1))
        grid = padded_nHC.view(-1, *(q,) * self.num_dims, padded_nHC.shape[2]).permute(0, self.num_dims + 1, *spatial)
        convolve = functional.conv2d if self.num_dims == 2 else functional.conv3d
        out = convolve(grid, self.weight.to(memory_format=_FORMAT[self.num_dims]), self.bias)
        return out.permute(0, *(axis + 1 for axis in spatial), 1).reshape(-1, out.shape[1])

    def rows_weight(self) -> Float[Tensor, "D HC"]:
        """The weight as a matrix over the 3^N neighbours of one sample, channels fastest."""
        return self.weight.flatten(2).transpose(1, 2).flatten(1)


_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}


def by_chunks(step: Callable[[int, int], Tensor], num_leaves: int, samples: int, channels: int) -> Tensor:
    """Run ``step(start, stop)`` over the leaves and join its rows; in small chunks when no gradient is recorded.

    Memory is then one chunk of temporaries instead of one per operation, and the chunk stays in cache.

    Args:
        step: Computes the rows of the leaves start..stop, equally many for each leaf.
        num_leaves: T.
        samples: S of the widest map inside the step.
        channels: C of the widest map inside the step.
    """
    size = max(1, CHUNK // (samples * channels))
    if torch.is_grad_enabled() or num_leaves <= size:
        return step(0, num_leaves)
    first = step(0, size)
    each = len(first) // size
    out = first.new_empty((num_leaves * each, *first.shape[1:]))
    out[: len(first)] = first
    for start in range(size, num_leaves, size):
        stop = min(start + size, num_leaves)
        out[start * each : stop * each] = step(start, stop)
    return out
