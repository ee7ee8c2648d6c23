"""Area means of whole leaves, fast: bytes in 16-bit lanes, other pixels row by row.

For leaves inside the image whose size is a whole multiple of P; all others take the general loops of the patch kernels,
which are also the twin. The byte loops are written as generic vector IR, because runs of 8 or 16 samples are too short
for the compiler to vectorise. Legend: L leaves, C channels, P patch_size; shapes are (..., z, y, x).
"""
# mypy: ignore-errors

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OUT = 8  # samples per vector operation
ROWS = 128  # rows whose neighbouring bytes add up exactly in 16 bits
NEAR = 1 << 18  # bytes of a leaf that are fetched ahead
_F32 = ir.FloatType()


def _vector(bits, lanes):
    return ir.VectorType(ir.IntType(bits), lanes)


def _halves(builder, value, bits, lanes):
    """The sum of neighbouring lanes; ``bits`` wide after it."""
    kind = _vector(bits, lanes)
    both = builder.bitcast(value, kind)
    low = ir.Constant(kind, [(1 << bits // 2) - 1] * lanes)
    high = ir.Constant(kind, [bits // 2] * lanes)
    return builder.add(builder.and_(both, low), builder.lshr(both, high))


@no_type_check
def _reduce(columns):
    """Build the intrinsic that adds 8 sums of ``rows`` x ``columns`` bytes to ``sums[place:place + 8]``."""

    @intrinsic
    def reduce(context, flat, offset, stride, rows, sums, place):
        signature = types.void(flat, offset, stride, rows, sums, place)

        def build(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            target = context.make_array(signature.args[4])(context, builder, args[4]).data
            lanes = OUT * columns
            if columns == 1:
                total = cgutils.alloca_once_value(builder, ir.Constant(_vector(16, lanes), None))
            else:
                total = cgutils.alloca_once_value(builder, ir.Constant(_vector(16, lanes // 2), None))
            with cgutils.for_range(builder, args[3]) as loop:
                start = builder.add(args[1], builder.mul(loop.index, args[2]))
                where = builder.bitcast(builder.gep(data, [start]), _vector(8, lanes).as_pointer())
                pixels = builder.load(where, align=1)
                if columns == 1:
                    part = builder.zext(pixels, _vector(16, lanes))
                else:
                    part = _halves(builder, pixels, 16, lanes // 2)
                builder.store(builder.add(builder.load(total), part), total)
            value, bits, lanes = builder.load(total), 16, max(OUT, lanes // 2)
            while lanes > OUT:
                bits, lanes = bits * 2, lanes // 2
                value = _halves(builder, value, bits, lanes)
            if bits > 32:
                value = builder.trunc(value, _vector(32, OUT))
            elif bits < 32:
                value = builder.zext(value, _vector(32, OUT))
            real = ir.VectorType(_F32, OUT)
            where = builder.bitcast(builder.gep(target, [args[5]]), real.as_pointer())
            builder.store(builder.fadd(builder.load(where, align=4), builder.sitofp(value, real)), where, align=4)
            return context.get_dummy_value()

        return signature, build

    return reduce


_reduce_1, _reduce_2, _reduce_4, _reduce_8 = (_reduce(columns) for columns in (1, 2, 4, 8))


@intrinsic
@no_type_check
def _prefetch(context, flat, offset):
    """Ask for the cache line of one byte."""

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [data.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.gep(data, [args[1]]), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(flat, offset), build


@njit(cache=True, nogil=True)
@no_type_check
def _ask_for(flat, offset, stride, plane, deep, tall, wide):
    """Prefetch a box of bytes; leaves lie scattered, so the processor cannot guess the next one."""
    for z in range(deep):
        for y in range(tall):
            base = offset + z * plane + y * stride
            for x in range(0, wide, 64):
                _prefetch(flat, base + x)


@njit(cache=True, nogil=True)
@no_type_check
def _add_rows(flat, offset, stride, rows, columns, sums, count):
    """Add ``rows`` rows of bytes to ``count`` sums of ``columns`` neighbours each."""
    for first in range(0, rows, ROWS):
        num = min(ROWS, rows - first)
        base = offset + first * stride
        if columns == 1:
            for j in range(0, count, OUT):
                _reduce_1(flat, base + j, stride, num, sums, j)
        elif columns == 2:
            for j in range(0, count, OUT):
                _reduce_2(flat, base + 2 * j, stride, num, sums, j)
        elif columns == 4:
            for j in range(0, count, OUT):
                _reduce_4(flat, base + 4 * j, stride, num, sums, j)
        else:
            for j in range(0, count, OUT):
                _reduce_8(flat, base + 8 * j, stride, num, sums, j)


@njit(cache=True, nogil=True)
@no_type_check
def bytes_gather(image, start, ratio, which, sums, out):
    """Write the area means of leaves inside a uint8 image ``[C, D, H, W]``; P is a multiple of 8.

    Every ratio is a power of two along x, and a sample has at most 2**16 pixels, so that sums are exact in float32.
    ``sums`` is scratch of one row of the widest leaf.
    """
    flat = image.reshape(-1)
    deep, tall, wide = image.shape[1:]
    pz, py, px = out.shape[2], out.shape[3], out.shape[4]
    for n in range(which.shape[0]):
        leaf = which[n]
        rz, ry, rx = ratio[leaf, 0], ratio[leaf, 1], ratio[leaf, 2]
        columns = min(rx, 8)
        group = rx // columns
        count = px * group
        pixels = np.float32(rz * ry * rx)
        for c in range(image.shape[0]):
            follow = c + 1 if c + 1 < image.shape[0] else 0
            ahead = leaf if follow > 0 else which[min(n + 1, which.shape[0] - 1)]
            az, ay, ax = pz * ratio[ahead, 0], py * ratio[ahead, 1], px * ratio[ahead, 2]
            if az * ay * ax <= NEAR:
                offset = ((follow * deep + start[ahead, 0]) * tall + start[ahead, 1]) * wide + start[ahead, 2]
                _ask_for(flat, offset, wide, tall * wide, az, ay, ax)
            for k in range(pz):
                for i in range(py):
                    if pixels == 1.0:
                        offset = ((c * deep + start[leaf, 0] + k) * tall + start[leaf, 1] + i) * wide + start[leaf, 2]
                        for j in range(px):
                            out[leaf, c, k, i, j] = flat[offset + j]
                        continue
                    for j in range(count):
                        sums[j] = np.float32(0)
                    for z in range(start[leaf, 0] + k * rz, start[leaf, 0] + (k + 1) * rz):
                        offset = ((c * deep + z) * tall + start[leaf, 1] + i * ry) * wide + start[leaf, 2]
                        _add_rows(flat, offset, wide, ry, columns, sums, count)
                    for j in range(px):
                        total = sums[j * group]
                        for x in range(j * group + 1, (j + 1) * group):
                            total += sums[x]
                        out[leaf, c, k, i, j] = total / pixels


@njit(cache=True, nogil=True)
@no_type_check
def _fold_row(acc, fold, width, ratio):
    """Sum runs of ``ratio`` neighbours of ``acc``; returns which row of ``fold`` holds the sums."""
    now = 0
    if ratio % 2 == 0:
        target = fold[0]
        for x in range(width // 2):
            target[x] = acc[2 * x] + acc[2 * x + 1]
        width, ratio = width // 2, ratio // 2
    else:
        target = fold[0]
        for x in range(width):
            target[x] = acc[x]
    while ratio % 2 == 0:
        source, target = fold[now], fold[1 - now]
        for x in range(width // 2):
            target[x] = source[2 * x] + source[2 * x + 1]
        width, ratio, now = width // 2, ratio // 2, 1 - now
    if ratio > 1:
        source, target = fold[now], fold[1 - now]
        for j in range(width // ratio):
            total = source[j * ratio]
            for x in range(j * ratio + 1, (j + 1) * ratio):
                total += source[x]
            target[j] = total
        now = 1 - now
    return now


@njit(cache=True, nogil=True)
@no_type_check
def inner_gather(image, start, ratio, which, acc, fold, out):
    """Write the area means of leaves that lie inside the image, ``out [L, C, PZ, PY, PX]``.

    ``acc`` holds one row of a leaf in a type in which ``ratio[0] * ratio[1]`` pixels are added exactly, ``fold`` two
    such rows in a type for whole samples.
    """
    pz, py, px = out.shape[2], out.shape[3], out.shape[4]
    for n in range(which.shape[0]):
        leaf = which[n]
        z0, y0, x0 = start[leaf, 0], start[leaf, 1], start[leaf, 2]
        rz, ry, rx = ratio[leaf, 0], ratio[leaf, 1], ratio[leaf, 2]
        width = rx * px
        pixels = float(rz * ry * rx)
        for c in range(image.shape[0]):
            for k in range(pz):
                for i in range(py):
                    if pixels == 1.0:
                        for j in range(px):
                            out[leaf, c, k, i, j] = image[c, z0 + k, y0 + i, x0 + j]
                        continue
                    for r in range(rz * ry):
                        line = image[c, z0 + k * rz + r // ry, y0 + i * ry + r % ry, x0 : x0 + width]
                        if r == 0:
                            for x in range(width):
                                acc[x] = line[x]
                        else:
                            for x in range(width):
                                acc[x] += line[x]
                    sums = fold[_fold_row(acc, fold, width, rx)]
                    for j in range(px):
                        out[leaf, c, k, i, j] = float(sums[j]) / pixels


@njit(cache=True, nogil=True)
@no_type_check
def sums_gather(sums, start, which, extent, ratio, out):
    """Write the area means of leaves from sums of pixels: ``sums [C, *S / extent]``, ``ratio`` sums per sample side."""
    pz, py, px = out.shape[2], out.shape[3], out.shape[4]
    pixels = float(ratio[0] * ratio[1] * ratio[2] * extent[0] * extent[1] * extent[2])
    for n in range(which.shape[0]):
        leaf = which[n]
        z0, y0, x0 = start[leaf, 0] // extent[0], start[leaf, 1] // extent[1], start[leaf, 2] // extent[2]
        for c in range(sums.shape[0]):
            for k in range(pz):
                for i in range(py):
                    for j in range(px):
                        total = 0.0
                        for z in range(z0 + k * ratio[0], z0 + (k + 1) * ratio[0]):
                            for y in range(y0 + i * ratio[1], y0 + (i + 1) * ratio[1]):
                                for x in range(x0 + j * ratio[2], x0 + (j + 1) * ratio[2]):
                                    total += sums[c, z, y, x]
                        out[leaf, c, k, i, j] = total / pixels


def gather(image, start, size, patch, which, out):
    """Write the area means of the leaves ``which`` into ``out`` where a fast loop fits; return the leaves left over.

    ``image [C, D, H, W]`` of any type; ``which`` are leaves inside the image whose size is a whole
    multiple of ``patch``.
    """
    ratio = size // np.asarray(patch)
    if image.dtype == np.uint8:
        wide = ratio[which, 2]
        fits = (wide & (wide - 1) == 0) & (ratio[which].prod(axis=1) <= 1 << 16) & (out.shape[4] % OUT == 0)
        if fits.any() and image.flags.c_contiguous:
            bytes_gather(image, start, ratio, which[fits], np.empty(int(size[:, 2].max()), np.float32), out)
            return which[~fits]
    elif image.dtype.kind == "f":
        width = int(size[:, 2].max())
        inner_gather(image, start, ratio, which, np.empty(width), np.empty((2, width)), out)
        return which[:0]
    return which
