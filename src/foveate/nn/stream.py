"""Patches of any bags through an encoder without gradient: in blocks of one size, each distinct constant once.

Legend: N patches of a source, R patches read at a time, U distinct ones, D width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from foveate.geometry.patch_source import PatchSource, constant_of

Encode = Callable[[Tensor], Tensor]
_PIXEL_ROWS, _FEATURE_ROWS = 32, 1024
_MOST_CONSTANTS = 4096  # that wait


@contextmanager
def evaluating(*modules: object) -> Iterator[None]:
    """Evaluation mode inside; behind it, also after an error, every single module is in the mode that it was in."""
    flags = [(part, part.training) for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    try:
        for part, _ in flags:
            part.training = False
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def as_float(pixels: Shaped[Tensor, "R *rest"]) -> Float[Tensor, "R *rest"]:
    """Pixels of whole numbers as float32 in 0 to 1, others as float32 as they are."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def block_rows(pixels: Shaped[Tensor, "R *rest"]) -> int:
    """Patches that an encoder takes at a time: few images, many feature vectors, eight times as many on a device."""
    rows = _FEATURE_ROWS if pixels.ndim == 2 else _PIXEL_ROWS
    return rows if pixels.device.type == "cpu" else 8 * rows


def in_blocks(encode: Encode, x: Shaped[Tensor, "R *rest"], rows: int) -> Tensor:
    """``encode(x)`` in blocks of exactly ``rows``, the last one filled up with copies of a row.

    On the CPU the bits of a row then depend on the row alone: matrix products round the last bit another way when the
    number of rows changes, but not when rows change places (measured, one and two threads).

    Args:
        encode: takes rows to rows.
        x: at least one row.
        rows: at least 1.
    """
    outs = []
    for part in x.split(rows):
        lack = rows - len(part)
        full = torch.cat([part, part[:1].expand(lack, *part.shape[1:])]) if lack else part
        outs.append(encode(full)[: len(part)])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Some encoded patches.

    Args:
        index: their places in what was asked for, counted through all bags, each place in one value alone.
        x: one vector for each distinct patch.
        row: which vector each place has.
    """

    index: Int64[Tensor, " R"]
    x: Float[Tensor, "U D"]
    row: Int64[Tensor, " R"]


def encoded(
    encode: Encode,
    source: PatchSource,
    index: Int64[Tensor, " R"],
    chunk: int,
    *,
    device: torch.device,
    workers: int = 0,
) -> Iterator[Vectors]:
    """Read and encode patches of one bag, see `encoded_bags`; ``Vectors.index`` counts through the bag itself."""
    for part in encoded_bags(encode, [(source, index)], chunk, device=device, workers=workers):
        yield Vectors(index[part.index], part.x, part.row)


def encoded_bags(
    encode: Encode,
    bags: Sequence[tuple[PatchSource, Tensor]],
    chunk: int,
    *,
    device: torch.device,
    workers: int = 0,
    halves: bool = False,
) -> Iterator[Vectors]:
    """Read and encode patches, in whatever order comes cheapest; every place comes out once.

    A patch that is one constant (a blank one) is encoded once per value, and one that its source knows to be blank is
    not even read. Bags share the blocks that are encoded. The vectors do not depend on ``chunk``, ``workers``, the
    order of an index or the other bags; on the CPU to the bit.

    Args:
        encode: takes ``[R, C, *P]`` or ``[R, F]`` float32 to ``[R, D]``, each row by itself.
        bags: what is read, and which patches of it.
        chunk: patches read at a time.
        device: where they are encoded.
        workers: threads that read ahead; 0: read when needed.
        halves: whether ``encode`` takes float16 as well.

    Cost: memory of ``(workers + 1) * chunk`` patches, and of one block inside the encoder.
    """
    pending = _Pending(encode, halves)
    for part, pixels in _reads(_parts(bags, chunk), workers):
        pending.add(part.at, pixels.to(device), part.same)
        yield from pending.blocks(last=False)
    yield from pending.blocks(last=True)


@dataclass(frozen=True, eq=False)
class _Part:
    """Patches of a source that are read at once, their places, and the places of those that equal the first of them."""

    source: PatchSource
    index: Int64[Tensor, " R"]
    at: Int64[Tensor, " R"]
    same: Int64[Tensor, " S"]


def _parts(bags: Sequence[tuple[PatchSource, Tensor]], chunk: int) -> Iterator[_Part]:
    before = 0
    for source, index in bags:
        known, at = constant_of(source), torch.arange(len(index))
        same = at[:0]
        if known is not None:
            is_blank = known[index]
            blank, plain = is_blank.nonzero()[:, 0], (~is_blank).nonzero()[:, 0]
            at, same = torch.cat([blank[:1], plain]), blank[1:]
        for some in at.split(chunk) if len(at) else ():
            yield _Part(source, index[some], before + some, before + same)
            same = same[:0]
        before += len(index)


def _reads(parts: Iterator[_Part], workers: int) -> Iterator[tuple[_Part, Tensor]]:
    if workers == 0:
        yield from ((part, part.source.read(part.index)) for part in parts)
        return
    ahead: deque[tuple[_Part, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for part in parts:
            ahead.append((part, pool.submit(part.source.read, part.index)))
            if len(ahead) > workers:
                first, future = ahead.popleft()
                yield first, future.result()
        for part, future in ahead:
            yield part, future.result()


class _Pending:
    """Distinct patches that wait for their block, and the places that each stands for."""

    def __init__(self, encode: Encode, halves: bool) -> None:
        self._encode, self._halves = encode, halves
        self._pixels: list[Tensor] = []
        self._num = 0  # rows of pixels that wait
        self._at: list[Tensor] = []
        self._row: list[Tensor] = []  # counted in the rows that wait
        self._constants: dict[bytes, tuple[Tensor, list[Tensor]]] = {}  # by value: the patch, and its places

    def add(self, at: Tensor, pixels: Tensor, same: Tensor) -> None:
        """Patches ``pixels`` at ``at``; those at ``same`` equal the first one."""
        if pixels.ndim > 2:
            flat = pixels.flatten(2)
            constant = (flat == flat[..., :1]).all(2).all(1)
            if bool(constant.any()):
                here = constant.cpu()
                self._set_aside(at[here], pixels[constant], same if here[0] else same[:0])
                at, pixels, same = at[~here], pixels[~constant], same[:0] if here[0] else same
        if len(at):
            self._queue(at, pixels, same)

    def _queue(self, at: Tensor, pixels: Tensor, same: Tensor) -> None:
        row = torch.arange(self._num, self._num + len(at))
        self._at += [at, same]
        self._row += [row, row[:1].expand(len(same))]
        self._pixels.append(pixels)
        self._num += len(at)

    def _set_aside(self, at: Tensor, pixels: Tensor, same: Tensor) -> None:
        """Constants wait until all has been read, so that each value is encoded once."""
        rows = np.ascontiguousarray(pixels.flatten(2)[..., 0].cpu().numpy())
        values, inverse = np.unique(rows.view(np.dtype((np.void, rows[0].nbytes)))[:, 0], return_inverse=True)
        which = torch.from_numpy(inverse)
        for place, value in enumerate(values):
            mine = (which == place).nonzero()[:, 0]
            first = pixels[int(mine[0])]
            corner = (slice(None), *(slice(1),) * (first.ndim - 1))  # one pixel is all there is to keep
            _, places = self._constants.setdefault(value.tobytes(), (first[corner].clone().expand_as(first)[None], []))
            places += [at[mine], same] if place == int(which[0]) else [at[mine]]
        if len(self._constants) > _MOST_CONSTANTS:
            self._queue_constants()

    def _queue_constants(self) -> None:
        for pixels, places in self._constants.values():
            at = torch.cat(places)
            self._queue(at[:1], pixels, at[1:])
        self._constants = {}

    def blocks(self, *, last: bool) -> Iterator[Vectors]:
        """What can be had now: whole blocks, or everything."""
        if last:
            self._queue_constants()
        if not self._num:
            return
        rows = block_rows(self._pixels[0])
        num = self._num if last else self._num // rows * rows
        if not num:
            return
        at, row = torch.cat(self._at), torch.cat(self._row)
        x_UD = torch.cat([self._block(min(rows, num - start), rows) for start in range(0, num, rows)])
        done = row < num
        self._pixels = [pixels.clone() for pixels in self._pixels]  # lets go of the chunk that they are from
        self._at, self._row, self._num = [at[~done]], [row[~done] - num], self._num - num
        yield Vectors(at[done], x_UD, row[done])

    def _block(self, num: int, rows: int) -> Tensor:
        """Vectors of the first patches that wait, which are floats no sooner than here, and wait no longer."""
        parts = []
        while num:
            part = self._pixels[0][:num]
            parts.append(part if self._halves and part.is_floating_point() else as_float(part))
            num -= len(parts[-1])
            left = self._pixels[0][len(parts[-1]) :]
            self._pixels[:1] = [left] if len(left) else []
        return in_blocks(self._encode, parts[0] if len(parts) == 1 else torch.cat(parts), rows)
