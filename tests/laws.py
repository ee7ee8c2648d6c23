"""The laws that every reducer and every composition must keep, as functions that take the thing under test.

A *reducer* keeps or merges positions; its inverse puts them back. Each law takes plain callables, so that the same
suite runs over geometry, modules and whole models:

    inverse(encode, decode, value)
    padding_is_never_data(apply, x_BLD, valid_BL)       apply(x_BLD, valid_BL) -> y_BL...
    batch_invariance(apply, samples)                    apply([sample, ...]) -> [result, ...]
    chunk_invariance(apply, whole, chunks)              apply(chunk) -> the part of the whole that the chunk is
    order_invariance(apply, x_L, permutation)           apply(x_L) -> y_L
    deterministic(apply)                                apply() -> anything made of tensors
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Sample = TypeVar("Sample")


def tensors(value: Any) -> list[Tensor]:
    """Return every tensor inside a value made of tensors, arrays, sequences, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value)]
    if is_dataclass(value):
        return [part for field in fields(value) for part in tensors(getattr(value, field.name))]
    if isinstance(value, Mapping):
        return [part for key in sorted(value) for part in tensors(value[key])]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [part for item in value for part in tensors(item)]
    return []


def same(actual: Any, expected: Any, what: str, tolerance: float = 0.0) -> None:
    """Require equal tensors: to the bit, or within ``tolerance`` (absolute and relative)."""
    left, right = tensors(actual), tensors(expected)
    assert len(left) == len(right), f"{what}: {len(left)} tensors instead of {len(right)}"
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        if tolerance == 0.0:
            assert torch.equal(a, b), f"{what}: differs by {(a.double() - b.double()).abs().max():.3g}"
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def inverse(encode: Callable[[Any], Any], decode: Callable[[Any], Any], value: Any, *, tolerance: float = 0.0) -> None:
    """What was taken apart comes together again."""
    same(decode(encode(value)), value, "decode(encode(x)) is x", tolerance)


def padding_is_never_data(
    apply: Callable[[Tensor, Tensor], Tensor],
    x_BLD: Tensor,
    valid_BL: Tensor,
    *,
    extra: int = 3,
    tolerance: float = 0.0,
    backward: bool = True,
) -> None:
    """Neither the number nor the content of invalid tokens changes a valid output, forward or backward."""
    num_images, length = valid_BL.shape

    def run(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.detach().clone().requires_grad_(backward and x.is_floating_point())
        y = apply(x, valid)
        y_valid = y[:, :length][valid_BL]
        if not (x.requires_grad and y.requires_grad):
            return y_valid.detach(), None
        weight = torch.linspace(-1.0, 1.0, y_valid.numel(), dtype=y_valid.dtype).view(y_valid.shape)
        (gradient,) = torch.autograd.grad((y_valid * weight).sum(), x)
        assert not gradient[~valid].any(), "padding is never data: padding has a gradient"
        return y_valid.detach(), gradient[:, :length][valid_BL]

    plain = run(x_BLD, valid_BL)
    for junk in (0.0, 7.0, -1e4, 1e4):
        tail = x_BLD.new_full((num_images, extra, *x_BLD.shape[2:]), junk)
        filled = torch.where(valid_BL.view(*valid_BL.shape, *(1,) * (x_BLD.ndim - 2)), x_BLD, tail.flatten()[0])
        longer = torch.cat([filled, tail], dim=1)
        valid = torch.cat([valid_BL, valid_BL.new_zeros((num_images, extra))], dim=1)
        result = run(longer, valid)
        same(result[0], plain[0], f"padding is never data (forward, junk {junk})", tolerance)
        same([result[1]], [plain[1]], f"padding is never data (backward, junk {junk})", tolerance)


def batch_invariance(
    apply: Callable[[list[Sample]], Sequence[Any]], samples: Sequence[Sample], *, tolerance: float = 0.0
) -> None:
    """A sample gives the same alone, in any company and at any place."""
    alone = [apply([sample])[0] for sample in samples]
    together = apply(list(samples))
    assert len(together) == len(samples), f"batch of {len(samples)} gives {len(together)} results"
    turned = apply(list(samples)[::-1])[::-1]
    for place in range(len(samples)):
        same(together[place], alone[place], f"sample {place} in a batch is as alone", tolerance)
        same(turned[place], alone[place], f"sample {place} in a turned batch is as alone", tolerance)


def chunk_invariance(
    apply: Callable[[Any], Any], expected: Callable[[Any], Any], chunks: Iterable[Any], *, tolerance: float = 0.0
) -> None:
    """Work done in pieces gives the pieces of the work done at once."""
    for chunk in chunks:
        same(apply(chunk), expected(chunk), f"chunk {chunk} is its part of the whole", tolerance)


def order_invariance(
    apply: Callable[[Tensor], Tensor], x: Tensor, permutation: Tensor, *, dim: int = 0, tolerance: float = 0.0
) -> None:
    """Where order carries no meaning, a permuted input gives the permuted output."""
    expected = apply(x).index_select(dim, permutation)
    same(apply(x.index_select(dim, permutation)), expected, "permuted input gives permuted output", tolerance)


def deterministic(apply: Callable[[], Any]) -> None:
    """Two calls agree to the bit, and no global random state is read or moved.

    (Python's own generator is left out: the runtime shape checks draw from it.)
    """
    first = apply()
    torch.manual_seed(1234)
    states = (torch.get_rng_state().clone(), str(np.random.get_state()))  # noqa: NPY002
    second = apply()
    same(second, first, "two calls agree")
    assert torch.equal(torch.get_rng_state(), states[0]), "the global torch generator was used"
    assert str(np.random.get_state()) == states[1], "the global numpy generator was used"  # noqa: NPY002
