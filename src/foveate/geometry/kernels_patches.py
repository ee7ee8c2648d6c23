"""The hot loops of patches and painting (numba), written once for 3-D; a 2-D image is a volume of one plane.

Every loop is exact in integers where the pixels are integers: a sample's weight in a pixel is the length they share
in units of 1/P (area) or 1/2P (linear) of a pixel. The eager twins lie beside the callers; tests prove them equal.

Legend: L leaves, C channels, K classes, P patch_size; shapes are (..., z, y, x); ``taps`` are the pixels of a sample
along one axis.
"""
# no_type_check: the shape checker of the tests must not wrap what is compiled
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def area_gather(image, start, stop, ratio, which, row, out):
    """Write the area means of leaves whose size is a whole multiple of P; border samples count valid pixels only.

    ``row`` is scratch of the longest leaf, in the type in which sums are exact. Samples wholly outside the image
    repeat the last valid one.
    """
    pz, py = out.shape[2], out.shape[3]
    for n in range(which.shape[0]):
        leaf = which[n]
        z0, y0, x0 = start[leaf, 0], start[leaf, 1], start[leaf, 2]
        z1, y1, x1 = stop[leaf, 0], stop[leaf, 1], stop[leaf, 2]
        rz, ry, rx = ratio[leaf, 0], ratio[leaf, 1], ratio[leaf, 2]
        kz, ky, kx = (z1 - z0 + rz - 1) // rz, (y1 - y0 + ry - 1) // ry, (x1 - x0 + rx - 1) // rx
        width = x1 - x0
        for c in range(image.shape[0]):
            for k in range(pz):
                za, zb = z0 + k * rz, min(z0 + (k + 1) * rz, z1)
                for i in range(py):
                    if k >= kz or i >= ky:
                        out[leaf, c, k, i, :] = out[leaf, c, min(k, kz - 1), min(i, ky - 1), :]
                        continue
                    ya, yb = y0 + i * ry, min(y0 + (i + 1) * ry, y1)
                    row[:width] = 0
                    for z in range(za, zb):
                        for y in range(ya, yb):
                            line = image[c, z, y, x0:x1]
                            for x in range(width):
                                row[x] += line[x]
                    num = (zb - za) * (yb - ya)
                    for j in range(kx):
                        a, b = j * rx, min((j + 1) * rx, width)
                        total = row[a]
                        for x in range(a + 1, b):
                            total += row[x]
                        out[leaf, c, k, i, j] = total / (num * (b - a))
                    out[leaf, c, k, i, kx:] = out[leaf, c, k, i, kx - 1]


@njit(cache=True, nogil=True)
@no_type_check
def taps_gather(image, start, kind, which, first, count, weight, zero, out):
    """Write weighted means for any ratio of leaf size to P, up or down.

    ``first``, ``count`` [3, U, P] and ``weight`` [3, U, P, taps] describe each kind of axis; ``kind`` [L, 3] says
    which kind a leaf has; ``zero`` is a number of the type in which sums are exact.
    """
    pz, py, px = out.shape[2], out.shape[3], out.shape[4]
    for n in range(which.shape[0]):
        leaf = which[n]
        z0, y0, x0 = start[leaf, 0], start[leaf, 1], start[leaf, 2]
        uz, uy, ux = kind[leaf, 0], kind[leaf, 1], kind[leaf, 2]
        for c in range(image.shape[0]):
            for k in range(pz):
                for i in range(py):
                    for j in range(px):
                        total, norm = zero, 0
                        for dz in range(count[0, uz, k]):
                            for dy in range(count[1, uy, i]):
                                w_zy = weight[0, uz, k, dz] * weight[1, uy, i, dy]
                                line = image[c, z0 + first[0, uz, k] + dz, y0 + first[1, uy, i] + dy]
                                for dx in range(count[2, ux, j]):
                                    w = w_zy * weight[2, ux, j, dx]
                                    total += w * line[x0 + first[2, ux, j] + dx]
                                    norm += w
                        out[leaf, c, k, i, j] = total / norm


