"""Bags of patches: what every source promises, and what each is made of."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import ShapeError
from foveate.geometry.lazy import lazy_patches
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.patch_source import (
    GridPatches,
    LeavesPatches,
    PatchSource,
    TensorPatches,
    block_order,
    check_boxes,
    check_index,
    constant_of,
)
from foveate.geometry.patches import patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.io.raster import ArrayRaster
from foveate.io.view import at_mpp
from sources import TiledRaster, mean_levels


def picture(shape, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (channels, *shape), dtype=np.uint8)


def every(source):
    return source.read(torch.arange(len(source)))


def some_sources():
    image = picture((37, 50))
    leaves = adaptive_leaves(image, 20, min_size=4)
    return {
        "pixels": TensorPatches(torch.rand(9, 3, 8, 8)),
        "features": TensorPatches(torch.rand(9, 5).half()),
        "grid": GridPatches(TiledRaster(image), 8, stride=5),
        "leaves of a source": LeavesPatches(TiledRaster(image), leaves, 4),
        "leaves of a tensor": LeavesPatches(torch.from_numpy(image), leaves, 4),
        "volume": GridPatches(TiledRaster(picture((9, 10, 11), 1)), 4),
    }


@pytest.mark.parametrize("name", some_sources())
def test_a_source_is_read_in_any_order_any_number_of_times(name: str) -> None:
    source = some_sources()[name]
    assert isinstance(source, PatchSource)
    whole = every(source)
    index = torch.tensor([len(source) - 1, 0, 3, 3, 1])
    assert torch.equal(source.read(index), whole[index])
    assert torch.equal(torch.cat([source.read(part) for part in torch.arange(len(source)).split(2)]), whole)
    assert source.read(index[:0]).shape == (0, *whole.shape[1:])
    assert source.boxes is None or source.boxes.shape == (len(source), 2, len(source.shape))


@pytest.mark.parametrize("name", some_sources())
def test_an_index_outside_a_bag_is_refused(name: str) -> None:
    source = some_sources()[name]
    with pytest.raises(ShapeError, match=rf"index from -1 to 0 in a bag of {len(source)} patches; positions count"):
        source.read(torch.tensor([0, -1]))
    with pytest.raises(ShapeError, match=f"index from 0 to {len(source)} in a bag"):
        source.read(torch.tensor([0, len(source)]))


def test_positions_are_whole_numbers_in_a_row() -> None:
    with pytest.raises(ShapeError, match=r"index is torch.int32 \(1,\); give int64 positions \[R\]"):
        check_index(torch.zeros(1, dtype=torch.int32), 3)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 20), st.integers(1, 20), st.sampled_from([3, 16])
)
def test_a_grid_drops_no_pixel(shape, patch, stride, tile) -> None:
    image = picture(shape, 2)
    grid = GridPatches(TiledRaster(image, tile=tile), patch, stride=min(stride, patch))
    seen = np.zeros(shape, int)
    for (start, stop), pixels in zip(grid.boxes.tolist(), every(grid).numpy(), strict=True):
        area = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        seen[area] += 1
        inside = image[(slice(None), *area)]
        missing = [(0, patch - side) for side in inside.shape[1:]]
        assert np.array_equal(pixels, np.pad(inside, [(0, 0), *missing], mode="edge"))
    assert seen.min() >= 1
    assert len(grid) == np.prod(grid.grid)
    if stride >= patch:
        assert seen.max() == 1


def test_a_grid_reads_every_tile_once_per_call() -> None:
    raster = TiledRaster(picture((100, 90)), tile=16)
    grid = GridPatches(raster, 10)
    grid.read(torch.randperm(len(grid), generator=torch.Generator().manual_seed(0)))
    assert set(raster.reads.values()) == {1}
    assert len(raster.reads) == 7 * 6


def test_a_patch_that_is_not_kept_is_never_read() -> None:
    raster = TiledRaster(picture((64, 64)), tile=16)
    keep = torch.zeros(16, dtype=torch.bool)
    keep[[5, 10]] = True
    grid = GridPatches(raster, 16, keep=keep)
    assert grid.boxes.tolist() == [[[16, 16], [32, 32]], [[32, 32], [48, 48]]]
    every(grid)
    assert {box for _, box in raster.reads} == {((16, 16), (32, 32)), ((32, 32), (48, 48))}
    empty = GridPatches(raster, 16, keep=torch.zeros(16, dtype=torch.bool))
    assert (len(empty), tuple(empty.boxes.shape), tuple(every(empty).shape)) == (0, (0, 2, 2), (0, 3, 16, 16))


@pytest.mark.parametrize("short", [0, 1])
def test_a_grid_of_a_coarser_level_has_boxes_in_level_0(short: int) -> None:
    image = picture((43, 41))
    (level,) = mean_levels(image, [4])
    coarse = level[:, : level.shape[1] - short, : level.shape[2] - short]  # some writers round down
    grid = GridPatches(TiledRaster(image, coarser=[coarse], tile=3), 4, level=1)
    assert grid.grid == (3, 3)
    assert grid.boxes[-1].tolist() == [[32, 32], [43, 41]]
    padded = np.pad(coarse, [(0, 0), (0, 12 - coarse.shape[1]), (0, 12 - coarse.shape[2])], mode="edge")
    assert np.array_equal(every(grid)[4], padded[:, 4:8, 4:8])
    assert np.array_equal(every(grid)[8], padded[:, 8:12, 8:12])


def test_a_grid_of_a_level_that_divides_nothing() -> None:
    image = picture((100, 90))
    coarse = np.ascontiguousarray(image[:, :40, :36])  # 2.5 x
    grid = GridPatches(TiledRaster(image, coarser=[coarse], tile=7), 8, level=1)
    assert np.array_equal(every(grid)[0], coarse[:, :8, :8])
    assert np.array_equal(every(grid)[6], coarse[:, 8:16, 8:16])
    assert grid.boxes[6].tolist() == [[20, 20], [40, 40]]
    assert grid.boxes[:, 1].max(0).values.tolist() == [100, 90]


def test_a_grid_of_a_view_is_cut_from_the_view() -> None:
    view = at_mpp(TiledRaster(picture((150, 130)), (0.0005, 0.0005), tile=16), 0.7)
    whole = view.read(((0, 0), view.shape))
    grid = GridPatches(view, 20)
    for (start, stop), pixels in zip(grid.boxes.tolist(), every(grid).numpy(), strict=True):
        inside = whole[(slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))]
        assert np.array_equal(pixels[:, : inside.shape[1], : inside.shape[2]], inside)


def test_pixels_are_bytes_or_float32() -> None:
    for kind, expected in (
        ("uint8", torch.uint8),
        ("bool", torch.uint8),
        (">u2", torch.float32),
        ("f8", torch.float32),
    ):
        raster = ArrayRaster(picture((9, 9)).astype(kind))
        assert GridPatches(raster, 4).read(torch.tensor([0])).dtype == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, r"patch_size=0 must be one integer >= 1"),
        ({"patch_size": 4, "stride": 5}, r"stride=\(5, 5\) above patch_size=\(4, 4\) would leave pixels out; lower it"),
        ({"patch_size": 4, "level": 1}, r"level 1 of a source of 1; give 0 to 0"),
        (
            {"patch_size": 4, "keep": torch.ones(3, dtype=torch.bool)},
            r"keep is torch.bool \(3,\); give one bool for each",
        ),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(arguments, message) -> None:
    with pytest.raises(ShapeError, match=message):
        GridPatches(ArrayRaster(picture((9, 9))), **arguments)


@pytest.mark.parametrize(
    ("boxes", "shape", "message"),
    [
        (torch.zeros(2, 2, 2), None, r"boxes are torch.float32 \(2, 2, 2\); give int64 \[N, 2, D\]"),
        (torch.tensor([[[0, 0], [1, 1]]]), None, "1 boxes for 2 patches; give each patch its box"),
        (torch.tensor([[[0, 0], [4, 4]], [[4, 4], [4, 8]]]), None, r"box 1 is \[\[4, 4\], \[4, 8\]\]; give 0 <= start"),
        (torch.tensor([[[0, 0], [4, 4]], [[4, 4], [8, 8]]]), (7, 8), r"box 1 .* inside the image of \(7, 8\)"),
        (torch.tensor([[[0, 0], [4, 4]]] * 2), (7, 8, 9), r"boxes are .* of an image of \(7, 8, 9\)"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(boxes, shape, message) -> None:
    with pytest.raises(ShapeError, match=message):
        check_boxes(boxes, 2, shape)


def test_a_bag_has_one_of_two_forms() -> None:
    with pytest.raises(ShapeError, match=r"bag of shape \(2, 3, 4\); give \[N, C, P, P\(, P\)\] pixels or \[N, F\]"):
        TensorPatches(torch.zeros(2, 3, 4))
    assert len(TensorPatches(np.zeros((0, 7), np.float32))) == 0


@pytest.mark.parametrize("shape", [(37, 50), (9, 10, 21)])
def test_leaves_of_a_source_are_those_of_the_image(shape) -> None:
    image = picture(shape, 2)
    leaves = adaptive_leaves(image, 40, min_size=2)
    ours = LeavesPatches(TiledRaster(image, tile=8), leaves, 4)
    assert torch.equal(every(ours), patchify(image, leaves, 4).pixels)
    assert torch.equal(every(LeavesPatches(torch.from_numpy(image), leaves, 4)), every(ours))


def test_leaves_of_a_pyramid_are_read_from_its_levels() -> None:
    image = np.kron(picture((24, 30)), np.ones((1, 8, 8), np.uint8)).astype(np.float32)
    raster = TiledRaster(image, coarser=mean_levels(image, [4, 16]))
    patches, _ = lazy_patches(raster, 60, patch_size=4, min_size=8)
    raster.reads.clear()
    ours = LeavesPatches(raster, patches.leaves[0], 4)
    assert torch.allclose(every(ours), patches.pixels, atol=1e-3)
    assert max(raster.levels_read()) > 0


def test_leaves_of_another_image_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"leaves of an image of \(8, 8\) for one of \(9, 9\); cut this image's own"):
        LeavesPatches(ArrayRaster(picture((9, 9))), uniform_leaves((8, 8), 4), 4)


def test_only_a_source_that_knows_says_what_is_constant() -> None:
    class Sparse(ArrayRaster):
        def blank(self, boxes):
            return np.array([not self.read(tuple(map(tuple, box))).any() for box in boxes.tolist()])

    image = np.zeros((1, 16, 16), np.uint8)
    image[0, 5, 9] = 7
    grid = GridPatches(Sparse(image), 4)
    known = [not (y == 1 and x == 2) for y, x in product(range(4), repeat=2)]
    assert constant_of(grid).tolist() == known
    assert constant_of(GridPatches(ArrayRaster(image), 4)) is None
    assert constant_of(TensorPatches(torch.zeros(3, 2))) is None
    bag = TensorPatches(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="constant of 2 for 3 patches; give each one truth value"):
        TensorPatches.__init__.__wrapped__(bag, torch.zeros(3, 2), constant=torch.ones(2, dtype=torch.bool))


def test_an_order_of_blocks_decodes_each_tile_seldom() -> None:
    raster = TiledRaster(picture((160, 160), 1), tile=20)
    grid = GridPatches(raster, 10)
    order = block_order(grid.boxes, 16)
    assert torch.equal(order.sort().values, torch.arange(256))
    for part in order.split(16):
        grid.read(part)
    assert set(raster.reads.values()) == {1}  # 4 x 4 patches are 2 x 2 tiles
    assert block_order(grid.boxes[:0], 16).tolist() == []
    row_by_row = TiledRaster(picture((160, 160), 1), tile=20)
    for part in torch.arange(256).split(16):
        GridPatches(row_by_row, 10).read(part)
    assert sum(row_by_row.reads.values()) == 2 * len(raster.reads)
