"""The hot loops between label images and their outlines (numba).

A boundary of a label turns only at corners, and whether a lattice point is a corner is seen in the four pixels around
it. So tracing keeps corners alone, each as one integer ``label, y, x, turn`` that sorts along the rows; the straight
pieces between them follow from the order: on a row and in a column, corners of one label pair up.

Legend: N corners or points, R rings, M polygons; points are (y, x).
"""
# no_type_check: the shape checker of the tests must not wrap what is compiled
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import no_type_check

import numpy as np
from numba import njit

SIDE_BITS = 26  # of a key: 8 bits label, 26 y, 26 x, 3 turn
_Y, _X = 3 + SIDE_BITS, 3
LABEL_SHIFT = _Y + SIDE_BITS
_SIDE = (1 << SIDE_BITS) - 1
_STEP = 256  # columns counted together when the open ones are searched


@njit(cache=True, nogil=True)
@no_type_check
def corners(block, y, x, background, row, out, used):
    """Write the corners between the pixels of a block, from ``row`` on; return the row reached and the number written.

    ``turn``: bit 2 the horizontal piece leads right, bit 1 the vertical one leads down, bit 0 the corner is convex.
    Corners where two pixels of a label touch are two convex ones, so that regions are connected along pixel edges.
    """
    quad = np.empty(4, np.int64)
    rows, columns = block.shape[0] - 1, block.shape[1] - 1
    while row < rows and used + 4 * columns <= out.shape[0]:
        for column in range(columns):
            quad[0], quad[1] = block[row, column], block[row, column + 1]
            quad[2], quad[3] = block[row + 1, column], block[row + 1, column + 1]
            if quad[0] == quad[1] and quad[2] == quad[3] and quad[0] == quad[2]:
                continue
            for first in range(4):
                label = quad[first]
                seen = False
                for before in range(first):
                    seen |= quad[before] == label
                if seen or label == background:
                    continue
                count = 0
                for at in range(4):
                    count += quad[at] == label
                diagonal = count == 2 and quad[3 - first] == label
                if count == 4 or (count == 2 and not diagonal):
                    continue
                key = label << LABEL_SHIFT | (y + row) << _Y | (x + column) << _X
                for at in range(4):
                    if (quad[at] == label) == (count != 3):
                        right, down = at & 1, at >> 1
                        out[used] = key | right << 2 | down << 1 | (count != 3)
                        used += 1
        row += 1
    return row, used


@njit(cache=True, nogil=True)
@no_type_check
def pair_up(keys, width):
    """Return, for each of the sorted corners, the one at the other end of its horizontal and of its vertical piece."""
    across, along = np.full(keys.shape[0], -1, np.int32), np.full(keys.shape[0], -1, np.int32)
    opened = np.full(width + 1, -1, np.int32)
    for i in range(keys.shape[0]):
        if keys[i] & 4:
            across[i], across[i + 1] = i + 1, i
        x = (keys[i] >> _X) & _SIDE
        if keys[i] & 2:
            if opened[x] >= 0:  # the corner that touches this one ends the piece above, and comes next
                along[i + 1], along[opened[x]] = opened[x], i + 1
            opened[x] = i
        elif along[i] < 0:
            along[i], along[opened[x]] = opened[x], i
            opened[x] = -1
    return across, along


@njit(cache=True, nogil=True)
@no_type_check
def _next(i, keys, across, along):
    """Return the corner after one, the region on the right hand as seen on a screen."""
    turn = keys[i] & 7
    return across[i] if (turn & 1) == ((turn >> 2) == (turn >> 1 & 1)) else along[i]


@njit(cache=True, nogil=True)
@no_type_check
def number(keys, across, along, ring):
    """Write the ring of each corner, counted along the rows, and return the number of rings."""
    ring[:] = -1
    count = 0
    for first in range(keys.shape[0]):
        if ring[first] >= 0:
            continue
        i = first
        while ring[i] < 0:
            ring[i] = count
            i = _next(i, keys, across, along)
        count += 1
    return count


