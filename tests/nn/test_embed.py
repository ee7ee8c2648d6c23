"""Patch and box to token: the projection of a ViT, its table seen through boxes, and codes that start at nothing."""

import pytest
import torch
from torch.nn import functional

import foveate as fv
from foveate.nn.embed import GeometryEmbed, PatchEmbed, axis_weights, geometry_features, grid_weights, rotary_angles


def blank(leaves: fv.Leaves, size: int = 4) -> fv.Patches:
    return fv.Patches(torch.zeros(len(leaves), 1, *(size,) * leaves.num_dims), (leaves,))


def tree(num_dims: int, side: int = 32, max_leaves: int = 30, seed: int = 0) -> fv.Leaves:
    image = torch.randn(1, *(side,) * num_dims, generator=torch.Generator().manual_seed(seed))
    return fv.adaptive_leaves(image, max_leaves=max_leaves, min_size=4)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_projection_is_the_convolution(num_dims: int) -> None:
    embed = PatchEmbed(num_dims, 3, 24, 4)
    image = torch.randn(3, *(12,) * num_dims)
    convolved = embed.proj(image[None])[0].flatten(1).T
    patches = fv.patchify(image, fv.uniform_leaves(image.shape[1:], 4), 4)
    torch.testing.assert_close(embed(patches), convolved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_a_leaf_that_is_a_cell_reads_its_entry_alone(num_dims: int) -> None:
    weights = grid_weights(blank(fv.uniform_leaves((16,) * num_dims, 4)), 4)
    assert torch.equal(weights, torch.eye(4**num_dims))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_a_leaf_of_several_cells_reads_their_mean(num_dims: int) -> None:
    coarse = grid_weights(blank(fv.uniform_leaves((16,) * num_dims, 8)), 4)
    assert torch.equal(coarse.sum(1), torch.ones(2**num_dims))
    assert sorted(coarse[0].unique().tolist()) == [0.0, 0.5**num_dims]
    whole = grid_weights(blank(fv.uniform_leaves((16,) * num_dims, 16)), 4)
    assert torch.equal(whole, torch.full((1, 4**num_dims), 0.25**num_dims))


def test_a_leaf_smaller_than_a_cell_reads_between_entries() -> None:
    table = torch.tensor([1.0, 2.0, 4.0, 8.0])
    start, stop = torch.tensor([0, 6, 8]), torch.tensor([2, 10, 10])
    values = axis_weights(start, stop, 32, 4) @ table
    assert values.tolist() == pytest.approx([1.0, 1.5, 1.0 + 1.0 * (9 / 8 - 0.5)])


@pytest.mark.parametrize("num_dims", [2, 3])
def test_every_leaf_of_a_tree_reads_one_table_in_full(num_dims: int) -> None:
    weights = grid_weights(blank(tree(num_dims)), 5)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    assert (weights >= 0).all()


def test_a_border_leaf_stands_where_its_pixels_are() -> None:
    leaves = fv.uniform_leaves((8, 10), 8)  # the second cell shows two columns
    weights = grid_weights(blank(leaves, 8), 10).unflatten(1, (10, 10)).sum(1)
    assert (weights[1, :8] < 1e-6).all()


def test_a_grid_of_one_entry() -> None:
    assert torch.equal(grid_weights(blank(tree(2)), 1), torch.ones(len(tree(2)), 1))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_places_are_told_apart_and_do_not_depend_on_company(num_dims: int) -> None:
    first, second = blank(tree(num_dims)), blank(tree(num_dims, 16, 9, 1))
    features = geometry_features(first)
    assert len(features.unique(dim=0)) == len(features)
    together = fv.pack([second, first])
    for code in (
        geometry_features,
        lambda patches: grid_weights(patches, 3),
        lambda patches: rotary_angles(patches, 12),
    ):
        assert torch.equal(code(together), torch.cat([code(second), code(first)]))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_the_code_starts_at_nothing_and_learns(num_dims: int) -> None:
    code, patches = GeometryEmbed(num_dims, 8), blank(tree(num_dims))
    out = code(patches)
    assert not out.any()
    functional.mse_loss(out, torch.ones_like(out)).backward()
    assert code.fc2.weight.grad is not None
    assert code.fc2.weight.grad.any()


@pytest.mark.parametrize("num_dims", [2, 3])
def test_rotary_angles_are_the_leaf_centres(num_dims: int) -> None:
    leaves = tree(num_dims)
    angles = rotary_angles(blank(leaves), 12).unflatten(1, (num_dims, -1))
    torch.testing.assert_close(angles[:, :, 0], leaves.centre / 4)


def test_rotary_leaves_spare_channels_alone() -> None:
    angles = rotary_angles(blank(tree(3)), 16)  # 8 pairs over 3 axes: 2 each, 2 left
    assert angles.shape[1] == 8
    assert not angles[:, 6:].any()
