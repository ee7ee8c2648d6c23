"""Painting classes instead of values (numba): the largest of the interpolated values, found while they are made.

The arithmetic is that of `kernels_paint.smooth_paint`, step by step, so that the classes are its argmax to the bit.

Legend: L leaves, K classes, P patch_size; shapes are (..., z, y, x); a halo is a leaf's samples and those around it.
"""
# no_type_check: the shape checker of the tests must not wrap what is compiled
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import no_type_check

import numpy as np
from numba import njit

from foveate.geometry.kernels_paint import _between


@njit(cache=True, nogil=True)
@no_type_check
def touched(start, stop, first, last, which):
    """Write the leaves that have pixels in a window to ``which``; return how many, and how many pixels they have."""
    num, pixels = 0, 0
    for leaf in range(start.shape[0]):
        z = min(stop[leaf, 0], last[0]) - max(start[leaf, 0], first[0])
        y = min(stop[leaf, 1], last[1]) - max(start[leaf, 1], first[1])
        x = min(stop[leaf, 2], last[2]) - max(start[leaf, 2], first[2])
        if z > 0 and y > 0 and x > 0:
            which[num] = leaf
            num += 1
            pixels += z * y * x
    return num, pixels


@njit(cache=True, nogil=True)
@no_type_check
def unanimous(pixels, halo, margin, single):
    """Write for each row of ``halo`` the class that is largest at all its samples, else -1.

    It must lead by ``margin`` times the largest value of the halo, so that rounding cannot turn the order.
    """
    num_classes, per = pixels.shape[1], pixels.shape[2]
    for n in range(halo.shape[0]):
        leader, lead, most = -1, np.inf, 0.0
        for place in range(halo.shape[1]):
            leaf, sample = halo[n, place] // per, halo[n, place] % per
            best, second, which = pixels[leaf, 0, sample], -np.inf, 0
            most = max(most, abs(best))
            for c in range(1, num_classes):
                value = pixels[leaf, c, sample]
                most = max(most, abs(value))
                if value > best:
                    best, second, which = value, best, c
                elif value > second:
                    second = value
            if place > 0 and which != leader:
                leader = -1
                break
            leader, lead = which, min(lead, best - second)
        single[n] = leader if lead > margin * most else -1


@njit(cache=True, nogil=True)
@no_type_check
def label_paint(pixels, halo, row, single, start, size, stop, which, origin, out):
    """Write, for every pixel of a window, the class of the largest linear interpolation between halo samples.

    ``pixels [L, K, *P]``; leaf ``which[n]`` has the class ``single[n]`` everywhere, or the samples ``halo[row[n]]``.
    """
    num_classes = pixels.shape[1]
    one = np.ones(1, pixels.dtype)[0]
    patch = np.array(pixels.shape[2:])
    per = patch.prod()
    flat = pixels.reshape(pixels.shape[0], num_classes, per)
    rim = (np.array(halo.shape[1:]) - patch) // 2
    field = np.empty((num_classes, *halo.shape[1:]), pixels.dtype)
    line = np.empty(halo.shape[3], pixels.dtype)
    wide = out.shape[2]
    low, part, best = np.empty(wide, np.int64), np.empty(wide, pixels.dtype), np.empty(wide, pixels.dtype)
    for n in range(which.shape[0]):
        leaf = which[n]
        za, zb = max(start[leaf, 0], origin[0]), min(stop[leaf, 0], origin[0] + out.shape[0])
        ya, yb = max(start[leaf, 1], origin[1]), min(stop[leaf, 1], origin[1] + out.shape[1])
        xa, xb = max(start[leaf, 2], origin[2]), min(stop[leaf, 2], origin[2] + out.shape[2])
        if single[n] >= 0:
            out[za - origin[0] : zb - origin[0], ya - origin[1] : yb - origin[1], xa - origin[2] : xb - origin[2]] = (
                single[n]
            )
            continue
        for x in range(xa, xb):
            low[x - xa], part[x - xa] = _between(x - start[leaf, 2], size[leaf, 2], patch[2], rim[2], one)
        for c in range(num_classes):
            for k in range(halo.shape[1]):
                for i in range(halo.shape[2]):
                    for j in range(halo.shape[3]):
                        at = halo[row[n], k, i, j]
                        field[c, k, i, j] = flat[at // per, c, at % per]
        for z in range(za, zb):
            k, fz = _between(z - start[leaf, 0], size[leaf, 0], patch[0], rim[0], one)
            k1 = min(k + 1, halo.shape[1] - 1)
            for y in range(ya, yb):
                i, fy = _between(y - start[leaf, 1], size[leaf, 1], patch[1], rim[1], one)
                label = out[z - origin[0], y - origin[1], xa - origin[2] : xb - origin[2]]
                for c in range(num_classes):
                    for j in range(halo.shape[3]):
                        near = field[c, k, i, j] + fy * (field[c, k, i + 1, j] - field[c, k, i, j])
                        far = field[c, k1, i, j] + fy * (field[c, k1, i + 1, j] - field[c, k1, i, j])
                        line[j] = near + fz * (far - near)
                    for x in range(xb - xa):
                        a = line[low[x]]
                        value = a + part[x] * (line[low[x] + 1] - a)
                        if c == 0 or value > best[x]:
                            best[x] = value
                            label[x] = c


@njit(cache=True, nogil=True)
@no_type_check
def count_votes(mask, origin, start, kind, first, count, weight, ignore, which, votes):
    """Add the labels of a window to the samples they lie in: ``votes [L, K, *P]``, see `kernels_patches.mask_gather`.

    Returns -1, or the first label that is neither a class nor ``ignore``, less one when it is negative.
    """
    num_classes, pz, py, px = votes.shape[1:]
    for leaf in which:
        z0, y0, x0 = start[leaf, 0] - origin[0], start[leaf, 1] - origin[1], start[leaf, 2] - origin[2]
        uz, uy, ux = kind[leaf, 0], kind[leaf, 1], kind[leaf, 2]
        for k in range(pz):
            za = z0 + first[0, uz, k]
            for z in range(max(za, 0), min(za + count[0, uz, k], mask.shape[0])):
                for i in range(py):
                    ya = y0 + first[1, uy, i]
                    for y in range(max(ya, 0), min(ya + count[1, uy, i], mask.shape[1])):
                        w_zy = weight[0, uz, k, z - za] * weight[1, uy, i, y - ya]
                        for j in range(px):
                            xa = x0 + first[2, ux, j]
                            for x in range(max(xa, 0), min(xa + count[2, ux, j], mask.shape[2])):
                                label = np.int64(mask[z, y, x])
                                if 0 <= label < num_classes:
                                    votes[leaf, label, k, i, j] += w_zy * weight[2, ux, j, x - xa]
                                elif label != ignore:
                                    return label if label >= 0 else label - 1
    return -1
