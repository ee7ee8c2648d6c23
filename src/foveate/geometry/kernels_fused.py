"""The first four merges of a uint8 picture in one touch: 2, 4, 8 and 16 pixels per sample while a band is in cache.

Reading the picture is most of the cost, so the inner loop is written in 16-bit lanes: sums of up to 16 x 16 bytes fit
in uint16, their Haar details in int16, and squares of neighbouring lanes are added in int32. A plain loop over numba
integers would compute in 64 bits. The IR is generic (no instruction of one processor); `haar_step` is the twin.

For a block of four sums a b / c d:  4 a^2 + 4 b^2 + 4 c^2 + 4 d^2 - (a + b + c + d)^2
= 2 (a - b)^2 + 2 (c - d)^2 + (a + b - c - d)^2.
"""
# mypy: ignore-errors

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 32
BAND = 16
_I16, _I32 = ir.IntType(16), ir.IntType(32)
# rows of samples whose squares an int32 column can hold, per merge
_HOLD = (4096, 256, 16, 1)


def _vector(element, lanes):
    return ir.VectorType(element, lanes)


def _const(element, lanes, value):
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _pick(builder, value, first):
    """Every second lane, from ``first``."""
    chosen = ir.Constant(_vector(_I32, LANES), list(range(first, 2 * LANES, 2)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), chosen)


def _square_pairs(builder, value):
    """a^2 + b^2 of neighbouring int16 lanes, as int32."""
    half = LANES // 2
    both = builder.bitcast(value, _vector(_I32, half))
    shift = _const(_I32, half, 16)
    high = builder.ashr(both, shift)
    low = builder.ashr(builder.shl(both, shift), shift)
    return builder.add(builder.mul(low, low), builder.mul(high, high))


@no_type_check
def _merge(packed):
    """Build the intrinsic that merges 32 blocks of two rows; ``packed``: the rows are bytes, else uint16."""

    @intrinsic
    def merge(context, above, below, sums, acc, x):
        signature = types.void(above, below, sums, acc, x)

        def build(context, builder, signature, args):
            index = args[4]
            data = [
                context.make_array(kind)(context, builder, value).data
                for kind, value in zip(signature.args[:4], args[:4], strict=True)
            ]

            def place(pointer, i, element, lanes):
                return builder.bitcast(builder.gep(pointer, [i]), _vector(element, lanes).as_pointer())

            one = ir.Constant(index.type, 1)
            twice = builder.shl(index, one)
            parts = []
            for pointer in data[:2]:
                if packed:
                    both = builder.load(place(pointer, twice, _I16, LANES), align=1)
                    parts += [builder.and_(both, _const(_I16, LANES, 255)), builder.lshr(both, _const(_I16, LANES, 8))]
                else:
                    both = builder.load(place(pointer, twice, _I16, 2 * LANES), align=2)
                    parts += [_pick(builder, both, 0), _pick(builder, both, 1)]
            a, b, c, d = parts
            top, bottom = builder.add(a, b), builder.add(c, d)
            builder.store(builder.add(top, bottom), place(data[2], index, _I16, LANES), align=2)
            side = builder.add(_square_pairs(builder, builder.sub(a, b)), _square_pairs(builder, builder.sub(c, d)))
            total = builder.add(builder.add(side, side), _square_pairs(builder, builder.sub(top, bottom)))
            column = place(data[3], builder.lshr(index, one), _I32, LANES // 2)
            builder.store(builder.add(builder.load(column, align=4), total), column, align=4)
            return context.get_dummy_value()

        return signature, build

    return merge


_merge_bytes = _merge(True)
_merge_words = _merge(False)


@njit(cache=True, nogil=True)
@no_type_check
def _tail(above, below, sums, acc, first, count):
    for x in range(first, count):
        a, b, c, d = int(above[2 * x]), int(above[2 * x + 1]), int(below[2 * x]), int(below[2 * x + 1])
        sums[x] = a + b + c + d
        acc[x // 2] += 2 * (a - b) * (a - b) + 2 * (c - d) * (c - d) + (a + b - c - d) * (a + b - c - d)


@njit(cache=True, nogil=True)
@no_type_check
def _byte_row(above, below, sums, acc, count):
    full = count - count % LANES
    for x in range(0, full, LANES):
        _merge_bytes(above, below, sums, acc, x)
    _tail(above, below, sums, acc, full, count)


@njit(cache=True, nogil=True)
@no_type_check
def _word_row(above, below, sums, acc, count):
    full = count - count % LANES
    for x in range(0, full, LANES):
        _merge_words(above, below, sums, acc, x)
    _tail(above, below, sums, acc, full, count)


@njit(cache=True, nogil=True)
@no_type_check
def _flush(acc, count, energy, block, scale):
    """Add the columns, two samples each, to the cells they lie in and clear them."""
    half = block // 2
    for g in range((count + block - 1) // block):
        total = 0
        for x in range(g * half, min((g + 1) * half, (count + 1) // 2)):
            total += acc[x]
            acc[x] = 0
        energy[g] += total * scale


@njit(cache=True, nogil=True)
@no_type_check
def fused_merge(image, sums, energies, blocks):
    """Merge a uint8 picture ``[C, H, W]`` four times; H and W are multiples of 16.

    ``sums`` float32 ``[C, H / 16, W / 16]`` receives the sums of 16 x 16 pixels. ``energies`` are four float64 grids of
    cells that gain the squared error of each merge; ``blocks [4, 2]`` are the samples per cell along y and x after it,
    even along x.
    """
    channels, tall, wide = image.shape
    rows1 = np.empty((8, wide // 2), np.uint16)
    rows2 = np.empty((4, wide // 4), np.uint16)
    rows3 = np.empty((2, wide // 8), np.uint16)
    rows4 = np.empty(wide // 16, np.uint16)
    acc = np.zeros((4, wide // 4 + 1), np.int32)
    held = np.zeros(4, np.int64)
    for c in range(channels):
        for band in range(tall // BAND):
            for level in range(4):
                count = wide >> (level + 1)
                for y in range(8 >> level):
                    if level == 0:
                        top = band * BAND + 2 * y
                        _byte_row(image[c, top], image[c, top + 1], rows1[y], acc[0], count)
                    elif level == 1:
                        _word_row(rows1[2 * y], rows1[2 * y + 1], rows2[y], acc[1], count)
                    elif level == 2:
                        _word_row(rows2[2 * y], rows2[2 * y + 1], rows3[y], acc[2], count)
                    else:
                        _word_row(rows3[0], rows3[1], rows4, acc[3], count)
                    row = band * (8 >> level) + y
                    held[level] += 1
                    last = row + 1 == tall >> (level + 1)
                    if last or (row + 1) % blocks[level, 0] == 0 or held[level] == _HOLD[level]:
                        line = energies[level][row // blocks[level, 0]]
                        _flush(acc[level], count, line, blocks[level, 1], 0.25 / (1 << (2 * level)))
                        held[level] = 0
            for x in range(wide // 16):
                sums[c, band, x] = rows4[x]
