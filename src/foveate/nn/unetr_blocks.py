"""UNETR's blocks, run channels-last with little memory: MONAI's modules hold the weights, these functions use them.

A channels-last convolution, and above all a transposed one, is much faster on the CPU, and normalisation and activation
work in place on its result. A join never copies its two inputs into one: a convolution of a concatenation is the sum of
two. Everything is for one image at a time.

Legend: C channels, S spatial extent, N dimensions.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_EPS, _SLOPE = 1e-5, 0.01  # of MONAI's instance norm and leaky relu
_FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    """The same numbers, the channels of a place side by side in memory; no view, so that it may be overwritten."""
    return x.contiguous(memory_format=_FORMAT[x.ndim])


def convolve(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of the concatenated channels of ``parts``, zeros around, as many places out as in.

    Args:
        parts: each ``[1, C_i, *S]``, channels-last.
        weight: ``[C_out, sum(C_i), *k]`` with one odd k.
        bias: ``[C_out]``.
    """
    if weight.shape[-1] == 1:
        kind, dtype = parts[0].device.type, parts[0].dtype
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        out: Tensor = _Pointwise.apply(weight.flatten(1), bias, *(part.to(dtype) for part in parts))
        return out
    conv = functional.conv2d if parts[0].ndim == 4 else functional.conv3d
    ends = [0, *accumulate(part.shape[1] for part in parts)]
    pairs = [_four(part, weight[:, a:b]) for part, (a, b) in zip(parts, pairwise(ends), strict=True)]
    outs = [channels_last(conv(x, own, padding=weight.shape[-1] // 2)) for x, own in pairs]
    return sum(outs[1:], outs[0] if bias is None else outs[0] + bias.view(-1, *(1,) * (parts[0].ndim - 2)))


class _Pointwise(torch.autograd.Function):
    """A convolution with kernel 1, as a matrix product into memory that is no view, so that it may be overwritten."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ends = [0, *accumulate(part.shape[1] for part in parts)]
        shape = (1, len(weight), *parts[0].shape[2:])
        out = torch.empty(shape, dtype=parts[0].dtype, device=weight.device, memory_format=_FORMAT[len(shape)])
        rows = _rows(out).flatten(0, 1)
        rows.copy_(bias.expand_as(rows)) if bias is not None else rows.zero_()
        for part, (a, b) in zip(parts, pairwise(ends), strict=True):
            rows.addmm_(_rows(part).flatten(0, 1), weight[:, a:b].t().to(part.dtype))
        ctx.save_for_backward(weight, *parts)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        rows = _rows(channels_last(gradient)).flatten(0, 1)
        own = torch.cat([rows.t() @ _rows(part).flatten(0, 1) for part in parts], 1).to(weight.dtype)
        bias = (rows.new_ones(1, len(rows)) @ rows)[0].to(weight.dtype) if ctx.has_bias else None
        grads, end = [], 0
        for part, needed in zip(parts, ctx.needs_input_grad[2:], strict=True):
            end += part.shape[1]
            grad = None
            if needed:
                grad = torch.empty_like(part)
                torch.mm(rows, weight[:, end - part.shape[1] : end].to(rows.dtype), out=_rows(grad).flatten(0, 1))
            grads.append(grad)
        return own, bias, *grads


def _four(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros up to four channels: kernels for fewer are slower, and a single one has no layout."""
    lack = max(4 - x.shape[1], 0)
    if not lack:
        return x, weight
    pad = (0, 0) * (x.ndim - 2) + (0, lack)
    return channels_last(functional.pad(x, pad)), functional.pad(weight, pad)


def enlarge(x: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution with stride and kernel 2: every place becomes 2^N, none of them overlaps."""
    conv = functional.conv_transpose2d if x.ndim == 4 else functional.conv_transpose3d
    return channels_last(conv(x, weight, stride=2))


def pool(x: Tensor) -> Tensor:
    """Mean of 3^N places, zeros around counted, at every other place."""
    mean = functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d
    wide = functional.pad(x if x.dtype == torch.float64 else x.float(), (1, 1) * (x.ndim - 2))
    return channels_last(mean(wide, 3, 2).to(x.dtype))  # in half precision the CPU has no kernel


def normalise(x: Tensor, slope: float = _SLOPE) -> Tensor:
    """Zero mean and unit variance of every channel, then a leaky relu; **overwrites** ``x`` where it can.

    Args:
        x: the result of a convolution, ``[1, C, *S]``, channels-last, not used otherwise.
        slope: of the leaky relu; 1 for none.
    """
    if x.device.type != "cuda" and x.dtype in (torch.float32, torch.float64):
        out: Tensor = _Normalise.apply(x, slope)
        return out
    if math.prod(x.shape[2:]) == 1:  # a place alone is its own mean
        return x * 0
    x = functional.batch_norm(x, None, None, training=True, eps=_EPS)
    return x if slope == 1 else functional.leaky_relu_(x, slope)


class _Normalise(torch.autograd.Function):
    """In place, and the backward pass needs the result alone, which the next convolution keeps anyway.

    Sums over places are products with ones and of the channels with each other, 5 times as fast on the CPU as
    reductions over the long axis; each of at most S_0 pieces is summed by itself, the pieces in double precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        rows, places = _rows(x), math.prod(x.shape[2:])
        rows.sub_(_sum(rows, places))
        factor = (_sum_of_products(rows, rows, places) + _EPS).rsqrt()
        rows.mul_(factor)
        if slope != 1:
            functional.leaky_relu_(x, slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, factor)
        ctx.slope = slope
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, factor = ctx.saved_tensors
        places, slope = math.prod(y.shape[2:]), ctx.slope
        gradient = channels_last(gradient)
        if slope == 1:
            gradient, plain = gradient.clone(), y
        else:
            gradient = torch.ops.aten.leaky_relu_backward(gradient, y, slope, True)
            plain = functional.leaky_relu(y, 1 / slope)
        rows, own = _rows(gradient), _rows(plain)
        mean, product = _sum(rows, places), _sum_of_products(rows, own, places)
        rows.sub_(mean).addcmul_(own, product, value=-1).mul_(factor)
        return gradient, None


def _rows(x: Tensor) -> Tensor:
    """A view ``[S_0, the other places, C]`` of ``[1, C, *S]``, which is channels-last."""
    return x[0].movedim(0, -1).view(x.shape[2], -1, x.shape[1])


def _sum(rows: Tensor, places: int) -> Tensor:
    ones = rows.new_ones(len(rows), 1, rows.shape[1])
    return ((ones @ rows).double().sum((0, 1)) / places).to(rows.dtype)


def _sum_of_products(left: Tensor, right: Tensor, places: int) -> Tensor:
    product = (left.transpose(1, 2) @ right).diagonal(dim1=1, dim2=2)
    return (product.double().sum(0) / places).to(left.dtype)


def residual(block: Any, *parts: Tensor) -> Tensor:
    """MONAI's ``UnetResBlock`` on the concatenated channels of ``parts``."""
    out = normalise(convolve(parts, block.conv1.conv.weight))
    out = normalise(convolve((out,), block.conv2.conv.weight), 1.0)
    if hasattr(block, "conv3"):
        short = normalise(convolve(parts, block.conv3.conv.weight), 1.0)
    else:
        (short,) = parts
    whole = out + short if torch.is_grad_enabled() else out.add_(short)
    return functional.leaky_relu_(whole, _SLOPE)


def basic(block: Any, x: Tensor) -> Tensor:
    """MONAI's ``UnetrBasicBlock``."""
    return residual(block.layer, x)


def project(block: Any, x: Tensor) -> Tensor:
    """MONAI's ``UnetrPrUpBlock``: tokens of the grid, enlarged step by step."""
    x = enlarge(x, block.transp_conv_init.conv.weight)
    for up, conv in block.blocks:
        x = residual(conv, enlarge(x, up.conv.weight))
    return x


def join(block: Any, x: Tensor, skip: Tensor) -> Tensor:
    """MONAI's ``UnetrUpBlock``: enlarge, cut to the skip's extent, convolve the two together."""
    up = enlarge(x, block.transp_conv.conv.weight)
    if up.shape != skip.shape:
        for axis, side in enumerate(skip.shape[2:], 2):
            up = up.narrow(axis, 0, side)
        up = channels_last(up)
    return residual(block.conv_block, up, skip)


def last(block: Any, x: Tensor) -> Tensor:
    """MONAI's ``UnetOutBlock``: features to logits, place by place."""
    return convolve((x,), block.conv.conv.weight, block.conv.conv.bias)
