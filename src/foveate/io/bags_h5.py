"""Bags of features of others: the ``.h5`` files of CLAM and TRIDENT, in and out.

Both keep ``features`` and the first pixel of every patch, (x, y) at level 0, under the key ``coords``. TRIDENT says the
side of a patch at level 0 and the size of the image in attributes of that array, and the encoder in one of
``features``. CLAM's feature files have no attributes; those of the patches that they were made from have them.

Legend: N patches, F features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.errors import MissingExtraError
from foveate.io.bags import FeatureBag, write_bag
from foveate.io.guard import bad_file, undecodable
from foveate.io.write import atomic_write

PLACES = "coords"  # the key that CLAM and TRIDENT give to first pixels
_H5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError)


def import_h5(
    path: str | Path,
    out: str | Path,
    *,
    patches: str | Path | None = None,
    patch_size: int | None = None,
    half: bool = True,
    overwrite: bool = False,
) -> Path:
    """Turns a bag of CLAM or TRIDENT into one of ours.

    Patches that reach over the border of the image, which both have, get the boxes of what lies inside.

    Args:
        path: ``.h5`` with ``features`` ``[N, F]`` or ``[1, N, F]`` and ``coords`` ``[N, 2]``, (x, y) at level 0.
        out: the bag to write.
        patches: CLAM's ``patches/NAME.h5`` of the slide, which says what its feature file does not.
        patch_size: side of a patch in level-0 pixels, against what the files say.
        half: as in `write_bag`, as is ``overwrite``.

    Returns:
        ``out``.

    Raises:
        FormatError: no such file, no patches, no features, no places of patches or no size of them, or values that are
            not finite.
        MissingExtraError: h5py is not installed.

    Cost: the memory of the features.
    """
    path = Path(path)
    held, said = _read(path, "features", PLACES)
    about = said[PLACES] | ({} if patches is None else _read(Path(patches), PLACES)[1][PLACES])
    features, corner = (one[0] if one.ndim == 3 and len(one) == 1 else one for one in held.values())
    if not len(corner):
        raise bad_file(path, "is a bag of 0 patches, of which nothing can be said; leave the slide out")
    if features.ndim != 2 or features.dtype.kind != "f" or corner.shape != (len(features), 2):
        raise bad_file(
            path,
            f"holds features {features.dtype} {features.shape} and {PLACES} {corner.shape}; give floats [N, F] and "
            "[N, 2]",
        )
    side, shape = patch_size or _side(path, about), _shape(about)
    start = torch.from_numpy(np.rint(corner[:, ::-1]).astype(np.int64))  # (x, y) to (y, x)
    stop = start + side if shape is None else (start + side).minimum(torch.tensor(shape))
    lost = ((start < 0) | (start >= stop)).any(1)
    if lost.any():
        first, sides = int(lost.int().argmax()), "unknown size" if shape is None else f"{shape[0]} x {shape[1]} pixels"
        raise bad_file(
            path, f"patch {first} begins at y, x = {start[first].tolist()}, outside the image of {sides}; make it again"
        )
    provenance = {
        "source": str(about.get("name", path.stem)),
        "imported": path.name,
        "encoder": said["features"].get("encoder"),
        "patch_size": side,
        "h5": about,
    }
    values = torch.from_numpy(features.astype(np.float32))
    return write_bag(out, values, torch.stack([start, stop], 1), shape, provenance, half=half, overwrite=overwrite)


def export_h5(path: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Turns a bag into the ``.h5`` that CLAM and TRIDENT read: ``features`` float32 and ``coords`` (x, y) at level 0.

    Raises:
        FormatError: the bag is damaged or holds no boxes of a plane, or the file exists or cannot be written.
        MissingExtraError: h5py is not installed.
    """
    bag, out, h5py = FeatureBag(path), Path(out), _h5py()
    boxes = bag.boxes
    if boxes is None or boxes.shape[2] != 2:
        raise bad_file(Path(path), "holds no boxes of a plane, which the h5 of CLAM needs; embed it from a slide")
    side = int((boxes[:, 1] - boxes[:, 0]).max()) if len(boxes) else 0
    with atomic_write(out, overwrite=overwrite) as target, h5py.File(target, "w") as file:
        rows = bag.read(torch.arange(len(bag))).float().numpy()
        file.create_dataset("features", data=rows)
        places = file.create_dataset(PLACES, data=boxes[:, 0].flip(1).numpy())
        places.attrs.update(
            {
                "patch_size_level0": side,
                "patch_size": side,
                "patch_level": 0,
                "name": str(bag.provenance.get("source", out.stem)),
            }
        )
        if bag.shape is not None:
            places.attrs.update({"level0_height": bag.shape[0], "level0_width": bag.shape[1]})
    return out


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise MissingExtraError("the h5 files of CLAM and TRIDENT need h5py; pip install 'foveate[h5]'") from None
    return h5py


def _read(path: Path, *names: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Arrays of a file, and the attributes of each.

    Raises:
        FormatError: no such file, or one of them is not in it.
    """
    h5py = _h5py()
    if not path.is_file():
        raise bad_file(path, "cannot be read (no such file); check the path")
    try:
        with h5py.File(path, "r") as file:
            held = {name: np.asarray(file[name]) for name in names if name in file}
            said = {name: _plain(file[name].attrs) for name in held}
    except _H5_ERRORS as error:
        raise undecodable(path, "h5", error) from None
    for name in names:
        if name not in held:
            raise bad_file(path, f"holds no {name!r}; give a feature file of CLAM or TRIDENT, which has both")
    return held, said


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON has them; arrays of one value are that value."""
    found = {}
    for name, value in attributes.items():
        plain = value.tolist() if hasattr(value, "tolist") else value
        plain = plain[0] if isinstance(plain, list) and len(plain) == 1 else plain
        if isinstance(plain, str | int | float | list):
            found[str(name)] = plain
    return found


def _side(path: Path, about: Mapping[str, Any]) -> int:
    """Side of a patch in level-0 pixels: said by TRIDENT; of CLAM's that at their level, and how much coarser that
    is."""
    told: Any = about.get("patch_size_level0")
    downsample = 1 if about.get("patch_level") == 0 else about.get("downsample")
    try:
        if told is None and "patch_size" in about and downsample is not None:
            told = np.max(about["patch_size"]) * np.max(downsample) * float(about.get("custom_downsample", 1))
        side = round(float(told))
    except (TypeError, ValueError, OverflowError):
        side = 0
    if side < 1:
        raise bad_file(
            path,
            "does not say how large a patch is at level 0; pass patches (CLAM's patches/NAME.h5), or patch_size in "
            "level-0 pixels",
        )
    return side


def _shape(about: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of the image at level 0, where the file says it: TRIDENT's by name, CLAM's (width, height) at the patches' level,
    and how much coarser that is."""
    try:
        if "level0_height" in about:
            return int(about["level0_height"]), int(about["level0_width"])
        width, height = np.rint(np.multiply(about["level_dim"], about["downsample"])).astype(int).tolist()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return height, width
