import pytest
import torch

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import Patches
from foveate.nn.unetr import DenseDecoder, cells, sample_rows

WIDTH = 12


def mixed_leaves() -> Leaves:
    """A 16-pixel leaf beside four of 8 and two of 16, in an image of 30 x 28."""
    start = torch.tensor([[0, 0], [0, 16], [0, 24], [8, 16], [8, 24], [16, 0], [16, 16]])
    scale = torch.tensor([1, 0, 0, 0, 0, 1, 1])
    size = (8 * 2**scale)[:, None].expand(-1, 2).contiguous()
    return Leaves(start, size, scale, (30, 28), ((8, 8), (16, 16)))


def build(**settings: int) -> DenseDecoder:
    torch.manual_seed(1)
    defaults = {
        "num_dims": 2,
        "in_chans": 1,
        "num_classes": 2,
        "width": WIDTH,
        "patch_size": 4,
        "num_hidden": 2,
        "channels": 4,
    }
    return DenseDecoder(**(defaults | settings))


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("num_hidden", [1, 2, 5])
def test_shapes(num_dims: int, num_hidden: int) -> None:
    decoder = build(num_dims=num_dims, num_hidden=num_hidden, num_classes=3)
    leaves = uniform_leaves((8, 12, 8)[:num_dims], 4)
    hidden = tuple(torch.randn(len(leaves), WIDTH) for _ in range(num_hidden))
    logits = decoder(hidden, Patches(torch.randn(len(leaves), 1, *(4,) * num_dims), (leaves,)))
    assert logits.shape == (len(leaves), 3, *(4,) * num_dims)
    logits.square().sum().backward()
    assert [name for name, weight in decoder.named_parameters() if weight.grad is None] == []


def test_a_uniform_canvas_is_the_image() -> None:
    leaves = uniform_leaves((8, 12), 4)
    leaf = cells(leaves)
    row = sample_rows(leaves, leaf, 4)
    assert leaf.tolist() == [[0, 1, 2], [3, 4, 5]]
    y, x = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    assert torch.equal(row, leaf[y // 4, x // 4] * 16 + y % 4 * 4 + x % 4)


def test_a_large_leaf_covers_several_cells() -> None:
    leaf = cells(mixed_leaves())
    row = sample_rows(mixed_leaves(), leaf, 4)
    assert leaf.tolist() == [[0, 0, 1, 2], [0, 0, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]]
    assert row.shape == (16, 16)
    assert torch.equal(row[:8, :8], torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(row[:4, 8:12], 16 + torch.arange(16).view(4, 4))


def test_an_image_gives_the_same_alone_and_in_a_pack() -> None:
    decoder = build()
    one, two = mixed_leaves(), uniform_leaves((8, 12), 4)
    hidden = tuple(torch.randn(len(one) + len(two), WIDTH) for _ in range(2))
    pixels = torch.randn(len(one) + len(two), 1, 4, 4)
    cut = len(one)
    together = decoder(hidden, Patches(pixels, (one, two)))
    first = decoder(tuple(x[:cut] for x in hidden), Patches(pixels[:cut], (one,)))
    torch.testing.assert_close(together[:cut], first, rtol=0, atol=1e-6)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"patch_size=6: UNETR doubles resolution from 1; use a power of two >= 2"):
        build(patch_size=6)
    with pytest.raises(ConfigError, match=r"num_dims=1: leaves are 2-D or 3-D; pass 2 or 3"):
        build(num_dims=1)
    with pytest.raises(ConfigError, match=r"num_hidden=0: a decoder needs at least 1; pass num_hidden >= 1"):
        build(num_hidden=0)


def test_a_selection_cannot_be_painted() -> None:
    leaves = mixed_leaves()
    part = Leaves(leaves.start[:5], leaves.size[:5], leaves.scale[:5], leaves.shape, leaves.sizes)
    with pytest.raises(ShapeError, match=r"8 cells of the image \(30, 28\) lie in no leaf: .* use the token decoder"):
        cells(part)


def test_inputs_are_checked() -> None:
    decoder, leaves = build(), mixed_leaves()
    patches = Patches(torch.zeros(len(leaves), 1, 4, 4), (leaves,))
    x_TD = torch.zeros(len(leaves), WIDTH)
    with pytest.raises(ShapeError, match=r"1 hidden states: the decoder was built for 2; give the encoder as many"):
        decoder((x_TD,), patches)
    wide = Patches(torch.zeros(len(leaves), 1, 8, 8), (leaves,))
    with pytest.raises(ShapeError, match=r"patches of 8 samples per side: the decoder was built for 4; call patchify"):
        decoder((x_TD, x_TD), wide)
