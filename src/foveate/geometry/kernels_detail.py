"""Hot loops that turn an image into values per cell: the residual's Haar energies, sums, total variation, histograms.

Every kernel works on ``[C, D, H, W]``; a 2-D image has D = 1. The functions ending in ``_eager`` are the plain numpy
twins that the tests hold the kernels to. Shapes: C channels, D H W pixels or samples, G grid cells.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from itertools import product
from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def _merge_border(src, c, z0, y0, x0, extent, length, ratio):
    """Sum and squared error of one group of samples at the border, where samples hold different numbers of pixels."""
    total, pixels, error = 0.0, 0.0, 0.0
    for z in range(z0, min(z0 + ratio[0], src.shape[1])):
        nz = min(extent[0], length[0] - z * extent[0])
        for y in range(y0, min(y0 + ratio[1], src.shape[2])):
            ny = min(extent[1], length[1] - y * extent[1])
            for x in range(x0, min(x0 + ratio[2], src.shape[3])):
                n = float(nz * ny * min(extent[2], length[2] - x * extent[2]))
                value = np.float64(src[c, z, y, x])
                if pixels > 0.0:
                    gap = total * n - value * pixels
                    error += gap * gap / (pixels * n * (pixels + n))
                total += value
                pixels += n
    return total, error


@njit(cache=True, nogil=True)
@no_type_check
def _merge_rows(src, c, z0, y0, width, scale, ratio, rows, acc):
    """Merge the full groups of one output row; ``rows[0]`` receives the sums and ``acc`` the squared errors."""
    acc[:width] = 0.0
    for q in range(ratio[0] * ratio[1]):
        line = src[c, z0 + q // ratio[1], y0 + q % ratio[1]]
        row = rows[q]
        if ratio[2] == 2:
            for x in range(width):
                a = np.float64(line[2 * x])
                b = np.float64(line[2 * x + 1])
                row[x] = a + b
                acc[x] += (a - b) * (a - b) * scale
        else:
            for x in range(width):
                row[x] = np.float64(line[x])
    scale = scale / ratio[2]
    count = ratio[0] * ratio[1]
    for r in (ratio[1], ratio[0]):
        if r == 2:
            count //= 2
            for q in range(count):
                first, second, row = rows[2 * q], rows[2 * q + 1], rows[q]
                for x in range(width):
                    a = first[x]
                    b = second[x]
                    row[x] = a + b
                    acc[x] += (a - b) * (a - b) * scale
            scale = scale / 2.0


@njit(cache=True, nogil=True)
@no_type_check
def haar_step(src, dst, energy, extent, length, ratio, origin, block):
    """Merge neighbouring samples by ``ratio`` (1 or 2 per axis runs fast); add the squared error to ``energy``.

    ``src [C, D, H, W]`` holds sums over samples of ``extent`` pixels of an image of ``length`` pixels; ``dst`` receives
    the sums of the merged samples; merged sample i counts for the grid cell ``(i + origin) // block``.
    """
    pixels = float(extent[0] * extent[1] * extent[2])
    pairs = max(ratio[0], ratio[1], ratio[2]) <= 2
    wide = dst.shape[3]
    acc = np.zeros(wide)
    rows = np.empty((4, wide))
    for c in range(dst.shape[0]):
        for z in range(dst.shape[1]):
            for y in range(dst.shape[2]):
                full = (z + 1) * ratio[0] * extent[0] <= length[0] and (y + 1) * ratio[1] * extent[1] <= length[1]
                inner = length[2] // (extent[2] * ratio[2]) if full and pairs else 0
                if inner > 0:
                    _merge_rows(src, c, z * ratio[0], y * ratio[1], inner, 0.5 / pixels, ratio, rows, acc)
                    dst[c, z, y, :inner] = rows[0, :inner]
                for x in range(inner, wide):
                    total, error = _merge_border(
                        src, c, z * ratio[0], y * ratio[1], x * ratio[2], extent, length, ratio
                    )
                    dst[c, z, y, x] = total
                    acc[x] = error
                line = energy[(z + origin[0]) // block[0], (y + origin[1]) // block[1]]
                for x in range(wide):
                    line[(x + origin[2]) // block[2]] += acc[x]


def haar_step_eager(src, dst, energy, extent, length, ratio, origin, block):
    """Numpy twin of `haar_step`."""
    counts = [np.clip(length[a] - np.arange(src.shape[a + 1]) * extent[a], 0, extent[a]) for a in range(3)]
    total = np.zeros(dst.shape)
    pixels = np.zeros(dst.shape[1:])
    error = np.zeros(dst.shape)
    for offset in product(*(range(r) for r in ratio)):
        part = src[:, offset[0] :: ratio[0], offset[1] :: ratio[1], offset[2] :: ratio[2]].astype(np.float64)
        nz, ny, nx = (counts[a][offset[a] :: ratio[a]] for a in range(3))
        n = (nz[:, None, None] * ny[None, :, None] * nx[None, None, :]).astype(np.float64)
        pad = [(0, want - have) for want, have in zip(dst.shape[1:], part.shape[1:], strict=True)]
        part, n = np.pad(part, [(0, 0), *pad]), np.pad(n, pad)
        weight = pixels * n * (pixels + n)
        error += (total * n - part * pixels) ** 2 / np.where(weight > 0, weight, 1.0)
        total += part
        pixels += n
    dst[...] = total
    where = np.ix_(*((np.arange(dst.shape[a + 1]) + origin[a]) // block[a] for a in range(3)))
    np.add.at(energy, where, error.sum(0))


@njit(cache=True, nogil=True)
@no_type_check
def cell_sum(src, grid, cell):
    """Add every pixel of ``src [C, D, H, W]`` to the grid cell that holds it; ``grid`` is float64 ``[GD, GH, GW]``."""
    wide = src.shape[3]
    acc = np.zeros(wide)
    for z in range(src.shape[1]):
        for y in range(src.shape[2]):
            acc[:] = 0.0
            for c in range(src.shape[0]):
                line = src[c, z, y]
                for x in range(wide):
                    acc[x] += np.float64(line[x])
            out = grid[z // cell[0], y // cell[1]]
            for g in range(out.shape[0]):
                total = 0.0
                for x in range(g * cell[2], min((g + 1) * cell[2], wide)):
                    total += acc[x]
                out[g] += total


def cell_sum_eager(src, grid, cell):
    """Numpy twin of `cell_sum`."""
    where = np.ix_(*(np.arange(src.shape[a + 1]) // cell[a] for a in range(3)))
    np.add.at(grid, where, src.astype(np.float64).sum(0))


@njit(cache=True, nogil=True)
@no_type_check
def variation_sum(src, grid, cell):
    """Add the absolute forward differences along all axes and channels of ``src [C, D, H, W]`` to the grid cells."""
    deep, tall, wide = src.shape[1:]
    acc = np.zeros(wide)
    for z in range(deep):
        for y in range(tall):
            acc[:] = 0.0
            for c in range(src.shape[0]):
                line = src[c, z, y]
                for x in range(wide - 1):
                    acc[x] += abs(np.float64(line[x + 1]) - np.float64(line[x]))
                if y + 1 < tall:
                    below = src[c, z, y + 1]
                    for x in range(wide):
                        acc[x] += abs(np.float64(below[x]) - np.float64(line[x]))
                if z + 1 < deep:
                    behind = src[c, z + 1, y]
                    for x in range(wide):
                        acc[x] += abs(np.float64(behind[x]) - np.float64(line[x]))
            out = grid[z // cell[0], y // cell[1]]
            for x in range(wide):
                out[x // cell[2]] += acc[x]


def variation_sum_eager(src, grid, cell):
    """Numpy twin of `variation_sum`."""
    image = src.astype(np.float64)
    change = np.zeros(image.shape)
    for axis in (1, 2, 3):
        keep = tuple(slice(0, -1) if a == axis else slice(None) for a in range(4))
        change[keep] += np.abs(np.diff(image, axis=axis))
    cell_sum_eager(change, grid, cell)


@njit(cache=True, nogil=True)
@no_type_check
def histogram(src, counts, cell, low, step):
    """Count the pixels of ``src [C, D, H, W]`` per grid cell and bin; ``counts`` is int32 ``[GD, GH, GW, bins]``."""
    last = counts.shape[3] - 1
    for c in range(src.shape[0]):
        for z in range(src.shape[1]):
            for y in range(src.shape[2]):
                out = counts[z // cell[0], y // cell[1]]
                for x in range(src.shape[3]):
                    out[x // cell[2], min(int((np.float64(src[c, z, y, x]) - low) / step), last)] += 1


def histogram_eager(src, counts, cell, low, step):
    """Numpy twin of `histogram`."""
    bins = np.minimum((src.astype(np.float64) - low) / step, counts.shape[3] - 1).astype(np.int64)
    where = np.ix_(*(np.arange(src.shape[a + 1]) // cell[a] for a in range(3)))
    for channel in bins:
        np.add.at(counts, (*where, channel), 1)
