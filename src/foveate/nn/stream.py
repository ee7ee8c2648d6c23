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
_PIXEL_ROWS, _FEATURE_ROWS = 32, 512
_MOST_CONSTANTS = 4096


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
        index: their positions, counted through all bags, each position in one value alone.
        x: one vector for each distinct patch.
        row: which vector each position has.
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
    """Read and encode patches of one bag, see `encoded_bags`."""
    return encoded_bags(encode, [(source, index)], chunk, device=device, workers=workers)


def encoded_bags(
    encode: Encode,
    bags: Sequence[tuple[PatchSource, Tensor]],
    chunk: int,
    *,
    device: torch.device,
    workers: int = 0,
) -> Iterator[Vectors]:
    """Read and encode patches, in whatever order comes cheapest; every position comes out once.

    A patch that is one constant (a blank one) is encoded once per value, and one that its source knows to be blank is
    not even read. Bags share the blocks that are encoded. The vectors do not depend on ``chunk``, ``workers``, the
    order of an index or the other bags; on the CPU to the bit.

    Args:
        encode: takes ``[R, C, *P]`` or ``[R, F]`` float32 to ``[R, D]``, each row by itself.
        bags: what is read, and which patches of it.
        chunk: patches read at a time.
        device: where they are encoded.
        workers: threads that read ahead; 0: read when needed.

    Cost: memory of ``(workers + 1) * chunk`` patches, and of one block inside the encoder.
    """
    pending = _Pending(encode)
    for part, pixels in _reads(_parts(bags, chunk), workers):
        pending.add(part.before + part.index, pixels.to(device), part.before + part.same)
        yield from pending.blocks(last=False)
    yield from pending.blocks(last=True)


@dataclass(frozen=True, eq=False)
class _Part:
    """Positions of a source that are read at once, those that equal the first of them, and how many lie before."""

    source: PatchSource
    index: Int64[Tensor, " R"]
    same: Int64[Tensor, " S"]
    before: int


def _parts(bags: Sequence[tuple[PatchSource, Tensor]], chunk: int) -> Iterator[_Part]:
    before = 0
    for source, index in bags:
        known, blank = constant_of(source), index[:0]
        if known is not None:
            is_blank = known[index]
            blank = index[is_blank]
            index = torch.cat([blank[:1], index[~is_blank]])
        for place, part in enumerate(index.split(chunk) if len(index) else ()):
            yield _Part(source, part, blank[1:] if place == 0 else blank[:0], before)
        before += len(source)


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
    """Distinct patches that wait for their block, and who they stand for."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._pixels: list[Tensor] = []
        self._num = 0  # rows that wait
        self._index: list[Tensor] = []
        self._row: list[Tensor] = []  # counted in the rows that wait
        self._waiting: dict[bytes, int] = {}  # constants, by value
        self._known: dict[bytes, Tensor] = {}
        self._ready: list[Vectors] = []

    def add(self, at: Tensor, pixels: Tensor, same: Tensor) -> None:
        """Patches ``pixels`` at ``at``; those at ``same`` equal the first one."""
        plain = torch.ones(len(at), dtype=torch.bool)
        if pixels.ndim > 2:
            flat = pixels.flatten(2)
            plain = ~(flat == flat[..., :1]).all(2).all(1).cpu()
            self._add_constants(at[~plain], pixels[~plain.to(pixels.device)], same if not plain[0] else same[:0])
        if len(same) and bool(plain[0]):
            self._queue(torch.cat([at[:1], same]), pixels[:1])
            plain[0] = False
        if bool(plain.any()):
            self._pixels.append(pixels if bool(plain.all()) else pixels[plain.to(pixels.device)])
            rows = len(self._pixels[-1])
            self._index.append(at[plain])
            self._row.append(torch.arange(self._num, self._num + rows))
            self._num += rows

    def _queue(self, at: Tensor, pixels: Tensor) -> None:
        """One row that stands for all of ``at``."""
        self._pixels.append(pixels)
        self._index.append(at)
        self._row.append(torch.full((len(at),), self._num))
        self._num += 1

    def _add_constants(self, at: Tensor, pixels: Tensor, same: Tensor) -> None:
        if not len(at):
            return
        rows = np.ascontiguousarray(pixels.flatten(2)[..., 0].cpu().numpy())
        values, inverse = np.unique(rows.view(np.dtype((np.void, rows[0].nbytes)))[:, 0], return_inverse=True)
        which = torch.from_numpy(inverse)
        for place, value in enumerate(values):
            key, mine = value.tobytes(), at[which == place]
            if len(same) and place == int(which[0]):
                mine = torch.cat([mine, same])
            if key in self._known:
                self._ready.append(Vectors(mine, self._known[key], torch.zeros_like(mine)))
            elif key in self._waiting:
                self._index.append(mine)
                self._row.append(torch.full((len(mine),), self._waiting[key]))
            else:
                self._waiting[key] = self._num
                self._queue(mine, pixels[which.to(pixels.device) == place][:1])

    def blocks(self, *, last: bool) -> Iterator[Vectors]:
        """What can be had now: whole blocks, or everything."""
        ready, self._ready = self._ready, []
        yield from ready
        if not self._num:
            return
        rows = block_rows(self._pixels[0])
        num = self._num if last else self._num // rows * rows
        if not num:
            return
        index, row = torch.cat(self._index), torch.cat(self._row)
        x_UD = torch.cat([self._block(min(rows, num - start), rows) for start in range(0, num, rows)])
        for key in [key for key, place in self._waiting.items() if place < num]:
            place = self._waiting.pop(key)
            if len(self._known) < _MOST_CONSTANTS:
                self._known[key] = x_UD[place : place + 1].clone()
        self._waiting = {key: place - num for key, place in self._waiting.items()}
        done = row < num
        self._pixels = [pixels.clone() for pixels in self._pixels]  # lets go of the chunk that they are from
        self._index, self._row, self._num = [index[~done]], [row[~done] - num], self._num - num
        yield Vectors(index[done], x_UD, row[done])

    def _block(self, num: int, rows: int) -> Tensor:
        """Vectors of the first patches that wait, which are floats no sooner than here, and wait no longer."""
        parts = []
        while num:
            parts.append(as_float(self._pixels[0][:num]))
            num -= len(parts[-1])
            left = self._pixels[0][len(parts[-1]) :]
            self._pixels[:1] = [left] if len(left) else []
        return in_blocks(self._encode, parts[0] if len(parts) == 1 else torch.cat(parts), rows)
