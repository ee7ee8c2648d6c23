"""The hot loop of resampling a window; its twin in plain numpy is `blend_slow`, and the tests prove them equal.

Legend: H W pixels in, O Q pixels out, C channels, T taps.
"""

from typing import Any, no_type_check

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True, nogil=True)
@no_type_check
def blend(source, first_y, weight_y, first_x, weight_x, row, out):  # noqa: D103
    channels = source.shape[2]
    width = source.shape[1] * channels
    flat = source.reshape(source.shape[0], width)
    for y in range(len(first_y)):
        row[:] = 0
        for tap in range(weight_y.shape[1]):
            weight = weight_y[y, tap]
            if weight != 0:
                line = flat[first_y[y] + tap]
                for x in range(width):
                    row[x] += weight * line[x]
        for x in range(len(first_x)):
            start = first_x[x] * channels
            for channel in range(channels):
                total = weight_x[x, 0] * row[start + channel]
                for tap in range(1, weight_x.shape[1]):
                    total += weight_x[x, tap] * row[start + tap * channels + channel]
                out[y, x, channel] = total


def blend_slow(source: Array, first_y: Array, weight_y: Array, first_x: Array, weight_x: Array) -> Array:
    """What ``blend`` computes, as two products with dense matrices.

    Args:
        source: ``[H, W, C]``.
        first_y, first_x: First pixel of each sample ``[O]``, ``[Q]``.
        weight_y, weight_x: Share of each of its pixels ``[O, T]``, ``[Q, T]``.

    Returns:
        ``[O, Q, C]`` in float64.
    """
    dense = []
    for first, weight, side in ((first_y, weight_y, source.shape[0]), (first_x, weight_x, source.shape[1])):
        matrix = np.zeros((len(first), side))
        for tap in range(weight.shape[1]):
            matrix[np.arange(len(first)), first + tap] += weight[:, tap]
        dense.append(matrix)
    return np.asarray(np.einsum("oh,hwc,qw->oqc", dense[0], source.astype(np.float64), dense[1], optimize=True))
