"""Bags of features of others: the ``.h5`` files of CLAM and TRIDENT, in and out.

Both keep ``features`` and the first pixel of every patch, (x, y) at level 0, under the key ``coords``; the side of a
patch at level 0 is an attribute of that array, or follows from ``patch_size`` and ``patch_level``.

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
_SIDE = ("patch_size_level0", "patch_size_src")
_H5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError)


def import_h5(
    path: str | Path, out: str | Path, *, patch_size: int | None = None, half: bool = True, overwrite: bool = False
) -> Path:
    """Turns a bag of CLAM or TRIDENT into one of ours.

    Args:
        path: ``.h5`` with ``features`` ``[N, F]`` or ``[1, N, F]`` and ``coords`` ``[N, 2]``, (x, y) at level 0.
        out: the bag to write.
        patch_size: side of a patch in level-0 pixels, against what the file says.
        half: as in `write_bag`, as is ``overwrite``.

    Returns:
        ``out``.

    Raises:
        FormatError: no such file, no features, no places of patches or no size of them, or values that are not finite.
        MissingExtraError: h5py is not installed.

    Cost: the memory of the features.
    """
    path, h5py = Path(path), _h5py()
    if not path.is_file():
        raise bad_file(path, "cannot be read (no such file); check the path")
    try:
        with h5py.File(path, "r") as file:
            held = {name: np.asarray(file[name]) for name in ("features", PLACES) if name in file}
            about = {**_plain(file.attrs), **(_plain(file[PLACES].attrs) if PLACES in held else {})}
    except _H5_ERRORS as error:
        raise undecodable(path, "h5", error) from None
    for name in ("features", PLACES):
        if name not in held:
            raise bad_file(path, f"holds no {name!r}; give a feature file of CLAM or TRIDENT, which has both")
    features, corner = held["features"], held[PLACES]
    features = features[0] if features.ndim == 3 and len(features) == 1 else features
    if features.ndim != 2 or features.dtype.kind != "f" or corner.shape != (len(features), 2):
        raise bad_file(
            path,
            f"holds features {features.dtype} {features.shape} and {PLACES} {corner.shape}; give floats [N, F] and "
            "[N, 2]",
        )
    side = patch_size or _side(path, about)
    start = torch.from_numpy(corner[:, ::-1].astype(np.int64))  # (x, y) to (y, x)
    boxes = torch.stack([start, start + side], dim=1)
    provenance = {"source": str(about.get("name", path.stem)), "imported": path.name, "h5": about, "patch_size": side}
    values = torch.from_numpy(features.astype(np.float32))
    return write_bag(out, values, boxes, _shape(about, boxes), provenance, half=half, overwrite=overwrite)


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
    """Side of a patch in level-0 pixels."""
    told = next((about[name] for name in _SIDE if name in about), None)
    if told is None and about.get("patch_level") == 0:
        told = about.get("patch_size")
    if told is None and "patch_size" in about and "downsample" in about:
        told = np.max(about["patch_size"]) * np.max(about["downsample"])
    try:
        side = round(float(told))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        side = 0
    if side < 1:
        raise bad_file(path, "does not say how large a patch is at level 0; pass patch_size, in level-0 pixels")
    return side


def _shape(about: Mapping[str, Any], boxes: torch.Tensor) -> tuple[int, int] | None:
    """Of the image at level 0, where the file says it and all patches lie inside."""
    try:
        shape = (int(about["level0_height"]), int(about["level0_width"]))
    except (KeyError, TypeError, ValueError):
        return None
    inside = not len(boxes) or bool((boxes[:, 1] <= torch.tensor(shape)).all())
    return shape if inside else None
