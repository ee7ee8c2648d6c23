import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.nn import halo
from foveate.nn.halo import HaloConv, HaloMaps, by_chunks, halo_pad


def mixed_leaves(num_dims: int) -> Leaves:
    """A 24 x 20 (x 20) image: fine 4-pixel leaves in one corner, 8-pixel leaves elsewhere, the border passed over."""
    shape = (24, 20, 20)[:num_dims]
    coarse = uniform_leaves(shape, 8)
    steps = torch.cartesian_prod(*[torch.arange(2)] * num_dims) * 4
    fine = coarse.start[0] + steps
    start = torch.cat([fine, coarse.start[1:]])
    scale = torch.tensor([0] * len(fine) + [1] * (len(coarse) - 1))
    size = torch.where(scale[:, None] == 0, 4, 8).expand(-1, num_dims).contiguous()
    return Leaves(start, size, scale, shape, ((4,) * num_dims, (8,) * num_dims))


def dense(rows: Tensor, leaves: Leaves, p: int) -> Tensor:
    """Rows of a uniform grid of p-pixel leaves to the image [1, C, *S]."""
    image = rows.new_zeros((rows.shape[1], *leaves.shape))
    for leaf, start in zip(rows.view(len(leaves), -1, rows.shape[1]), leaves.start.tolist(), strict=True):
        where = tuple(slice(at, at + p) for at in start)
        image[(slice(None), *where)] = leaf.t().reshape(-1, *(p,) * leaves.num_dims)
    return image[None]


def oracle_index(leaves: Leaves, p: int) -> np.ndarray:
    """The sample under the centre of every padded cell, one point at a time; a border cell counts whole."""
    starts, sizes = leaves.start.numpy(), leaves.size.numpy()
    table = []
    for leaf, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        for cell in np.ndindex(*(p + 2,) * leaves.num_dims):
            at = np.array(cell) - 1
            if ((at >= 0) & (at < p)).all():
                table.append(leaf * p**leaves.num_dims + int(np.ravel_multi_index(at, (p,) * leaves.num_dims)))
                continue
            point = start + (at + 0.5) * size / p
            hit = np.flatnonzero(((starts <= point) & (point < starts + sizes)).all(1))
            if len(hit) == 0:
                table.append(-1)
                continue
            sample = np.floor((point - starts[hit[0]]) * p / sizes[hit[0]]).astype(int)
            table.append(hit[0] * p**leaves.num_dims + int(np.ravel_multi_index(sample, (p,) * leaves.num_dims)))
    return np.array(table).reshape(len(leaves), -1)


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_equals_the_zero_padded_dense_convolution(num_dims: int, p: int) -> None:
    torch.manual_seed(0)
    leaves = uniform_leaves(tuple(p * k for k in (3, 4, 2)[:num_dims]), p)
    conv = HaloConv(num_dims, 3, 5).double()
    rows = torch.randn(len(leaves) * p**num_dims, 3, dtype=torch.float64, requires_grad=True)
    image = dense(rows.detach(), leaves, p).requires_grad_()
    weight, bias = (part.detach().clone().requires_grad_() for part in (conv.weight, conv.bias))
    expected = (functional.conv2d if num_dims == 2 else functional.conv3d)(image, weight, bias, padding=1)
    found = conv(rows, HaloMaps([leaves]).at(p))
    torch.testing.assert_close(dense(found, leaves, p), expected)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(dense(rows.grad, leaves, p), image.grad)
    torch.testing.assert_close(conv.weight.grad, weight.grad)
    torch.testing.assert_close(conv.bias.grad, bias.grad)


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_maps_hold_the_sample_under_each_halo_centre(num_dims: int, p: int) -> None:
    leaves = mixed_leaves(num_dims)
    np.testing.assert_array_equal(HaloMaps([leaves]).at(p).numpy(), oracle_index(leaves, p))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_gradient_is_the_numerical_one(num_dims: int) -> None:
    torch.manual_seed(0)
    leaves = mixed_leaves(num_dims)
    index_TH = HaloMaps([leaves]).at(2)
    rows = torch.randn(len(leaves) * 2**num_dims, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*index_TH.shape, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (halo_pad(x, index_TH) * weight).sum(), (rows,))


def test_images_of_a_pack_never_see_each_other() -> None:
    torch.manual_seed(0)
    one, two = mixed_leaves(2), uniform_leaves((16, 16), 8)
    conv = HaloConv(2, 2, 2)
    rows = torch.randn((len(one) + len(two)) * 16, 2)
    cut = len(one) * 16
    together = conv(rows, HaloMaps([one, two]).at(4))
    torch.testing.assert_close(together[:cut], conv(rows[:cut], HaloMaps([one]).at(4)))
    torch.testing.assert_close(together[cut:], conv(rows[cut:], HaloMaps([two]).at(4)))


def test_tables_are_made_once() -> None:
    maps = HaloMaps([mixed_leaves(2)])
    assert maps.at(2) is maps.at(2)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves = mixed_leaves(2)
    conv, rows, index_TH = HaloConv(2, 3, 3), torch.randn(len(leaves) * 16, 3), HaloMaps([leaves]).at(4)
    whole = conv(rows, index_TH)
    monkeypatch.setattr(halo, "CHUNK", 100)
    with torch.no_grad():
        parts = by_chunks(lambda start, stop: conv(rows, index_TH[start:stop]), len(leaves), 16, 3)
    torch.testing.assert_close(parts, whole)


def test_messages() -> None:
    with pytest.raises(ConfigError, match=r"num_dims=1: leaves are 2-D or 3-D; pass 2 or 3"):
        HaloConv(1, 3, 3)
    with pytest.raises(ShapeError, match=r"halo index of 7 cells per leaf: it must be \(p\+2\)\^2; take it from"):
        HaloConv(2, 3, 3)(torch.zeros(4, 3), torch.zeros(1, 7, dtype=torch.int64))