@njit(cache=True, nogil=True)
@no_type_check
def mask_gather(mask, start, kind, first, count, weight, ignore, soft, known):
    """Write the share of each class in each sample, and which part of the sample is labelled.

    Returns -1, or the first label that is neither a class nor ``ignore``, less one when it is negative.
    """
    num_classes, pz, py, px = soft.shape[1:]
    votes = np.zeros(num_classes, np.int64)
    for leaf in range(start.shape[0]):
        z0, y0, x0 = start[leaf, 0], start[leaf, 1], start[leaf, 2]
        uz, uy, ux = kind[leaf, 0], kind[leaf, 1], kind[leaf, 2]
        for k in range(pz):
            for i in range(py):
                for j in range(px):
                    votes[:] = 0
                    norm = 0
                    for dz in range(count[0, uz, k]):
                        for dy in range(count[1, uy, i]):
                            w_zy = weight[0, uz, k, dz] * weight[1, uy, i, dy]
                            line = mask[z0 + first[0, uz, k] + dz, y0 + first[1, uy, i] + dy]
                            for dx in range(count[2, ux, j]):
                                w = w_zy * weight[2, ux, j, dx]
                                label = np.int64(line[x0 + first[2, ux, j] + dx])
                                norm += w
                                if 0 <= label < num_classes:
                                    votes[label] += w
                                elif label != ignore:
                                    return label if label >= 0 else label - 1
                    total = votes.sum()
                    known[leaf, k, i, j] = total / norm
                    for label in range(num_classes):
                        soft[leaf, label, k, i, j] = votes[label] / total if total > 0 else 0.0
    return -1


@njit(cache=True, nogil=True)
@no_type_check
def _find(z, y, x, codes, order, least, bit_axis, roots):
    """Return the leaf whose run of codes starts at or before the code of the cell under a pixel, -1 off the grid."""
    if z < 0 or y < 0 or x < 0:
        return -1
    z, y, x = z // least[0], y // least[1], x // least[2]
    code = 0
    for bit in range(bit_axis.shape[0]):
        if bit_axis[bit] == 2:
            code |= (x & 1) << bit
            x >>= 1
        elif bit_axis[bit] == 1:
            code |= (y & 1) << bit
            y >>= 1
        else:
            code |= (z & 1) << bit
            z >>= 1
    if z >= roots[0] or y >= roots[1] or x >= roots[2]:
        return -1
    root = (z * roots[1] + y) * roots[2] + x
    slot = np.searchsorted(codes, code | (root << bit_axis.shape[0]), side="right") - 1
    return order[slot] if slot >= 0 else -1


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _place(place, start, size, patch, shape, repeat):
    """Return the pixel under a sample's centre along one axis, and twice P times its distance from the start."""
    twice = (2 * place + 1) * size
    point = start + twice // (2 * patch)
    if repeat and not 0 <= point < shape:
        point = min(max(point, 0), shape - 1)
        twice = (2 * (point - start) + 1) * patch
    return point, twice


@njit(cache=True, nogil=True)
@no_type_check
def halo_gather(start, size, which, patch, codes, order, least, bit_axis, roots, shape, repeat, out):
    """Write the flat sample index under every cell of each leaf's grid of samples, padded by one sample."""
    pz, py, px = patch
    rz, ry, rx = (out.shape[1] - pz) // 2, (out.shape[2] - py) // 2, (out.shape[3] - px) // 2
    for n in range(which.shape[0]):
        leaf = which[n]
        z0, y0, x0 = start[leaf]
        plain = not repeat or (start[leaf] + size[leaf] <= shape).all()
        near = leaf
        for k in range(-rz, pz + rz):
            z, tz = _place(k, z0, size[leaf, 0], pz, shape[0], repeat)
            for i in range(-ry, py + ry):
                y, ty = _place(i, y0, size[leaf, 1], py, shape[1], repeat)
                row = 0 <= k < pz and 0 <= i < py
                line = out[n, k + rz, i + ry]
                for j in range(-rx, px + rx):
                    own = row and 0 <= j < px
                    if own and plain:
                        line[j + rx] = ((leaf * pz + k) * py + i) * px + j
                        continue
                    x, tx = _place(j, x0, size[leaf, 2], px, shape[2], repeat)
                    found = leaf if own else near
                    if not own and not _holds(found, z, y, x, start, size):
                        found = near = _find(z, y, x, codes, order, least, bit_axis, roots)
                        if not _holds(found, z, y, x, start, size):
                            line[j + rx] = -1
                            continue
                    sz = (2 * pz * (z0 - start[found, 0]) + tz) // (2 * size[found, 0])
                    sy = (2 * py * (y0 - start[found, 1]) + ty) // (2 * size[found, 1])
                    sx = (2 * px * (x0 - start[found, 2]) + tx) // (2 * size[found, 2])
                    line[j + rx] = ((found * pz + sz) * py + sy) * px + sx


@njit(cache=True, nogil=True)
@no_type_check
def _holds(leaf, z, y, x, start, size):
    return (
        leaf >= 0
        and 0 <= z - start[leaf, 0] < size[leaf, 0]
        and 0 <= y - start[leaf, 1] < size[leaf, 1]
        and 0 <= x - start[leaf, 2] < size[leaf, 2]
    )
