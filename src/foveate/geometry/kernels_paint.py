"""The hot loops that paint samples back to pixels (numba), written once for 3-D; a 2-D image is a volume of one plane.

Every loop visits the leaves of a window and writes their pixels in it; nothing is held per pixel but the result.

Legend: L leaves, K channels of the result, P patch_size; shapes are (..., z, y, x).
"""
# no_type_check: the shape checker of the tests must not wrap what is compiled
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def _first_pixels(size, patch, edge):
    """Write, for each sample, the first pixel of the leaf whose centre lies on it, and the leaf's end."""
    for j in range(patch + 1):
        edge[j] = max(0, -((patch - 2 * size * j) // (2 * patch)))
    edge[patch] = size


@njit(cache=True, nogil=True)
@no_type_check
def index_paint(start, size, stop, patch, origin, out):
    """Write, for every pixel of a window, the flat index of the sample under its centre."""
    pz, py, px = patch
    edge = np.zeros(px + 1, np.int64)
    for leaf in range(start.shape[0]):
        za, zb = max(start[leaf, 0], origin[0]), min(stop[leaf, 0], origin[0] + out.shape[0])
        ya, yb = max(start[leaf, 1], origin[1]), min(stop[leaf, 1], origin[1] + out.shape[1])
        xa, xb = max(start[leaf, 2], origin[2]), min(stop[leaf, 2], origin[2] + out.shape[2])
        if za >= zb or ya >= yb or xa >= xb:
            continue
        _first_pixels(size[leaf, 2], px, edge)
        shift = start[leaf, 2] - origin[2]
        for z in range(za, zb):
            k = (2 * (z - start[leaf, 0]) + 1) * pz // (2 * size[leaf, 0])
            for y in range(ya, yb):
                i = (2 * (y - start[leaf, 1]) + 1) * py // (2 * size[leaf, 1])
                base = ((leaf * pz + k) * py + i) * px
                line = out[z - origin[0], y - origin[1]]
                for j in range(px):
                    a, b = max(edge[j] + shift, xa - origin[2]), min(edge[j + 1] + shift, xb - origin[2])
                    for x in range(a, b):
                        line[x] = base + j


@njit(cache=True, nogil=True)
@no_type_check
def nearest_paint(pixels, start, size, stop, which, origin, out):
    """Write, for every pixel of a window, the sample under its centre."""
    pz, py, px = pixels.shape[2:]
    edge = np.zeros(px + 1, np.int64)
    for n in range(which.shape[0]):
        leaf = which[n]
        za, zb = max(start[leaf, 0], origin[0]), min(stop[leaf, 0], origin[0] + out.shape[1])
        ya, yb = max(start[leaf, 1], origin[1]), min(stop[leaf, 1], origin[1] + out.shape[2])
        xa, xb = max(start[leaf, 2], origin[2]), min(stop[leaf, 2], origin[2] + out.shape[3])
        _first_pixels(size[leaf, 2], px, edge)
        shift = start[leaf, 2] - origin[2]
        for c in range(pixels.shape[1]):
            for z in range(za, zb):
                k = (2 * (z - start[leaf, 0]) + 1) * pz // (2 * size[leaf, 0])
                last = -1
                for y in range(ya, yb):
                    i = (2 * (y - start[leaf, 1]) + 1) * py // (2 * size[leaf, 1])
                    line = out[c, z - origin[0], y - origin[1], xa - origin[2] : xb - origin[2]]
                    if i == last:
                        line[:] = out[c, z - origin[0], y - 1 - origin[1], xa - origin[2] : xb - origin[2]]
                        continue
                    last = i
                    for j in range(px):
                        value = pixels[leaf, c, k, i, j]
                        for x in range(
                            max(edge[j] + shift - xa + origin[2], 0),
                            min(edge[j + 1] + shift, xb - origin[2]) - xa + origin[2],
                        ):
                            line[x] = value


@njit(cache=True, nogil=True)
@no_type_check
def _between(offset, size, patch, rim, one):
    """Return the halo sample before a pixel's centre, and the way to the next one as a share of ``one``."""
    twice = (2 * offset + 1) * patch - size
    low = twice // (2 * size)
    return low + rim, one * (twice - 2 * size * low) / (2 * size)


@njit(cache=True, nogil=True)
@no_type_check
def smooth_paint(pixels, halo, start, size, stop, which, origin, out):
    """Write, for every pixel of a window, the linear interpolation between the centres of samples and halo samples."""
    num_chans = pixels.shape[1]
    one = np.ones(1, pixels.dtype)[0]
    patch = np.array(pixels.shape[2:])
    per = patch.prod()
    flat = pixels.reshape(pixels.shape[0], num_chans, per)
    rim = (np.array(halo.shape[1:]) - patch) // 2
    field = np.empty(halo.shape[1:], pixels.dtype)
    line = np.empty(halo.shape[3], pixels.dtype)
    low, part = np.empty(size[:, 2].max(), np.int64), np.empty(size[:, 2].max(), pixels.dtype)
    for n in range(which.shape[0]):
        leaf = which[n]
        za, zb = max(start[leaf, 0], origin[0]), min(stop[leaf, 0], origin[0] + out.shape[1])
        ya, yb = max(start[leaf, 1], origin[1]), min(stop[leaf, 1], origin[1] + out.shape[2])
        xa, xb = max(start[leaf, 2], origin[2]), min(stop[leaf, 2], origin[2] + out.shape[3])
        for x in range(xa, xb):
            low[x - xa], part[x - xa] = _between(x - start[leaf, 2], size[leaf, 2], patch[2], rim[2], one)
        for c in range(num_chans):
            for k in range(halo.shape[1]):
                for i in range(halo.shape[2]):
                    for j in range(halo.shape[3]):
                        at = halo[n, k, i, j]
                        field[k, i, j] = flat[at // per, c, at % per]
            for z in range(za, zb):
                k, fz = _between(z - start[leaf, 0], size[leaf, 0], patch[0], rim[0], one)
                k1 = min(k + 1, halo.shape[1] - 1)
                for y in range(ya, yb):
                    i, fy = _between(y - start[leaf, 1], size[leaf, 1], patch[1], rim[1], one)
                    for j in range(halo.shape[3]):
                        near = field[k, i, j] + fy * (field[k, i + 1, j] - field[k, i, j])
                        far = field[k1, i, j] + fy * (field[k1, i + 1, j] - field[k1, i, j])
                        line[j] = near + fz * (far - near)
                    row = out[c, z - origin[0], y - origin[1], xa - origin[2] : xb - origin[2]]
                    for x in range(xb - xa):
                        a = line[low[x]]
                        row[x] = a + part[x] * (line[low[x] + 1] - a)
