"""Which reader a path gets, by what it holds; never by its name, and never by what happens to open it."""

from pathlib import Path

from foveate.errors import ConfigError, FormatError
from foveate.io.guard import Want, bad_file, sniff
from foveate.io.image import read_image
from foveate.io.raster import About, ArrayRaster, Raster, fits_whole
from foveate.io.spacing import Real, choose
from foveate.io.tensor_file import is_tensor_file
from foveate.io.tiff import check_pages
from foveate.io.tile_cache import TileCache
from foveate.io.tiled import check_broken

_ZARR = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
_ZIP = b"PK\x03\x04"  # of zarr
_NIFTI = (348, 540)  # what a NIfTI header says of its own size, in either byte order
_OVERLAPS = "it is a {vendor} slide, whose levels tifffile does not put together"


def open_by_content(
    path: Path,
    *,
    mpp: Real | None,
    spacing: tuple[float, ...] | None,
    max_pixels: int,
    broken: str,
    cache: TileCache | None,
    want: Want,
) -> Raster:
    """Does what ``open_raster`` promises; the arguments are the same."""
    check_broken(broken)
    given = choose((), mpp=mpp, spacing=spacing).spacing
    head = b"" if path.is_dir() else _head(path)
    if head[:4] == _ZIP or (path.is_dir() and any((path / name).exists() for name in _ZARR)):
        from foveate.io.ngff import open_zarr

        return open_zarr(path, spacing=given, max_pixels=max_pixels)
    if is_tensor_file(head):
        from foveate.io.sparse_image import open_sparse

        return open_sparse(path, spacing=given)
    vendor = None if path.is_dir() else _vendor(path, head)
    if vendor is None and (path.is_dir() or _is_volume(head)):
        if mpp is not None:
            raise ConfigError(f"mpp={mpp} for a volume; give spacing in mm along each axis")
        from foveate.io.volume import open_volume

        return open_volume(path, spacing=spacing, max_pixels=max_pixels)
    if vendor not in (None, "aperio", "generic-tiff"):
        return _open_slide(path, _OVERLAPS.format(vendor=vendor), given, broken, cache)
    if sniff(path) == "tiff":
        return _open_tiff(path, vendor == "aperio", given, max_pixels, broken, cache, want)
    pixels = read_image(path, max_pixels=max_pixels, want=want)
    return ArrayRaster(pixels, given, about=About("image", f"it is {sniff(path).upper()}", _origin(given)))


def _open_tiff(
    path: Path,
    aperio: bool,
    given: tuple[float, ...] | None,
    max_pixels: int,
    broken: str,
    cache: TileCache | None,
    want: Want,
) -> Raster:
    """By tile where it is a slide or large, else at once, with all the checks of ordinary images."""
    from foveate.io.tiff_layout import read_layout
    from foveate.io.tiff_levels import TiffRaster

    try:
        layout = read_layout(path, want)
    except FormatError:
        pixels = read_image(path, max_pixels=max_pixels, want=want)  # stacks, or a better word on what is wrong
        return ArrayRaster(pixels, given, about=About("image", "it is a TIFF without levels", _origin(given)))
    if aperio and layout.has_foreign_colours:
        return _open_slide(path, "it holds Aperio's own kind of JPEG 2000", given, broken, cache)
    side = layout.levels[0].shape
    if aperio:
        reason = "it is an Aperio slide, one plain pyramid of tiles"
    elif len(layout.levels) > 1:
        reason = f"it is a TIFF of {len(layout.levels)} levels"
    elif not fits_whole(side):
        reason = f"it is a TIFF of {side[0]} x {side[1]} pixels"
    else:
        pixels = read_image(path, max_pixels=max_pixels, want=want)
        size = choose(layout.claims if pixels.ndim == 3 else (), spacing=given)
        about = About("image", "it is a TIFF without levels", size.origin, size.notes)
        return ArrayRaster(pixels, size.spacing, about=about)
    return TiffRaster(path, layout, spacing=given, broken=broken, cache=cache, want=want, reason=reason)


def _open_slide(
    path: Path, reason: str, given: tuple[float, ...] | None, broken: str, cache: TileCache | None
) -> Raster:
    from foveate.io.slide import SlideRaster

    return SlideRaster(path, spacing=given, broken=broken, cache=cache, reason=reason)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(132)
    except (OSError, ValueError) as error:
        raise bad_file(path, f"cannot be read ({getattr(error, 'strerror', None) or error}); check the path") from None


def _is_volume(head: bytes) -> bool:
    """NIfTI, gzip around one, or DICOM."""
    sizes = [int.from_bytes(head[:4], order) for order in ("little", "big")]
    return any(size in _NIFTI for size in sizes) or head[:2] == b"\x1f\x8b" or head[128:132] == b"DICM"


def _vendor(path: Path, head: bytes) -> str | None:
    """Whose slide it is, in OpenSlide's word, or None; files that cannot be slides are not asked about."""
    try:
        kind = sniff(path)
    except FormatError:
        kind = "unknown" if len(head) >= 4 else "empty"
    mirax = kind == "jpeg" and (path.with_suffix("") / "Slidedat.ini").exists()
    if kind not in ("tiff", "unknown") and not mirax:
        return None
    import openslide

    if kind == "tiff":
        check_pages(path)  # what OpenSlide is told to allocate, it allocates or ends the process
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None
    return vendor


def _origin(given: tuple[float, ...] | None) -> str:
    return "given as an argument" if given else "nobody said it"
