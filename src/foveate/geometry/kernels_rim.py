"""Numbering the samples that some leaves need of others (numba): each once, in the order in which they are met."""
# no_type_check: the shape checker of the tests must not wrap what is compiled
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import no_type_check

from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def number_rows(row, offset, samples, slot, first, number, rim, count, index):
    """Write to ``index`` where each row of samples is found; return how many rows of other leaves are known by now.

    Rows of a leaf with a slot lie in that slot; the others follow from ``first`` on, get their ``number`` when they are
    met first, and are listed in ``rim`` and counted by ``count``. Negative rows stay -1; ``offset`` is added to others.
    """
    for i in range(row.shape[0]):
        if row[i] < 0:
            index[i] = -1
            continue
        at = row[i] + offset
        leaf = at // samples
        if slot[leaf] >= 0:
            index[i] = slot[leaf] * samples + at - leaf * samples
            continue
        if number[at] < 0:
            number[at] = count
            rim[count] = at
            count += 1
        index[i] = first + number[at]
    return count
