"""The walk from the roots down: which cells are split, in the exact order of the published greedy algorithm.

Cells of all images of a batch live in one flat array of values, finest scale first. Two cells that wait at the same
time never overlap, so the order of their Morton codes is the preorder of the tree: (value descending, code ascending)
is the whole rule. Shapes: B images, K scales, L leaves.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import heapq
from typing import no_type_check

import numpy as np
from numba import njit

# columns of the integer table that describes waiting cells and leaves
IMAGE, SCALE, Z, Y, X = range(5)


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _before(value, code, image, i, j):
    """Whether waiting cell i is split before waiting cell j."""
    if value[i] != value[j]:
        return value[i] > value[j]
    if image[i] != image[j]:
        return image[i] < image[j]
    return code[i] < code[j]


@njit(cache=True, nogil=True)
@no_type_check
def _push(heap, size, node, value, code, image):
    i = size
    while i > 0:
        parent = (i - 1) // 2
        if not _before(value, code, image, node, heap[parent]):
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = node
    return size + 1


@njit(cache=True, nogil=True)
@no_type_check
def _pop(heap, size, value, code, image):
    size -= 1
    node = heap[size]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and _before(value, code, image, heap[child + 1], heap[child]):
            child += 1
        if not _before(value, code, image, heap[child], node):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = node
    return size


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _children(dims, ratio, image, scale, z, y, x):
    """Number of children inside the image along each axis."""
    below = dims[image, scale - 1]
    r = ratio[scale - 1]
    return min(r[0], below[0] - z * r[0]), min(r[1], below[1] - y * r[1]), min(r[2], below[2] - x * r[2])


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _child_code(ratio, scale, dz, dy, dx, flip):
    """Position of a child among its siblings: last axis fastest; ``flip`` turns the y axis over."""
    r = ratio[scale - 1]
    if flip and r[1] == 2:
        dy = 1 - dy
    return (dz * r[1] + dy) * r[2] + dx


@njit(cache=True, nogil=True)
@no_type_check
def best_first(values, offset, dims, ratio, shift, roots, codes, budget, floor, finest, flip):
    """Split the cells in the order (value descending, preorder ascending) until the budget is spent.

    ``values`` flat; ``offset [B, K]``, ``dims [B, K, 3]`` place the grid of every image and scale in it; ``ratio
    [K - 1, 3]`` is the split from scale k + 1 to k; ``shift [K]`` the bits below scale k. ``roots [R, 5]`` are the
    first cells. A cell is split while its value is above ``floor``. ``finest`` stops the whole walk when a cell of the
    finest scale comes up (published rule); otherwise such cells are leaves and the walk goes on.
    Returns the table of leaves ``[L, 5]`` and their codes ``[L]``, in no order.
    """
    num = roots.shape[0]
    room = budget + 8
    table = np.empty((room, 5), np.int64)
    value, code, image = np.empty(room), np.empty(room, np.int64), np.empty(room, np.int64)
    heap = np.empty(room, np.int64)
    size = 0
    for i in range(num):
        table[i], code[i], image[i] = roots[i], codes[i], roots[i, IMAGE]
        k = roots[i, SCALE]
        d = dims[image[i], k]
        if k > 0 or finest:
            value[i] = values[offset[image[i], k] + (roots[i, Z] * d[1] + roots[i, Y]) * d[2] + roots[i, X]]
            size = _push(heap, size, i, value, code, image)
    while size > 0:
        node = heap[0]
        k = table[node, SCALE]
        if k == 0 or not value[node] > floor:
            break
        b = image[node]
        z, y, x = table[node, Z], table[node, Y], table[node, X]
        nz, ny, nx = _children(dims, ratio, b, k, z, y, x)
        if num + nz * ny * nx - 1 > budget:
            break
        size = _pop(heap, size, value, code, image)
        r, d, base, start = ratio[k - 1], dims[b, k - 1], offset[b, k - 1], code[node]
        slot = node
        for dz in range(nz):
            for dy in range(ny):
                for dx in range(nx):
                    cz, cy, cx = z * r[0] + dz, y * r[1] + dy, x * r[2] + dx
                    table[slot, IMAGE], table[slot, SCALE] = b, k - 1
                    table[slot, Z], table[slot, Y], table[slot, X] = cz, cy, cx
                    image[slot] = b
                    code[slot] = start + (_child_code(ratio, k, dz, dy, dx, flip) << shift[k - 1])
                    if k > 1 or finest:
                        value[slot] = values[base + (cz * d[1] + cy) * d[2] + cx]
                        size = _push(heap, size, slot, value, code, image)
                    slot = num
                    num += 1
        num -= 1
    return table[:num], code[:num]


def best_first_eager(values, offset, dims, ratio, shift, roots, codes, budget, floor, finest, flip):
    """Plain Python twin of `best_first`."""

    def entry(image, scale, z, y, x, *, code):
        grid = dims[image, scale]
        value = values[offset[image, scale] + (z * grid[1] + y) * grid[2] + x] if scale > 0 or finest else 0.0
        return (-float(value), int(image), int(code), int(scale), int(z), int(y), int(x))

    waiting = [entry(*root, code=code) for root, code in zip(roots, codes, strict=True)]
    leaves = [] if finest else [cell for cell in waiting if cell[3] == 0]
    waiting = waiting if finest else [cell for cell in waiting if cell[3] > 0]
    heapq.heapify(waiting)
    while waiting:
        value, image, code, scale, z, y, x = waiting[0]
        if scale == 0 or not -value > floor:
            break
        r = ratio[scale - 1]
        counts = _children.py_func(dims, ratio, image, scale, z, y, x)
        if len(waiting) + len(leaves) + int(np.prod(counts)) - 1 > budget:
            break
        heapq.heappop(waiting)
        for dz, dy, dx in np.ndindex(*map(int, counts)):
            bits = int(_child_code.py_func(ratio, scale, dz, dy, dx, flip))
            start = code + (bits << int(shift[scale - 1]))
            child = entry(image, scale - 1, z * r[0] + dz, y * r[1] + dy, x * r[2] + dx, code=start)
            if scale > 1 or finest:
                heapq.heappush(waiting, child)
            else:
                leaves.append(child)
    cells = [(image, scale, z, y, x) for _, image, _, scale, z, y, x in waiting + leaves]
    return np.array(cells, np.int64).reshape(-1, 5), np.array([cell[2] for cell in waiting + leaves], np.int64)


@njit(cache=True, nogil=True)
@no_type_check
def above_floor(values, offset, dims, ratio, shift, roots, codes, room, floor):
    """Split every cell whose value is above ``floor``; ``room`` bounds the leaves. Returns as `best_first`."""
    table = np.empty((room, 5), np.int64)
    code = np.empty(room, np.int64)
    stack = np.empty((roots.shape[0] + 8 * dims.shape[1] + 8, 5), np.int64)
    start = np.empty(stack.shape[0], np.int64)
    size = roots.shape[0]
    stack[:size] = roots
    start[:size] = codes
    num = 0
    while size > 0:
        size -= 1
        b, k, z, y, x = stack[size, IMAGE], stack[size, SCALE], stack[size, Z], stack[size, Y], stack[size, X]
        d = dims[b, k]
        if k == 0 or not values[offset[b, k] + (z * d[1] + y) * d[2] + x] > floor:
            table[num] = stack[size]
            code[num] = start[size]
            num += 1
            continue
        nz, ny, nx = _children(dims, ratio, b, k, z, y, x)
        r, first = ratio[k - 1], start[size]
        for dz in range(nz):
            for dy in range(ny):
                for dx in range(nx):
                    stack[size, IMAGE], stack[size, SCALE] = b, k - 1
                    stack[size, Z], stack[size, Y], stack[size, X] = z * r[0] + dz, y * r[1] + dy, x * r[2] + dx
                    start[size] = first + (_child_code(ratio, k, dz, dy, dx, False) << shift[k - 1])
                    size += 1
    return table[:num], code[:num]