@njit(cache=True, nogil=True)
@no_type_check
def part_rings(keys, across, ring):
    """Cut rings where they touch themselves, by exchanging the horizontal pieces of the two corners there."""
    for i in range(keys.shape[0] - 1):
        if keys[i] >> _X == keys[i + 1] >> _X and ring[i] == ring[i + 1]:
            left, right = across[i], across[i + 1]
            across[i], across[i + 1] = right, left
            across[left], across[right] = i + 1, i


@njit(cache=True, nogil=True)
@no_type_check
def measure(keys, across, along, ring, count):
    """Return first corner, length and signed area of each ring; the areas of holes are below 0."""
    first, length, area = np.full(count, -1, np.int32), np.zeros(count, np.int32), np.zeros(count, np.int64)
    for i in range(keys.shape[0]):
        r = ring[i]
        if first[r] < 0:
            first[r] = i
        length[r] += 1
        if keys[i] & 2:
            height = ((keys[along[i]] >> _Y) & _SIDE) - ((keys[i] >> _Y) & _SIDE)
            downwards = _next(i, keys, across, along) == along[i]
            area[r] += ((keys[i] >> _X) & _SIDE) * (height if downwards else -height)
    return first, length, area


@njit(cache=True, nogil=True)
@no_type_check
def parents(keys, along, ring, first, area, width):
    """Return the outer ring of the region that each ring bounds; an outer ring is its own.

    Left of the first corner of a hole lies its region, up to the next vertical piece: that one's ring came before.
    """
    parent = np.arange(first.shape[0]).astype(np.int32)
    opened, filled = np.full(width + 1, -1, np.int32), np.zeros(width // _STEP + 1, np.int32)
    for i in range(keys.shape[0]):
        x, r = (keys[i] >> _X) & _SIDE, ring[i]
        if first[r] == i and area[r] < 0:
            at = x - 1
            while opened[at] < 0:
                at = at - 1 if filled[at // _STEP] else (at // _STEP) * _STEP - 1
            parent[r] = parent[ring[opened[at]]]
        if keys[i] & 2:
            filled[x // _STEP] += opened[x] < 0
            opened[x] = i
        elif opened[x] == along[i]:
            filled[x // _STEP] -= 1
            opened[x] = -1
    return parent


@njit(cache=True, nogil=True)
@no_type_check
def write_rings(keys, across, along, first, order, points):
    """Write the points of rings one after the other."""
    at = 0
    for r in order:
        i = first[r]
        while True:
            points[at, 0], points[at, 1] = (keys[i] >> _Y) & _SIDE, (keys[i] >> _X) & _SIDE
            at += 1
            i = _next(i, keys, across, along)
            if i == first[r]:
                break


@njit(cache=True, nogil=True)
@no_type_check
def ring_areas(points, ring_start):
    """Return the signed area of each ring, above 0 for outer rings of label images."""
    area = np.zeros(ring_start.shape[0] - 1)
    for r in range(area.shape[0]):
        begin, end = ring_start[r], ring_start[r + 1]
        for i in range(begin, end):
            j = i + 1 if i + 1 < end else begin
            y, x = points[i, 0] * 1.0 - points[begin, 0], points[i, 1] * 1.0 - points[begin, 1]
            area[r] += (x * (points[j, 0] - points[begin, 0]) - y * (points[j, 1] - points[begin, 1])) / 2
    return area


@njit(cache=True, nogil=True)
@no_type_check
def _reached(ya, xa, yb, xb, y, x):
    """Whether an edge, lower end first, passes at or left of a point of a row that it crosses."""
    return (x - xa) * (yb - ya) >= (xb - xa) * (y - ya)


@njit(cache=True, nogil=True)
@no_type_check
def _toggle(ya, xa, yb, xb, step, window, flips):
    """Flip, in every row that an edge crosses, the first pixel whose centre is not left of the crossing."""
    y0, x0, y1, x1 = window
    if ya > yb:
        ya, xa, yb, xb = yb, xb, ya, xa
    top, bottom = max(ya, (y0 + 0.5) * step), min(yb, (y1 + 0.5) * step)
    row = max(y0, int(np.floor(top / step - 0.5)))
    while row < y1 and (row + 0.5) * step < bottom:
        y = (row + 0.5) * step
        if y >= ya:
            guess = np.ceil((xa + (xb - xa) * ((y - ya) / (yb - ya))) / step - 0.5)
            column = int(min(max(guess, x0), x1))
            while column > x0 and _reached(ya, xa, yb, xb, y, (column - 0.5) * step):
                column -= 1
            while column < x1 and not _reached(ya, xa, yb, xb, y, (column + 0.5) * step):
                column += 1
            if column < x1:
                flips[row - y0, column - x0] ^= 1
        row += 1


@njit(cache=True, nogil=True)
@no_type_check
def fill_polygons(points, ring_start, polygon_start, boxes, labels, step, origin, out):
    """Paint polygons one over the other into the window that begins at ``origin``, in pixels of ``step``."""
    flips = np.zeros(out.shape, np.uint8)
    for p in range(labels.shape[0]):
        y0 = max(np.floor(boxes[p, 0] / step - 0.5), origin[0])
        x0 = max(np.floor(boxes[p, 1] / step - 0.5), origin[1])
        y1 = min(np.ceil(boxes[p, 2] / step + 0.5), origin[0] + out.shape[0])
        x1 = min(np.ceil(boxes[p, 3] / step + 0.5), origin[1] + out.shape[1])
        if y0 >= y1 or x0 >= x1:
            continue
        window = (int(y0), int(x0), int(y1), int(x1))
        high, low = window[2] - window[0], window[3] - window[1]
        for r in range(polygon_start[p], polygon_start[p + 1]):
            begin, end = ring_start[r], ring_start[r + 1]
            for i in range(begin, end):
                j = i + 1 if i + 1 < end else begin
                if points[i, 0] != points[j, 0]:
                    _toggle(
                        points[i, 0] * 1.0,
                        points[i, 1] * 1.0,
                        points[j, 0] * 1.0,
                        points[j, 1] * 1.0,
                        step,
                        window,
                        flips,
                    )
        dy, dx = window[0] - origin[0], window[1] - origin[1]
        for row in range(high):
            inside = 0
            for column in range(low):
                inside ^= flips[row, column]
                flips[row, column] = 0
                if inside:
                    out[row + dy, column + dx] = labels[p]


@njit(cache=True, nogil=True)
@no_type_check
def _side(points, a, b, c):
    """Return on which side of the line a-b the point c lies: -1, 0 or 1."""
    value = (points[b, 1] - points[a, 1]) * (points[c, 0] - points[a, 0])
    value -= (points[b, 0] - points[a, 0]) * (points[c, 1] - points[a, 1])
    return (value > 0) - (value < 0)


@njit(cache=True, nogil=True)
@no_type_check
def _crosses(points, limit):
    """Whether two edges of a ring cross properly; False as well where that is not known after ``limit`` pairs."""
    n = points.shape[0]
    top = np.empty(n)
    for i in range(n):
        top[i] = min(points[i, 0], points[(i + 1) % n, 0])
    order = np.argsort(top)
    for k in range(n):
        a = order[k]
        b = (a + 1) % n
        bottom = max(points[a, 0], points[b, 0])
        left, right = min(points[a, 1], points[b, 1]), max(points[a, 1], points[b, 1])
        for m in range(k + 1, n):
            c = order[m]
            d = (c + 1) % n
            limit -= 1
            if top[c] > bottom or limit < 0:
                break
            if max(points[c, 1], points[d, 1]) < left or min(points[c, 1], points[d, 1]) > right:
                continue
            apart = _side(points, a, b, c) * _side(points, a, b, d) < 0
            if apart and _side(points, c, d, a) * _side(points, c, d, b) < 0:
                return True
    return False


@njit(cache=True, nogil=True)
@no_type_check
def crossed_rings(points, ring_start):
    """Return how many rings cross themselves, as far as some hundred pairs of edges for each edge tell."""
    count = 0
    for r in range(ring_start.shape[0] - 1):
        ring = points[ring_start[r] : ring_start[r + 1]]
        count += _crosses(ring, 256 * ring.shape[0])
    return count
