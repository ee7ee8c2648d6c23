"""Hot loops around a product of bytes: rows of features into bytes, and what the product gives back into numbers.

A row's bits depend on the row alone. Compiled when the module is imported, and kept on disk.

Legend: R rows, F features, D width.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import no_type_check

import numpy as np
from numba import njit

_MOST, _LEAST = np.float32(127), np.float32(1e-30)


@njit("void(f4[:, ::1], i1[:, ::1], f4[::1], f4)", cache=True, nogil=True, fastmath={"reassoc", "contract"})
@no_type_check
def rows_to_bytes(rows, out, scale, eps):
    """A layer norm without weights: whole numbers from -127 to 127, and what one of them is worth in each row.

    Args:
        rows: ``[R, F]``; one that holds NaN or infinities gets a scale that is none.
        out: ``[R, F]``, filled.
        scale: ``[R]``, filled.
        eps: added to the variance.
    """
    width = rows.shape[1]
    apart = np.empty(width, np.float32)  # from the mean
    bits = apart.view(np.int32)
    greatest = np.zeros(1, np.int32)
    for r in range(rows.shape[0]):
        total = np.float32(0)
        for f in range(width):
            total += rows[r, f]
        mean = total / np.float32(width)
        square = np.float32(0)
        for f in range(width):
            apart[f] = rows[r, f] - mean
            square += apart[f] * apart[f]
        most = np.int32(0)
        for f in range(width):  # without their sign, floats are ordered as their bits are
            most = max(most, bits[f] & np.int32(0x7FFFFFFF))
        greatest[0] = most
        worth = max(greatest.view(np.float32)[0], _LEAST) / _MOST
        inverse = np.float32(1) / worth
        for f in range(width):
            out[r, f] = np.int8(np.int32(np.rint(apart[f] * inverse)))
        scale[r] = worth / np.sqrt(square / np.float32(width) + eps)


@njit("void(i4[:, ::1], f4[::1], f4[::1], f4[::1], f4[:, ::1])", cache=True, nogil=True)
@no_type_check
def products_to_floats(products, row, column, bias, out):
    """What products of bytes are worth: ``products * row * column + bias``.

    Args:
        products: ``[R, D]``.
        row: ``[R]``, scale of each row.
        column: ``[D]``, scale of each output.
        bias: ``[D]``.
        out: ``[R, D]``, filled.
    """
    for r in range(products.shape[0]):
        for d in range(products.shape[1]):
            out[r, d] = np.float32(products[r, d]) * row[r] * column[d] + bias[d]
