"""Bags of features: what an encoder made of the patches of one image, with their boxes and where they came from.

A bag is one safetensors file. It is written as a stream and read by place, so that a row costs a row, and no page of a
file is ever mapped that counts as memory of the process.

Legend: N patches, R patches that are read, F features, D spatial axes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry.patch_source import check_boxes, check_index
from foveate.io.guard import bad_file, one_line
from foveate.io.tensor_file import TensorFile, write_tensors

KIND = "foveate features"
SUFFIX = ".safetensors"
_REMEDY = "write it with foveate embed, or import_h5 (foveate.io.bags_h5) for the bags of others"


def write_bag(
    path: str | Path,
    features: Float[Tensor, "N F"] | Iterable[Float[Tensor, "R F"]],
    boxes: Int64[Tensor, "N 2 D"] | None = None,
    shape: Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    half: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes the features of one image whole or not at all.

    Args:
        path: the file; its folder must exist.
        features: one row per patch, or parts of them in order, which need ``boxes`` to say how many there will be.
        boxes: where each patch lies, (start, stop) in level-0 pixels of the image.
        shape: spatial shape of the image in pixels.
        provenance: where they came from, in what JSON holds: image, encoder, size of patches, mpp, ...
        half: True stores float16, False float32.
        overwrite: True replaces an existing file.

    Returns:
        ``path``.

    Raises:
        FormatError: values that are NaN or infinite (in float16: above 65,504), an existing file, or it cannot be
            written.
        ShapeError: rows, boxes and shape do not fit each other.

    Cost: memory of one part.
    """
    path = Path(path)
    parts = iter((features,) if isinstance(features, Tensor) else features)
    first = next(parts, None)
    num = len(boxes) if boxes is not None else len(features) if isinstance(features, Tensor) else None
    if num is None:
        raise ShapeError("parts of features without boxes do not say how many rows there will be; give boxes")
    width = 0 if first is None else first.shape[1]
    size = None if shape is None else tuple(int(side) for side in shape)
    check_boxes(boxes, num, size)
    kind = np.dtype("<f2" if half else "<f4")
    rows = _checked(path, chain(() if first is None else (first,), parts), (num, width), kind)
    tensors: dict[str, Any] = {"features": ((num, width), kind, rows)}
    if boxes is not None:
        small = not boxes.numel() or int(boxes.max()) < 2**31
        tensors["boxes"] = boxes.cpu().numpy().astype("<i4" if small else "<i8")
    about = {"kind": KIND, "shape": json.dumps(size), "provenance": json.dumps(dict(provenance or {}))}
    return write_tensors(path, tensors, about, overwrite=overwrite)


def _checked(
    path: Path, parts: Iterable[Tensor], size: tuple[int, int], kind: "np.dtype[Any]"
) -> Iterator[NDArray[Any]]:
    """The parts in the type that is stored, refused where they do not belong in a bag."""
    done = 0
    for part in parts:
        if part.ndim != 2 or part.shape[1] != size[1]:
            raise ShapeError(f"features of {tuple(part.shape)} in a bag of width {size[1]}; give [R, {size[1]}]")
        with np.errstate(over="ignore"):
            values = part.detach().cpu().float().numpy().astype(kind)
        good = np.isfinite(values)
        if not good.all():
            count, row = int(good.size - good.sum()), int(done + (~good).any(1).argmax())
            raise bad_file(
                path,
                f"{count} features are NaN or infinite as {kind.name}, first of patch {row}; check the encoder and its "
                "input" + ("" if np.isnan(values).any() else ", or store float32 (half=False)"),
            )
        done += len(values)
        if done > size[0]:
            raise ShapeError(f"more than {size[0]} rows of features for {size[0]} boxes; give each patch one row")
        yield values
    if done < size[0]:
        raise ShapeError(f"{done} rows of features for {size[0]} boxes; give each patch one row")


class FeatureBag:
    """The stored features of one image, a `PatchSource`.

    Args:
        path: what `write_bag` wrote.
        width: how many features a patch must have; None takes any.

    Raises:
        FormatError: missing, cut short, damaged, another kind of file, or features of another width.

    Cost: the header; `read` costs the rows that it returns, whatever the size of the file.
    """

    def __init__(self, path: str | Path, width: int | None = None) -> None:
        self.path = Path(path)
        self._file = TensorFile(self.path, KIND, _REMEDY)
        self._features = self._file.find("features", 2, "f")
        if width is not None and len(self) and self._features.shape[1] != width:
            raise bad_file(
                self.path,
                f"holds features of width {self._features.shape[1]}, the model takes {width}; embed it the same way",
            )
        self.width: int = self._features.shape[1]
        """Features per patch, F; 0 of a bag of 0 patches."""
        try:
            said = self._file.value("shape")
            self.shape: tuple[int, ...] | None = None if said is None else tuple(int(side) for side in said)
            self.provenance: dict[str, Any] = dict(self._file.value("provenance", {}))
            """What the writer said of where the features came from."""
            places = self._file.find("boxes", 3, "i") if "boxes" in self._file else None
            if places is not None and places.shape[0] != len(self):
                raise ValueError(f"{places.shape[0]} boxes for {len(self)} patches")
        except (TypeError, ValueError, OverflowError) as error:
            raise self._file.damaged(one_line(error)) from None

    def __reduce__(self) -> tuple[type["FeatureBag"], tuple[Path]]:
        return FeatureBag, (self.path,)

    def __len__(self) -> int:
        return self._features.shape[0]

    @cached_property
    def boxes(self) -> Int64[Tensor, "N 2 D"] | None:
        """Where each patch lies, (start, stop) in level-0 pixels.

        Raises:
            FormatError: one is empty or leaves the image.
        """
        if "boxes" not in self._file:
            return None
        boxes = torch.from_numpy(self._file.tensor("boxes", 3, "i").astype(np.int64))
        try:
            check_boxes(boxes, len(self), self.shape)
        except ShapeError as error:
            raise self._file.damaged(str(error)) from None
        return boxes

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R F"]:
        """Returns the features at ``index`` as stored, float16 or float32."""
        at = check_index(index, len(self)).numpy()
        return torch.from_numpy(self._file.rows(self._features, at))
